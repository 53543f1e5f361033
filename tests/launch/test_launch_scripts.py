"""Common properties of all launch scripts: shellcheck, --help, settings from the head, a dry run that runs nothing."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TOOLS = ("gcloud", "aws", "xpk", "kubectl", "sbatch", "srun", "scontrol", "pathflip", "git", "nvidia-smi")
OPTIONS = ["--config", "align_base", "--config.data.records=records", "--config.data.texts=my reports.jsonl"]
# Settings that a script cannot do without, with values that it takes.
NEEDED = {
    "tpu.sh": {"PROJECT": "lab", "ZONE": "us-west4-a", "DATA": "gs://lab/cohort", "WORKDIR": "gs://lab/runs/base"},
    "xpk.sh": {
        "PROJECT": "lab", "ZONE": "us-west4-a", "CLUSTER": "pods", "IMAGE": "registry/pathflip:1",
        "DATA": "gs://lab/cohort", "WORKDIR": "/share/runs/base",
    },
    "gpus.sh": {"GPUS": "2", "DATA": "gs://lab/cohort", "WORKDIR": "/share/runs/base"},
    "slurm.sh": {"DATA": "s3://lab/cohort", "WORKDIR": "/share/runs/base"},
    "jobset.sh": {
        "IMAGE": "registry/pathflip:1", "DATA": "s3://lab/cohort", "WORKDIR": "/share/runs/base",
        "SHARED_CLAIM": "claim",
    },
}  # fmt: skip
# Another value for every setting, and the settings that only steer the script itself, so that no command shows them.
OTHER = {
    "DATA": "gs://lab/other",
    "WORKDIR": "/share/other",
    "ACCELERATOR_TYPE": "v5litepod-4",
    "NODE_SELECTOR": "pool=a100",
    "GPUS": "3",
}
INSIDE = {"MAX_RESTARTS", "MAX_STARTS", "PAUSE", "POLL", "WAIT", "BACKUP_SECONDS"}


def settings_of(script: str) -> list[str]:
    """The names at the head of a script, before it does anything."""
    head = (LAUNCH / script).read_text().partition("\nsource ")[0]
    return re.findall(r'^([A-Z_]+)="\$\{\1:?-', head, re.M)


@pytest.fixture
def tools(stand_ins):
    for name in TOOLS:
        stand_ins.add(name)
    return stand_ins


def test_shellcheck_finds_nothing():
    program = shutil.which("shellcheck", path=Path(sys.executable).parent) or "shellcheck"
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert {path.name for path in scripts} == {*NEEDED, "common.sh", "worker.sh"}
    assert subprocess.run([program, *scripts]).returncode == 0


@pytest.mark.parametrize("script", [*NEEDED, "worker.sh"])
def test_help_shows_usage_and_every_setting(script, tools):
    done = tools.run(script, "--help")
    assert done.returncode == 0 and f"usage: launch/{script} [--dry-run | --help]" in done.stdout
    assert len(settings_of(script)) > 7
    for name in settings_of(script):
        assert f'{name}="${{{name}' in done.stdout
    assert "\nsource " not in done.stdout and tools.calls() == []


@pytest.mark.parametrize("script", NEEDED)
def test_dry_run_prints_commands_and_runs_none(script, tools, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = tools.run(script, "--dry-run", *OPTIONS, **NEEDED[script], LOCAL=tmp_path / "local")
    assert done.returncode == 0, done.stderr
    looked = [call for call in tools.calls() if call == ["nvidia-smi", "--list-gpus"]]
    assert tools.calls() == looked and sorted({*tmp_path.rglob("*")} - {tools.folder / "calls"}) == before
    # What every host runs is told to the last word, options as they were given.
    words = [shlex.split(line) for line in done.stdout.replace("# ", "").splitlines() if "pathflip train" in line]
    assert len(words) == 1
    program = words[0].index("pathflip")
    assert words[0][program + 1 : program + 2 + len(OPTIONS)] == ["train", *OPTIONS]
    assert words[0][program - 1].startswith("JAX_COMPILATION_CACHE_DIR=")
    staged = [
        line for line in done.stdout.splitlines() if "/records" in line and ("rsync" in line or "s3 sync" in line)
    ]
    assert NEEDED[script]["DATA"] in staged[0] and str(tmp_path / "local") in staged[0]


@pytest.mark.parametrize("script", NEEDED)
def test_every_setting_is_taken_from_the_environment(script, tools):
    """A setting that changes nothing of what will run would be dead."""
    usual = tools.run(script, "--dry-run", *OPTIONS, **NEEDED[script]).stdout
    unseen = set()
    for name in settings_of(script):
        done = tools.run(script, "--dry-run", *OPTIONS, **NEEDED[script] | {name: OTHER.get(name, "4711")})
        assert done.returncode == 0, done.stderr
        if done.stdout == usual:
            unseen.add(name)
    assert unseen <= INSIDE


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, names in NEEDED.items() for name in names])
def test_an_empty_setting_is_named(script, name, tools):
    done = tools.run(script, *OPTIONS, **NEEDED[script] | {name: ""})
    assert done.returncode == 2 and name in done.stderr and "set" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and tools.calls("gcloud") == tools.calls("sbatch") == []


COUNTS = [
    (script, name)
    for script in NEEDED
    for name in settings_of(script)
    if name in ("NODES", "CPUS", "PER_NODE", "PORT", "MAX_RESTARTS", "MAX_STARTS", "GRACE", "WAIT", "POLL", "NOTICE")
]


@pytest.mark.parametrize(("script", "name"), COUNTS)
def test_a_word_for_a_number_is_refused_by_name(script, name, tools):
    done = tools.run(script, *OPTIONS, **NEEDED[script] | {name: "two"})
    assert done.returncode == 2 and f"{name}=two: expected" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", NEEDED)
def test_what_the_environment_gave_is_told_apart_from_what_the_script_says(script, tools):
    said = tools.run(script, "--dry-run", *OPTIONS, **NEEDED[script] | {"LOCAL": "/scratch/a b"}).stderr
    given, written = (re.search(f"{where}: (.*)", said)[1] for where in ("from the environment", "top of the script"))
    assert dict(word.split("=", 1) for word in shlex.split(given)) == NEEDED[script] | {"LOCAL": "/scratch/a b"}
    assert "MAX_STARTS=5" in shlex.split(written) and "DATA" not in written


@pytest.mark.parametrize("script", NEEDED)
def test_training_options_are_required_and_the_run_folder_is_a_setting(script, tools):
    assert "no options for pathflip train" in tools.run(script, **NEEDED[script]).stderr
    done = tools.run(script, *OPTIONS, "--workdir=runs/base", **NEEDED[script])
    assert done.returncode == 2 and "the run folder is the setting WORKDIR" in done.stderr


@pytest.mark.parametrize("script", ["xpk.sh", "gpus.sh", "slurm.sh", "jobset.sh"])
def test_processes_that_write_one_checkpoint_need_a_shared_folder(script, tools):
    done = tools.run(script, *OPTIONS, **NEEDED[script] | {"WORKDIR": "gs://lab/run"})
    assert done.returncode == 2 and "WORKDIR=gs://lab/run" in done.stderr


def test_the_image_is_pinned():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    (base,) = (line for line in lines if line.startswith("FROM"))
    assert re.fullmatch(r"FROM python:3\.12\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    installs = [line for line in lines if re.search("install .*=|pip install|worker.sh install", line)]
    pinned = [line for line in installs if re.search(r" \S+==?\d[\w.-]+ |worker.sh install", line)]
    assert pinned == installs and len(installs) == 3

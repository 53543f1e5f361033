"""Two real processes of four virtual devices each compute, agree and train as one process does."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("two_processes.py")
TRAIN = [
    sys.executable, "-m", "pathflip_jax.cli", "train", "--config=align_base:smoke", "--config.train.steps=8",
    "--config.train.keep=9", "--config.model.hidden=16", "--config.model.layers=1", "--config.data.regions=2",
]  # fmt: skip
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Devices -> the variables of a process that has them; compiled steps are shared."""
    cache = tmp_path_factory.mktemp("compiled")

    def with_devices(count, **more):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        common = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
        return os.environ | common | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | more

    return with_devices


@pytest.fixture(scope="module")
def together(run_together):
    """Runs processes that all end well; what each said on stdout and stderr."""

    def run(commands, environments):
        codes, said = run_together(commands, environments, timeout=500)
        assert codes == [0] * len(commands), said
        return said

    return run


@pytest.fixture(scope="module")
def trained(tiny_cohort, environment, together, free_port, tmp_path_factory):
    """Runs of 8 steps that were saved on one device, on eight, and on two processes of four."""
    folder = tmp_path_factory.mktemp("trained")
    command = [*TRAIN, *tiny_cohort.settings()]
    for devices in (8, 1):
        groups = f"--config.data.text_groups={8 if devices == 1 else 0}"
        together([[*command, groups, f"--workdir={folder / str(devices)}"]], [environment(devices)])
    options = [f"--coordinator=localhost:{free_port()}", "--num_processes=2", f"--workdir={folder / '2x4'}"]
    commands = [[*command, *options, f"--process_id={process}"] for process in range(2)]
    said = together(commands, [environment(4)] * 2)
    return folder, said


def curve(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if "perf/" not in name and "per_second" not in name} for row in rows]


def assert_same_curve(found, expected):
    found, expected = curve(found), curve(expected)
    assert [row["step"] for row in found] == [row["step"] for row in expected] == list(range(1, 9))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=TOLERANCE, abs=1e-7)
    assert expected[0]["loss"] > expected[-1]["loss"] and "val/mean_reciprocal_rank" in expected[-1]


def test_loss_gradients_and_sound_checkpoints_are_agreed_on(environment, together, free_port, tmp_path):
    port = free_port()
    commands = [[sys.executable, "-W", "error", SCRIPT, str(port), str(i), tmp_path] for i in range(2)]
    said = together(commands, [environment(4)] * 2)
    assert all(stderr.endswith("equal\n") for _, stderr in said), said
    damaged = re.findall(r"going back to step 1: .*/(\d): (.*)", said[0][0])
    assert damaged == [
        ("3", "a file that this host cannot read (process 1)"),
        ("2", "the numbers of logit_scale do not match their checksum (process 1)"),
    ]


@pytest.mark.parametrize("where", ["8", "2x4"])
def test_the_curve_is_that_of_one_device(trained, where):
    folder, _ = trained
    assert_same_curve(folder / where, folder / "1")


def test_process_0_alone_writes(trained):
    folder, said = trained
    assert said[1] == ("", ""), "the other process has nothing to say"
    assert "pathflip: 2 processes, 8 devices (cpu); found by --coordinator" in said[0][1]
    assert len(list((folder / "2x4/tensorboard").iterdir())) == 1


@pytest.mark.parametrize(("saved", "devices"), [("8", 1), ("8", 4), ("8", 8), ("2x4", 1), ("2x4", 8)])
def test_a_run_goes_on_elsewhere_with_the_same_curve(
    trained, environment, together, tiny_cohort, tmp_path, saved, devices
):
    folder, _ = trained
    workdir = Path(shutil.copytree(folder / saved, tmp_path / "run"))
    for step in ("6", "8"):  # as it was after four steps, stopped before the next save
        shutil.rmtree(workdir / "checkpoints" / step)
    command = [*TRAIN, *tiny_cohort.settings(), f"--workdir={workdir}"]
    ((_, stderr),) = together([command], [environment(devices)])
    assert "resuming from step 4" in stderr and "text groups" not in stderr
    assert_same_curve(workdir, folder / "1")


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911"}
VARIABLES = {"JAX_NUM_PROCESSES": "2"}


@pytest.mark.parametrize(
    ("name", "variables", "rank"),
    [("Slurm", SLURM, "SLURM_PROCID"), ("Open MPI", OPEN_MPI, "OMPI_COMM_WORLD_RANK"),
     ("JAX_COORDINATOR_ADDRESS", VARIABLES, "JAX_PROCESS_ID")],
)  # fmt: skip
def test_processes_of_a_launcher_join_without_options(
    trained, environment, together, free_port, tiny_cohort, tmp_path, name, variables, rank
):
    """The run is through already: the processes join, restore together and end."""
    folder, _ = trained
    workdir = shutil.copytree(folder / "2x4", tmp_path / "run")
    where = {"JAX_COORDINATOR_PORT": str(free_port())}
    where |= {"JAX_COORDINATOR_ADDRESS": "localhost"} if variables is VARIABLES else {}
    environments = [
        environment(4, **variables, **where, **{rank: str(i)}, OMPI_COMM_WORLD_LOCAL_RANK="0") for i in range(2)
    ]
    said = together([[*TRAIN, *tiny_cohort.settings(), f"--workdir={workdir}"]] * 2, environments)
    assert f"2 processes, 8 devices (cpu); found by {name}" in said[0][1] and "resuming from step 8" in said[0][1]

"""gpus.sh and slurm.sh: processes that start together, save together, and start again; for real in the slow tests."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pathflip_jax.metrics import read_metrics

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

# srun: as many processes as asked for, on one node, with the variables by which JAX knows Slurm.
SRUN = """
import subprocess
value = lambda name: int(next(word.partition("=")[2] for word in argv if word.startswith(f"--{name}=")))
program = next(i for i, word in enumerate(argv) if not word.startswith("--"))
count = value("nodes") * value("ntasks-per-node")
shared = os.environ | {"SLURM_NTASKS": str(count), "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
steps = [
    subprocess.Popen(argv[program:], env=shared | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in range(count)
]
(HERE / "steps").write_text(" ".join(str(step.pid) for step in steps))
sys.exit(max(step.wait() % 256 for step in steps))
"""
# A trainer that ends as planned for its process: what to do in each attempt, a file per process.
TRAINER = """
import signal
process = os.environ.get("SLURM_PROCID") or argv[argv.index("--process_id") + 1]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
end = next_line(f"ends{process}", "0")
if end == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if end in ("hangs", "waits"):
    if end == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (HERE / f"waiting{process}").touch()
    time.sleep(60)
sys.exit(int(end))
"""
OPTIONS = ["--config", "demo"]


def wait_until(holds, process, seconds=30):
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def training(script) -> list[int]:
    """The training processes that a script is the parent of."""
    children = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    return [int(pid) for pid in children if "pathflip" in Path(f"/proc/{pid}/cmdline").read_text()]


def stop(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGTERM)


@pytest.fixture
def settings(tmp_path):
    return {"DATA": tmp_path, "WORKDIR": tmp_path / "run", "PAUSE": "0", "WAIT": "1", "MAX_RESTARTS": "2"}


@pytest.fixture
def trainer(stand_ins):
    stand_ins.add("pathflip", TRAINER)
    return stand_ins


def attempts(stand_ins):
    """The process numbers that each attempt started, in any order."""
    numbers = [call[call.index("--process_id") + 1] for call in stand_ins.calls("pathflip", "train")]
    return [sorted(numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


def test_one_process_a_gpu_found_by_nvidia_smi(trainer, settings):
    trainer.add("nvidia-smi", "print('GPU 0: H100\\nGPU 1: H100')")
    done = trainer.run("gpus.sh", *OPTIONS, **settings)
    assert done.returncode == 0, done.stderr
    assert attempts(trainer) == [["0", "1"]]
    for call in trainer.calls("pathflip"):
        assert call[4:8] == ["--coordinator", "localhost:8476", "--num_processes", "2"]
    trainer.add("nvidia-smi", "print('NVIDIA-SMI has failed'); sys.exit(9)")
    done = trainer.run("gpus.sh", *OPTIONS, **settings)
    assert done.returncode == 2 and "set GPUS" in done.stderr


@pytest.mark.parametrize(
    ("ends", "code", "count"),
    [
        ([(75, 75), (75, 75), (75, 75), (0, 0)], 0, 4),  # stops are no failures
        ([("killed", "hangs"), (0, 0)], 0, 2),  # one lost, the other waits for it
        ([(1, 1), (134, 1), (1, 137), (0, 0)], 137, 3),
        ([(2, 2)], 2, 1),
    ],
)
def test_the_processes_of_a_node_start_again_together(trainer, settings, ends, code, count):
    for process in range(2):
        trainer.plan(f"ends{process}", *(attempt[process] for attempt in ends))
    assert trainer.run("gpus.sh", *OPTIONS, **settings, GPUS=2).returncode == code
    assert attempts(trainer) == [["0", "1"]] * count


def test_sigterm_to_the_script_stops_its_processes_for_good(trainer, settings):
    trainer.plan("ends0", "waits")
    trainer.plan("ends1", "waits")
    process = trainer.start("gpus.sh", *OPTIONS, **settings, GPUS=2)
    wait_until(lambda: all((trainer.folder / f"waiting{i}").exists() for i in range(2)), process)
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75 and len(attempts(trainer)) == 1


def test_a_script_that_runs_may_be_edited(trainer, settings, tmp_path):
    """A run takes days, and bash reads a script as it goes."""
    script = Path(shutil.copytree(LAUNCH, tmp_path / "launch")) / "gpus.sh"
    trainer.plan("ends0", "waits", 0)
    process = trainer.start(str(script), *OPTIONS, **settings, GPUS=1)
    wait_until(lambda: (trainer.folder / "waiting0").exists(), process)
    script.write_text("".join(f"# {line}\nexit 9\n" for line in script.read_text().splitlines()))
    stop(training(process))
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and len(trainer.calls("pathflip")) == 2, err


@pytest.fixture
def slurm(trainer):
    for name in ("sbatch", "scontrol"):
        trainer.add(name)
    trainer.add("srun", SRUN)
    return trainer


def test_slurm_is_given_the_job(slurm, settings):
    done = slurm.run("slurm.sh", *OPTIONS, **settings, NODES=2, GPUS=4, SBATCH="--partition=gpu --account=lab")
    assert done.returncode == 0, done.stderr
    (call,) = slurm.calls()
    assert {"--requeue", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=TERM@300"} <= set(call)
    assert {"--partition=gpu", "--account=lab"} <= set(call)
    assert Path(call[-3]).name == "slurm.sh" and call[-2:] == OPTIONS


@pytest.mark.parametrize(
    ("ends", "restarts", "code", "requeued"),
    [
        ((0, 0), 0, 0, False),
        ((75, 75), 0, 0, True),
        ((75, 75), 99, 0, True),
        ((1, 134), 0, 0, True),
        ((1, 134), 2, 134, False),
        ((2, 2), 0, 2, False),
    ],
)
def test_the_job_is_requeued(slurm, settings, ends, restarts, code, requeued):
    for process in range(2):
        slurm.plan(f"ends{process}", ends[process])
    job = {"SLURM_JOB_ID": 17, "SLURM_RESTART_COUNT": restarts, "NODES": 1, "GPUS": 2}
    assert slurm.run("slurm.sh", *OPTIONS, **settings, **job).returncode == code
    stage, train = slurm.calls("srun")
    assert stage[-1] == "stage" and "--ntasks=1" in stage and "--wait=1" in train
    assert len(slurm.calls("pathflip", "train")) == 2
    assert slurm.calls("scontrol") == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_a_job_that_cannot_stage_does_not_train(slurm, settings):
    slurm.add("gcloud", "sys.exit(1)")
    job = {"SLURM_JOB_ID": 17, "NODES": 1, "GPUS": 2}
    slurm.run("slurm.sh", *OPTIONS, **settings | {"DATA": "gs://lab/cohort", "LOCAL": settings["WORKDIR"]}, **job)
    assert len(slurm.calls("srun")) == 1


STEPS = 100
TRAINING = [
    "--config", "align_base:smoke", f"--config.train.steps={STEPS}", "--config.train.save_every=1000",
    "--config.train.batch_size=4", "--config.data.regions=2", "--config.data.val_split=none",
    "--config.model.hidden=16", "--config.model.layers=1", "--config.model.embed_dim=16",
    "--config.data.records=records", "--config.data.texts=reports.jsonl", "--config.data.slides=slides.csv",
    "--config.data.tokenizer=vocabulary",
]  # fmt: skip
# Compiled once and soon: what is computed is of no interest here.
QUICK = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0, "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def finished(run: Path) -> bool:
    return [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_two_processes_of_a_node_train_stop_and_go_on(buckets, tmp_path):
    """From a bucket to the last step: staged, started, stopped by SIGTERM with exit code 75, started again."""
    run = tmp_path / "run"
    settings = {"DATA": "gs://lab/cohort", "LOCAL": tmp_path / "local", "WORKDIR": run, "GPUS": 2, "PORT": 18476}
    process = buckets.start("gpus.sh", *TRAINING, **settings, **QUICK)
    wait_until(lambda: read_metrics(run / "metrics.jsonl"), process, 300)
    trainers = training(process)
    assert len(trainers) == 2
    stop(trainers)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "stopped after saving: starting again" in err and "going on from step" in err
    assert finished(run) and any((run / "compiled").iterdir())


@pytest.mark.slow
def test_two_processes_of_a_slurm_job_train_are_requeued_and_go_on(buckets, tmp_path):
    """As Slurm does it: SIGTERM to the processes of the step, then the same script again."""
    buckets.add("srun", SRUN)
    buckets.add("scontrol")
    run = tmp_path / "run"
    settings = {"DATA": "gs://lab/cohort", "LOCAL": tmp_path / "local", "WORKDIR": run, "NODES": 1, "GPUS": 2}
    settings |= QUICK | {"SLURM_JOB_ID": 31}
    process = buckets.start("slurm.sh", *TRAINING, **settings)
    wait_until(lambda: read_metrics(run / "metrics.jsonl"), process, 300)
    stop([int(pid) for pid in (buckets.folder / "steps").read_text().split()])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and buckets.calls("scontrol") == [["scontrol", "requeue", "31"]], err
    assert 0 < len(read_metrics(run / "metrics.jsonl")) < STEPS
    done = buckets.run("slurm.sh", *TRAINING, **settings, SLURM_RESTART_COUNT=1)
    assert done.returncode == 0 and len(buckets.calls("scontrol")) == 1, done.stderr
    assert "going on from step" in done.stderr and "is staged" in done.stderr
    assert finished(run)

"""gpus.sh and slurm.sh: processes that start together, save together, and start again; for real in the slow tests."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pathflip_jax.monitoring.metrics import read_metrics

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
# One that saves a checkpoint, and no other.
GOES_ON = """
checkpoints = Path(argv[argv.index("--workdir") + 1]) / "checkpoints"
(checkpoints / "40").mkdir(parents=True, exist_ok=True)
sys.exit(75)
"""
OPTIONS = ["--config", "demo"]
JOB = ["job", str(LAUNCH)]  # what sbatch tells the script, which is then the job


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


EIGHT = "print('\\n'.join(f'GPU {i}: H100 (UUID: GPU-{i}a)' for i in range(8)))"
MIG = """
print("GPU 0: NVIDIA A100 (UUID: GPU-0a)", "GPU 1: NVIDIA A100 (UUID: GPU-1a)", sep="\\n")
print(*(f"  MIG 3g.20gb     Device  {i}: (UUID: MIG-3{i})" for i in range(2)), sep="\\n")
"""


def gpus_of(done) -> list[str]:
    """Commands of a dry run of gpus.sh: the variable that gives each process its GPU."""
    return [line.split()[1] for line in done.stdout.splitlines() if line.endswith("&")]


@pytest.mark.parametrize(
    ("smi", "variables", "gpus"),
    [
        (EIGHT, {"CUDA_VISIBLE_DEVICES": "2,3"}, ["CUDA_VISIBLE_DEVICES=2", "CUDA_VISIBLE_DEVICES=3"]),
        (EIGHT, {"CUDA_VISIBLE_DEVICES": "2, 3,5", "GPUS": "2"}, ["CUDA_VISIBLE_DEVICES=2", "CUDA_VISIBLE_DEVICES=3"]),
        (EIGHT, {"CUDA_VISIBLE_DEVICES": "GPU-5a"}, ["CUDA_VISIBLE_DEVICES=GPU-5a"]),
        (EIGHT, {"CUDA_VISIBLE_DEVICES": "MIG-GPU-5a/1/0"}, ["CUDA_VISIBLE_DEVICES=MIG-GPU-5a/1/0"]),
        (EIGHT, {"CUDA_VISIBLE_DEVICES": "6,-1,7", "GPUS": "all"}, ["CUDA_VISIBLE_DEVICES=6"]),
        (EIGHT, {"GPUS": "all"}, [f"CUDA_VISIBLE_DEVICES={i}" for i in range(8)]),
        (EIGHT, {"GPUS": "1"}, ["CUDA_VISIBLE_DEVICES=0"]),
        (MIG, {}, [f"CUDA_VISIBLE_DEVICES={name}" for name in ("0", "MIG-30", "MIG-31")]),
        ("sys.exit(9)", {"ROCR_VISIBLE_DEVICES": "4,5"}, ["ROCR_VISIBLE_DEVICES=4", "ROCR_VISIBLE_DEVICES=5"]),
        ("sys.exit(9)", {"GPUS": "2"}, ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]),
    ],
)
def test_a_process_is_given_one_of_the_gpus_that_may_be_used(trainer, settings, smi, variables, gpus):
    trainer.add("nvidia-smi", smi)
    done = trainer.run("gpus.sh", "--dry-run", *OPTIONS, **settings, **variables)
    assert gpus_of(done) == gpus and f"PROCESSES={len(gpus)} " in done.stdout, done.stderr
    assert ("a guess" in done.stderr) == (variables == {"GPUS": "2"})


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES= leaves no GPU"),
        ({"CUDA_VISIBLE_DEVICES": "", "GPUS": "2"}, "CUDA_VISIBLE_DEVICES= leaves no GPU"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "CUDA_VISIBLE_DEVICES=NoDevFiles leaves no GPU"),
        ({"CUDA_VISIBLE_DEVICES": "1,1"}, "CUDA_VISIBLE_DEVICES=1,1: 1 is listed twice"),
        ({"CUDA_VISIBLE_DEVICES": "all"}, "CUDA_VISIBLE_DEVICES=all: expected GPU numbers or UUIDs"),
        ({"CUDA_VISIBLE_DEVICES": "2,3", "GPUS": "4"}, "GPUS=4: found only 2 (2 3)"),
        ({"GPUS": "9"}, "GPUS=9: found only 8"),
        *(({"GPUS": text}, f"GPUS={text}: expected a whole number, 1 or more") for text in ("-1", "08", "2 ", "some")),
    ],
)
def test_gpus_that_may_not_be_used_or_are_not_there(trainer, settings, variables, message):
    trainer.add("nvidia-smi", EIGHT)
    done = trainer.run("gpus.sh", *OPTIONS, **settings, **variables)
    assert done.returncode == 2 and message in done.stderr and trainer.calls("pathflip") == []


def test_places_of_another_launcher_are_left_out(trainer, settings):
    elsewhere = {"JAX_COORDINATOR_ADDRESS": "other:1", "JAX_PROCESS_ID": "5", "WAIT_FOR": "other"}
    done = trainer.run("gpus.sh", *OPTIONS, **settings, GPUS=2, **elsewhere)
    assert done.returncode == 0 and attempts(trainer) == [["0", "1"]]
    for name, value in elsewhere.items():
        assert f"ignoring {name}={value} from the environment" in done.stderr


def test_starts_that_bring_the_run_no_further_come_to_an_end(trainer, settings):
    """Whatever made it stop after saving, at one step each time, will do so again."""
    trainer.plan("ends0", *[75] * 9)
    done = trainer.run("gpus.sh", *OPTIONS, **settings, GPUS=1, MAX_STARTS=2)
    assert done.returncode == 2 and len(trainer.calls("pathflip")) == 2
    assert "2 starts, and " in done.stderr and "is still at step 0: giving up" in done.stderr
    # Another launch begins to count anew, and so does a run that comes further.
    trainer.add("pathflip", GOES_ON)
    done = trainer.run("gpus.sh", *OPTIONS, **settings, GPUS=1, MAX_STARTS=2)
    assert done.returncode == 2 and "is still at step 40: giving up" in done.stderr
    assert len(trainer.calls("pathflip")) == 2 + 1 + 2


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
    assert call[-5:] == [str(LAUNCH / "slurm.sh"), "job", str(LAUNCH), *OPTIONS]


def test_options_of_sbatch_keep_their_spaces(slurm, settings):
    more = {"SBATCH": "--comment='my run' --mail-user=\"a b\"  --qos=x", "NAME": "my run"}
    assert slurm.run("slurm.sh", *OPTIONS, "--config.note=a b", **settings, **more).returncode == 0
    (call,) = slurm.calls("sbatch")
    assert {"--comment=my run", "--mail-user=a b", "--qos=x", "--job-name=my run", "--config.note=a b"} <= set(call)
    done = slurm.run("slurm.sh", *OPTIONS, **settings, SBATCH="--comment='my run")
    assert done.returncode == 2 and "SBATCH=--comment='my run: a quote is not closed" in done.stderr


def test_a_job_that_the_shell_is_in_is_left_alone(slurm, settings):
    """Of salloc, of a desktop session: neither trained in nor requeued, and the new job gets none of its variables."""
    slurm.add("sbatch", "(HERE / 'environment').write_text(' '.join(os.environ))")
    job = {"SLURM_JOB_ID": 999, "SLURM_NTASKS": 8, "SLURM_CPU_BIND": "cores", "SLURM_CONF": "/etc/slurm.conf"}
    job |= {"CUDA_VISIBLE_DEVICES": "3", "PMI_SIZE": 1}
    done = slurm.run("slurm.sh", *OPTIONS, **settings, **job, SBATCH_ACCOUNT="lab")
    assert done.returncode == 0 and [call[0] for call in slurm.calls()] == ["sbatch"]
    assert (
        "this shell is in job 999, which is left alone" in done.stderr and "SBATCH_ACCOUNT=lab from the" in done.stderr
    )
    names = (slurm.folder / "environment").read_text().split()
    assert [name for name in names if name.startswith("SLURM_")] == ["SLURM_CONF"] and "DATA" in names
    assert not {"CUDA_VISIBLE_DEVICES", "PMI_SIZE"} & set(names)
    done = slurm.run("slurm.sh", *JOB, *OPTIONS, **settings)
    assert done.returncode == 2 and "SLURM_JOB_ID is not set" in done.stderr


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
    assert slurm.run("slurm.sh", *JOB, *OPTIONS, **settings, **job).returncode == code
    stage, train = slurm.calls("srun")
    assert stage[-1] == "stage" and "--ntasks=1" in stage and "--wait=1" in train
    assert len(slurm.calls("pathflip", "train")) == 2
    assert slurm.calls("scontrol") == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_a_job_that_comes_no_further_is_not_requeued(slurm, settings):
    slurm.plan("ends0", *[75] * 9)
    job = {"SLURM_JOB_ID": 17, "NODES": 1, "GPUS": 1, "MAX_STARTS": 2}
    for count, code in ((1, 0), (2, 0), (2, 2)):
        assert slurm.run("slurm.sh", *JOB, *OPTIONS, **settings, **job).returncode == code
        assert len(slurm.calls("scontrol")) == len(slurm.calls("pathflip")) == count
    assert slurm.run("slurm.sh", *JOB, *OPTIONS, **settings, **job | {"SLURM_JOB_ID": 18}).returncode == 0


def test_a_job_that_cannot_stage_does_not_train(slurm, settings):
    slurm.add("gcloud", "sys.exit(1)")
    job = {"SLURM_JOB_ID": 17, "NODES": 1, "GPUS": 2}
    slurm.run("slurm.sh", *JOB, *OPTIONS, **settings | {"DATA": "gs://lab/cohort", "LOCAL": settings["WORKDIR"]}, **job)
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
QUICK = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0, "XLA_FLAGS": os.environ["XLA_FLAGS"]}


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
    assert "stopped after saving: starting again" in err and "resuming from step" in err
    assert finished(run) and any((run / "compiled").iterdir())


@pytest.mark.slow
def test_two_processes_of_a_slurm_job_train_are_requeued_and_go_on(buckets, tmp_path):
    """As Slurm does it: SIGTERM to the processes of the step, then the same script again."""
    buckets.add("srun", SRUN)
    buckets.add("scontrol")
    run = tmp_path / "run"
    settings = {"DATA": "gs://lab/cohort", "LOCAL": tmp_path / "local", "WORKDIR": run, "NODES": 1, "GPUS": 2}
    settings |= QUICK | {"SLURM_JOB_ID": 31}
    process = buckets.start("slurm.sh", *JOB, *TRAINING, **settings)
    wait_until(lambda: read_metrics(run / "metrics.jsonl"), process, 300)
    stop([int(pid) for pid in (buckets.folder / "steps").read_text().split()])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and buckets.calls("scontrol") == [["scontrol", "requeue", "31"]], err
    assert 0 < len(read_metrics(run / "metrics.jsonl")) < STEPS
    done = buckets.run("slurm.sh", *JOB, *TRAINING, **settings, SLURM_RESTART_COUNT=1)
    assert done.returncode == 0 and len(buckets.calls("scontrol")) == 1, done.stderr
    assert "resuming from step" in done.stderr and "is staged" in done.stderr
    assert finished(run)

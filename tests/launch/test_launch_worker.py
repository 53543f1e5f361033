"""Work of every host: data staged once and completely, a bucket run that outlives its host, processes that connect."""

import hashlib
import json
import os
import shutil
import signal
import time

import pytest

SETTINGS = {"DATA": "gs://lab/cohort"}
# A `pathflip train` that adds a line to its run, and ends as planned.
TRAINER = """
import signal
workdir = Path(argv[argv.index("--workdir") + 1])
workdir.mkdir(parents=True, exist_ok=True)
(HERE / "environment").write_text(json.dumps(dict(os.environ) | {"cwd": os.getcwd()}))
with open(workdir / "metrics.jsonl", "a") as out:
    out.write("{}\\n")
(workdir / "checkpoints/4.orbax-checkpoint-tmp-1").mkdir(parents=True, exist_ok=True)
(workdir / "checkpoints/4.orbax-checkpoint-tmp-1/array").write_text("half")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
end = next_line("ends", "0")
if end == "waits":
    (HERE / "waiting").touch()
    time.sleep(60)
sys.exit(int(end))
"""


def copy_of(local, name="data-cohort", bucket="lab"):
    """The folder on a host's disk for gs://lab/cohort, or for gs://lab/runs/base."""
    url = f"gs://{bucket}/{'cohort' if name == 'data-cohort' else 'runs/base'}"
    return local / f"pathflip-{name}-{os.getuid()}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def staged(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copies(buckets):
    """Of the copies so far, those that carried records."""
    return [call for call in buckets.calls("gcloud", "storage", "rsync") if call[-2].endswith("/records")]


@pytest.fixture
def local(tmp_path):
    return tmp_path / "local"


def test_data_is_staged_once(buckets, local):
    source, folder = buckets.bucket("gs://lab/cohort"), copy_of(local)
    assert buckets.run("worker.sh", "stage", **SETTINGS, LOCAL=local).returncode == 0
    assert staged(folder) == staged(source) and len(copies(buckets)) == 1
    # New reports come along, records are not looked at again.
    (source / "reports.jsonl").write_text("{}\n")
    (source / "slides.csv").unlink()
    done = buckets.run("worker.sh", "stage", DATA="gs://lab/cohort/", LOCAL=local)
    assert done.returncode == 0 and "is staged" in done.stderr
    assert staged(folder) == staged(source) and len(copies(buckets)) == 1


def test_a_copy_that_ended_halfway_is_gone_on_with_and_never_seen(buckets, local):
    buckets.plan("copies", 2)
    assert buckets.run("worker.sh", "stage", **SETTINGS, LOCAL=local).returncode == 1
    folder = copy_of(local)
    assert not (folder / "records").exists() and len(staged(folder / "records.partial")) == 2
    assert buckets.run("worker.sh", "stage", **SETTINGS, LOCAL=local).returncode == 0
    assert staged(folder) == staged(buckets.bucket("gs://lab/cohort"))


def test_other_records_replace_those_that_are_staged(buckets, local):
    assert buckets.run("worker.sh", "stage", **SETTINGS, LOCAL=local).returncode == 0
    source = buckets.bucket("gs://lab/cohort") / "records"
    manifest = json.loads((source / "manifest.json").read_text())
    gone = manifest["shards"].pop()["name"]
    for path in source.glob(f"{gone}*"):
        path.unlink()
    (source / "manifest.json").write_text(json.dumps(manifest))
    assert buckets.run("worker.sh", "stage", **SETTINGS, LOCAL=local).returncode == 0
    assert staged(copy_of(local) / "records") == staged(source)


@pytest.mark.parametrize("damage", ["missing", "short"])
def test_a_bucket_that_is_only_half_filled_is_refused(buckets, local, damage):
    shard = sorted((buckets.bucket("gs://lab/cohort") / "records").glob("*tfrecord-00001-of-*"))
    shard = shard or sorted((buckets.bucket("gs://lab/cohort") / "records").glob("*tfrecord*"))
    shard = next(path for path in shard if path.suffix != ".idx")
    shard.unlink() if damage == "missing" else shard.write_bytes(shard.read_bytes()[:-1])
    done = buckets.run("worker.sh", "stage", **SETTINGS, LOCAL=local)
    assert done.returncode == 1 and f"{shard.name}: " in done.stderr and "bytes" in done.stderr
    assert not (copy_of(local) / "records").exists()


def test_a_bucket_of_the_same_name_has_a_folder_of_its_own(buckets, local):
    shutil.copytree(buckets.bucket("gs://lab/cohort"), buckets.bucket("gs://other/cohort"))
    (buckets.bucket("gs://other/cohort") / "reports.jsonl").write_text("{}\n")
    for bucket in ("lab", "other"):
        assert buckets.run("worker.sh", "stage", DATA=f"gs://{bucket}/cohort", LOCAL=local).returncode == 0
    for bucket in ("lab", "other"):
        assert staged(copy_of(local, bucket=bucket)) == staged(buckets.bucket(f"gs://{bucket}/cohort"))
    assert local.stat().st_mode & 0o1777 == 0o1777  # other users of the host keep theirs beside it


def test_records_in_use_are_not_replaced_and_a_copy_that_fails_leaves_them(buckets, local):
    buckets.add("pathflip", TRAINER)
    buckets.plan("ends", "waits")
    settings = SETTINGS | {"LOCAL": local}
    assert buckets.run("worker.sh", "stage", **settings).returncode == 0
    before = staged(copy_of(local) / "records")
    manifest = buckets.bucket("gs://lab/cohort") / "records/manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    process = buckets.start("worker.sh", "train", "--config", "demo", **settings, WORKDIR=local / "run")
    deadline = time.monotonic() + 30
    while not (buckets.folder / "waiting").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    done = buckets.run("worker.sh", "stage", **settings)
    assert done.returncode == 2 and "a run on this host still reads the earlier copy" in done.stderr
    assert staged(copy_of(local) / "records") == before
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    buckets.plan("copies", 1)
    assert buckets.run("worker.sh", "stage", **settings).returncode == 1
    assert staged(copy_of(local) / "records") == before
    assert buckets.run("worker.sh", "stage", **settings).returncode == 0
    assert staged(copy_of(local) / "records") == staged(manifest.parent)


def test_unfinished_records_are_refused(buckets, local):
    (buckets.bucket("gs://lab/cohort") / "records/manifest.json").unlink()
    done = buckets.run("worker.sh", "stage", **SETTINGS, LOCAL=local)
    assert done.returncode == 2 and "gs://lab/cohort/records/manifest.json cannot be read" in done.stderr


def test_a_folder_is_read_in_place(buckets, tmp_path):
    buckets.add("pathflip", TRAINER)
    settings = {"DATA": tmp_path, "WORKDIR": tmp_path / "run"}
    assert buckets.run("worker.sh", "stage", **settings).returncode == 0
    assert buckets.run("worker.sh", "train", "--config", "a b", **settings).returncode == 0
    assert buckets.calls("gcloud") == []
    assert buckets.calls("pathflip") == [["pathflip", "train", "--config", "a b", "--workdir", f"{tmp_path}/run"]]
    environment = json.loads((buckets.folder / "environment").read_text())
    assert environment["cwd"] == str(tmp_path)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == f"{tmp_path}/run/compiled"


def test_a_process_is_told_of_the_others_and_waits_for_their_names(stand_ins, tmp_path):
    stand_ins.add("pathflip", TRAINER)
    stand_ins.add("getent", "sys.exit(int(next_line('names', '0')))")
    stand_ins.plan("names", 2, 2, 0)
    settings = {"DATA": tmp_path, "WORKDIR": tmp_path / "run", "COMPILATION_CACHE": "/share/compiled"}
    place = {"COORDINATOR": "a-0.a:8476", "PROCESSES": "2", "PROCESS": "1", "WAIT_FOR": "a-0.a a-1.a"}
    assert stand_ins.run("worker.sh", "train", "--config", "demo", **settings, **place).returncode == 0
    assert [call[-1] for call in stand_ins.calls("getent")] == ["a-0.a", "a-0.a", "a-0.a", "a-1.a"]
    (call,) = stand_ins.calls("pathflip", "train")
    assert call[4:10] == ["--coordinator", "a-0.a:8476", "--num_processes", "2", "--process_id", "1"]
    environment = json.loads((stand_ins.folder / "environment").read_text())
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/share/compiled"


def test_a_host_that_gets_no_name_is_not_waited_for_without_end(stand_ins, tmp_path):
    stand_ins.add("pathflip", TRAINER)
    stand_ins.add("getent", "sys.exit(2)")
    place = {"COORDINATOR": "a-0.a:8476", "PROCESSES": "2", "PROCESS": "1", "WAIT_FOR": "a-0.a a-1.a"}
    settings = {"DATA": tmp_path, "WORKDIR": tmp_path / "run", "WAIT_SECONDS": 1}
    done = stand_ins.run("worker.sh", "train", "--config", "demo", **settings, **place)
    assert done.returncode == 75 and "a-0.a has no address after 1 s" in done.stderr and not stand_ins.calls("pathflip")


@pytest.mark.parametrize("checkpoints", [True, False])
def test_starts_of_a_launch_are_counted_until_the_run_comes_further(stand_ins, tmp_path, checkpoints):
    """By its checkpoints; where these lie elsewhere, by the farthest step in its metrics."""
    stand_ins.add("pathflip", "sys.exit(75)")
    run = tmp_path / "run"

    def start(step, **more):
        run.mkdir(exist_ok=True)
        if checkpoints:
            (run / f"checkpoints/{step}").mkdir(parents=True, exist_ok=True)
            (run / "checkpoints/damaged-99").mkdir(exist_ok=True)
        else:
            (run / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2.5}}\n{{"step": {step}, "loss": 2.5}}\n')
        settings = {"DATA": tmp_path, "WORKDIR": run, "LAUNCH_ID": "a", "MAX_STARTS": 2, "PROCESS": 0} | more
        return stand_ins.run("worker.sh", "train", "--config", "demo", **settings).returncode

    assert [start(8), start(8), start(8)] == [75, 75, 2]
    assert [start(9), start(9 if checkpoints else 3), start(9)] == [75, 75, 2]  # steps run again bring it no further
    assert [start(9, LAUNCH_ID="b"), start(9, LAUNCH_ID="b", PROCESS=1), start(9, LAUNCH_ID="", MAX_STARTS=1)] == [
        75
    ] * 3
    assert start(9, MAX_STARTS=0) == 75


def test_a_run_on_a_bucket_outlives_its_host(buckets, local):
    buckets.add("pathflip", TRAINER)
    buckets.plan("ends", 75, 0)
    settings = SETTINGS | {"WORKDIR": "gs://lab/runs/base"}
    assert buckets.run("worker.sh", "stage", **settings, LOCAL=local).returncode == 0
    assert buckets.run("worker.sh", "train", "--config", "demo", **settings, LOCAL=local).returncode == 75
    kept = buckets.bucket("gs://lab/runs/base")
    assert set(staged(kept)) == {"metrics.jsonl", "holder"}  # nothing half saved
    shutil.rmtree(local)
    assert buckets.run("worker.sh", "stage", **settings, LOCAL=local).returncode == 0
    assert buckets.run("worker.sh", "train", "--config", "demo", **settings, LOCAL=local).returncode == 0
    assert (kept / "metrics.jsonl").read_text() == "{}\n{}\n"


def test_a_host_that_was_overtaken_fetches_and_one_that_was_not_does_not(buckets, tmp_path):
    """Three starts on disk a, two on b, one on a: every start finds the state of the one before."""
    buckets.add("pathflip", TRAINER)
    settings = {"DATA": tmp_path, "WORKDIR": "gs://lab/runs/base"}
    for number, disk in enumerate("aaabba"):
        done = buckets.run("worker.sh", "train", "--config", "demo", **settings, LOCAL=tmp_path / disk)
        assert done.returncode == 0, done.stderr
        assert (copy_of(tmp_path / disk, "run-base") / "metrics.jsonl").read_text() == "{}\n" * (number + 1)
    assert len([call for call in buckets.calls("gcloud") if call[-1].endswith(".partial")]) == 3


def test_a_run_that_cannot_be_fetched_is_not_begun_anew(buckets, local):
    buckets.add("pathflip", TRAINER)
    settings = SETTINGS | {"WORKDIR": "gs://lab/runs/base"}
    assert buckets.run("worker.sh", "stage", **settings, LOCAL=local).returncode == 0
    for number in range(3):
        path = buckets.bucket("gs://lab/runs/base") / f"checkpoints/{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    buckets.plan("copies", 2)
    assert buckets.run("worker.sh", "train", "--config", "demo", **settings, LOCAL=local).returncode == 1
    assert buckets.calls("pathflip") == []


def test_a_run_is_copied_while_it_goes_on_and_after_sigterm(buckets, local):
    buckets.add("pathflip", TRAINER)
    buckets.plan("ends", "waits")
    settings = SETTINGS | {"WORKDIR": "gs://lab/runs/base", "LOCAL": local}
    assert buckets.run("worker.sh", "stage", **settings).returncode == 0
    buckets.plan("copies", 0, 1, 1)  # fetched whole; twice only one file is copied back, the holder
    process = buckets.start("worker.sh", "train", "--config", "demo", **settings, BACKUP_SECONDS="0.1")
    kept = buckets.bucket("gs://lab/runs/base/metrics.jsonl")
    deadline = time.monotonic() + 30
    while not (kept.exists() and (buckets.folder / "waiting").exists()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (copy_of(local, "run-base") / "saved").touch()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    process.communicate()
    assert (kept.parent / "saved").exists()


def test_a_run_that_another_process_works_on_is_not_touched(buckets, local):
    """Even where another host went on with it since, and its copy here would be fetched anew."""
    buckets.add("pathflip", TRAINER)
    buckets.plan("ends", "waits")
    settings = SETTINGS | {"WORKDIR": "gs://lab/runs/base", "LOCAL": local}
    assert buckets.run("worker.sh", "stage", **settings).returncode == 0
    process = buckets.start("worker.sh", "train", "--config", "demo", **settings)
    deadline = time.monotonic() + 30
    while not (buckets.folder / "waiting").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    (buckets.bucket("gs://lab/runs/base") / "holder").write_text("elsewhere")
    buckets.add("flock", "sys.exit(os.waitstatus_to_exitcode(os.system(f'/usr/bin/flock -n {argv[-1]}')))")
    done = buckets.run("worker.sh", "train", "--config", "demo", **settings)
    assert done.returncode == 2 and "the copy of gs://lab/runs/base on this host, is in use" in done.stderr
    assert (copy_of(local, "run-base") / "metrics.jsonl").exists()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    process.communicate()


def test_installing_takes_the_locked_packages(stand_ins):
    done = stand_ins.run("worker.sh", "--dry-run", "install", "tpu")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "uv==" in lines[0] and "--python 3.12" in lines[1]
    assert "requirements/demo-3.12.txt" in lines[2] and lines[2].endswith("[tpu]'") and "--exclude-newer 20" in lines[2]
    assert "expected install, stage or train" in stand_ins.run("worker.sh", "go").stderr

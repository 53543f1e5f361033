"""Preparation on Apache Beam: byte-identical to a single machine's output, whatever process dies."""

import contextlib
import importlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from safetensors.numpy import save_file
from vision_weights import timm_weights

from data_prep import build
from data_prep.jobs import prepare_slide
from data_prep.plan import make_plan
from data_prep.settings import ImportSettings, PrepareSettings
from data_prep.slide_files import find_slides
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.records.verify import verify
from pathflip_jax.vision.recipes import RECIPES

pytest.importorskip("apache_beam", reason="needs Apache Beam: pip install pathflip-jax[beam]")
pytestmark = pytest.mark.slow  # a pipeline takes seconds to start, one of several processes more

SMALL = {"patch_size": 64, "edge_um": 64.0, "slides_per_shard": 2, "workers": 2}
OPTIONS = ["--patch-size=64", "--edge-um=64", "--slides-per-shard=2"]
BEAM_WORKER = f"{sys.executable} -m apache_beam.runners.worker.sdk_worker_main"  # not the shell around it
TWO_WORKERS = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]


def prepare(slides, out, **settings):
    return build.prepare(slides, out, PrepareSettings(**settings))


def import_features(folder, out, **settings):
    return build.import_features(folder, out, ImportSettings(**settings))


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """Five slides, the second of them damaged."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(5):
        image = np.full((448, 512, 3), 242, np.uint8)
        image[:384, :384] = np.random.default_rng(number).integers([150, 70, 130], [210, 130, 190], (384, 384, 3))
        options = {"photometric": "rgb", "tile": (128, 128), "metadata": None, "compression": "deflate"}
        resolution = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(folder / f"S{number}.tiff", image, **resolution, **options)
    (folder / "S1.tiff").write_text("not a slide")
    return folder


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """The records that one machine makes of the slides."""
    out = tmp_path_factory.mktemp("whole") / "records"
    return out, prepare(slides, out, **SMALL)


def _files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of records, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _command(slides: Path, out: Path, *beam: str) -> list[str]:
    return [sys.executable, "-m", "pathflip_jax.cli", "prepare", str(slides), "--out", str(out), *OPTIONS, *beam]


def _mended(slides: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(slides, tmp_path / "slides"))
    shutil.copy(folder / "S0.tiff", folder / "S1.tiff")
    return folder


def test_one_process_writes_what_one_machine_writes(slides, whole, tmp_path):
    out, (alone, report) = tmp_path / "records", whole
    found = prepare(slides, out, beam=[], **SMALL)
    assert _files(out) == _files(alone)
    assert (found.done, found.failed, found.finished) == (report.done, report.failed, True)
    assert [failure.slide for failure in found.failed] == ["S1"] and found.failed
    assert found.timings.patches == report.timings.patches == 4 * 36
    assert (
        set(found.timings.seconds) == {"tissue", "read", "wait", "encode", "write"} and found.timings.peak_bytes > 5e7
    )


def test_two_processes_write_what_one_machine_writes(slides, whole, tmp_path):
    out = tmp_path / "records"
    command = _command(slides, out, "--json", "--beam", *TWO_WORKERS)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr  # S1 is no slide
    assert _files(out) == _files(whole[0])
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["done"] == ["S0", "S2", "S3", "S4"] and [row["slide"] for row in said["failed"]] == ["S1"]


def test_second_run_does_only_what_is_missing(slides, whole, tmp_path, monkeypatch):
    out = Path(shutil.copytree(whole[0], tmp_path / "records"))
    folder = _mended(slides, tmp_path)
    kept = (out / "pathflip-00001.tfrecord").stat().st_mtime_ns
    (out / "pathflip-00002.tfrecord").unlink()
    found = prepare(folder, out, beam=[], **SMALL)
    assert found.done == ["S1", "S4"] and found.skipped == ["S0", "S2", "S3"] and not found.failed
    assert (out / "pathflip-00001.tfrecord").stat().st_mtime_ns == kept
    prepare(folder, tmp_path / "alone", **SMALL)
    assert _files(out) == _files(tmp_path / "alone")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert not prepare(folder, out, beam=[], **SMALL).done  # nothing to do: no pipeline is started


def test_feature_files_of_two_cohorts(tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for number in range(6):
        width = 9 if number in (1, 4) else 8  # of another encoder, in the first and the last shard
        with h5py.File(folder / f"S{number}.h5", "w") as file:
            file["features"] = np.random.default_rng(number).normal(size=(12, width)).astype(np.float32)
            file["coords"] = np.stack(np.divmod(np.arange(12), 4), 1) * 256
            file["coords"].attrs.update({"patch_size_level0": 256, "level0_magnification": 20.0})
    alone = import_features(folder, tmp_path / "alone", slides_per_shard=2, workers=2)
    found = import_features(folder, tmp_path / "records", slides_per_shard=2, beam=[])
    assert [failure.slide for failure in found.failed] == ["S1", "S4"] and "feature_dim 9" in found.failed[0].error
    assert found.failed == alone.failed and _files(tmp_path / "records") == _files(tmp_path / "alone")


@pytest.fixture()
def dying(tmp_path, monkeypatch):
    """A module of work that goes wrong, which worker processes can import."""
    lines = ["import os", "from data_prep.jobs import Outcome, prepare_slide", "def killed(job):"]
    lines += ["    if job.slide_id == 'S3':", "        os.kill(os.getpid(), 9)", "    return prepare_slide(job)"]
    lines += ["def full(job):", "    return Outcome('No space left on device', fatal=True)"]
    (tmp_path / "dying_work.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("dying_work")
    del sys.modules["dying_work"]


def _plan(slides: Path, out: Path, dying_out: Path):
    """The plan by which `whole` was made, for a folder begun with the same settings."""
    settings = json.loads((out / "plan.json").read_text())["settings"]
    settings.pop("slides_per_shard")
    plan = make_plan(find_slides(slides), dying_out, settings, slides_per_shard=2)
    plan.parts.mkdir()
    return plan


def test_a_slide_that_kills_its_process_fails_alone(slides, whole, tmp_path, dying):
    from data_prep.beam import run_on_beam

    plan = _plan(slides, whole[0], tmp_path / "records")
    progress = run_on_beam(plan, dying.killed, [])
    assert sorted(progress.done) == ["S0", "S2", "S4"]
    assert {failure.slide: "worker process died" in failure.error for failure in progress.failed} == {
        "S1": False, "S3": True,
    }  # fmt: skip


def test_a_full_disk_ends_the_pipeline_and_says_so(slides, whole, tmp_path, dying):
    from data_prep.beam import run_on_beam

    plan = _plan(slides, whole[0], tmp_path / "records")
    with pytest.raises(OSError, match="Beam pipeline failed: .*No space left.*run the same command again"):
        run_on_beam(plan, dying.full, [])
    assert not list(plan.out.glob("*.tfrecord"))


def test_an_encoder_that_does_not_load_is_said_once(slides, tmp_path):
    with pytest.raises(OSError, match="Beam pipeline failed: .*larger patch size"):
        prepare(slides, tmp_path / "records", beam=[], **SMALL | {"patch_size": 16})
    with pytest.raises(ValueError, match="Unexpected pipeline runner"):
        prepare(slides, tmp_path / "records", beam=["--runner=Nonsense"], **SMALL)


def test_no_features_travel_between_machines(slides, whole, tmp_path):
    from data_prep.beam import _SlideToPart

    plan = _plan(slides, whole[0], tmp_path / "records")
    step = _SlideToPart(prepare_slide)
    step.setup()
    try:
        said = [list(step.process(job)) for job in plan.jobs]
    finally:
        step.teardown()
    sizes = [job.part.stat().st_size for job in plan.jobs if job.part.exists()]
    assert min(sizes) > 10_000 and max(len(pickle.dumps(job)) for job in plan.jobs) < 1000
    assert max(len(pickle.dumps(element)) for element in said) < 2000


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("whom", ["the command", "a Beam worker"])
def test_a_killed_run_is_continued(slides, whole, tmp_path, whom):
    out, deadline = tmp_path / "records", time.monotonic() + 120
    with _under_way(slides, tmp_path) as (process, marked):
        while not list(out.glob(".parts/*.tfrecord")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        workers = _beam_workers(marked())
        assert process.poll() is None and workers, (tmp_path / "log").read_text()
        os.kill(process.pid if whom == "the command" else workers[0], signal.SIGKILL)
        assert process.wait(timeout=120) == (-signal.SIGKILL if whom == "the command" else 2)
        while marked() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not marked()
    if whom == "a Beam worker":
        assert "Beam pipeline failed" in (tmp_path / "log").read_text().splitlines()[-1]
    for left in out.glob(".parts/*.tmp"):  # what was being written might be another writer's, until an hour has passed
        os.utime(left, (0, 0))
    begun = {path.stem for path in out.glob(".parts/*.tfrecord")}
    assert begun and not (out / "manifest.json").exists()
    found = prepare(slides, out, beam=[], **SMALL)
    assert found.timings.patches == 36 * (4 - len(begun)) and len(Records(out)) == 4 and verify(out) == []
    assert _files(out) == _files(whole[0])


DIES_AT_ITS_END = """
import os, signal, sys
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
import data_prep.beam
with beam.Pipeline(options=PipelineOptions(sys.argv[1:])) as pipeline:
    _ = pipeline | beam.Create([1, 2]) | beam.Reshuffle() | beam.Map(lambda x: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_no_answer_of_a_dead_worker_is_waited_for():
    """A stage that gives nothing to read: Beam alone would not notice."""
    command = [sys.executable, "-c", DIES_AT_ITS_END, *TWO_WORKERS]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and "a worker process of the DirectRunner died" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_worker_that_dies_before_it_is_there_ends_the_run(slides, tmp_path):
    deadline, workers = time.monotonic() + 120, []
    with _under_way(slides, tmp_path) as (process, marked):
        while not workers and process.poll() is None and time.monotonic() < deadline:
            workers = _beam_workers(marked())
        assert process.poll() is None and workers, (tmp_path / "log").read_text()
        os.kill(workers[0], signal.SIGKILL)
        assert process.wait(timeout=120) == 2
    assert "Beam pipeline failed" in (tmp_path / "log").read_text().splitlines()[-1]


@contextlib.contextmanager
def _under_way(slides: Path, tmp_path: Path):
    """The command on two Beam workers, and what gives its living processes; none of them outlives the block."""
    mark = f"PATHFLIP_TEST_MARK={tmp_path}"
    environment = os.environ | dict([mark.split("=", 1)])
    command = _command(slides, tmp_path / "records", "--beam", *TWO_WORKERS)
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        yield process, lambda: _processes(mark)
    finally:
        for pid in _processes(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _beam_workers(processes: dict[int, str]) -> list[int]:
    return [pid for pid, command in processes.items() if command.startswith(BEAM_WORKER)]


def _processes(mark: str) -> dict[int, str]:
    """Process id to command of the living processes with this mark in their environment."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found[int(path.parent.name)] = (path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def test_registered_encoder_is_loaded_by_each_worker(slides, tmp_path):
    weights = tmp_path / "model.safetensors"
    save_file(timm_weights(RECIPES["kaiko_vits16"].network, dtype=np.float16), weights)
    settings = {"encoder": "kaiko_vits16", "weights": weights, "workers": 1}
    (tmp_path / "slides").mkdir()
    shutil.copy(slides / "S0.tiff", tmp_path / "slides")
    here = prepare(tmp_path / "slides", tmp_path / "here", **settings)
    beam = prepare(tmp_path / "slides", tmp_path / "beam", **settings | {"beam": []})
    assert here.done == beam.done == ["S0"] and here.device is not None and beam.device is None
    assert _files(tmp_path / "here") == _files(tmp_path / "beam")

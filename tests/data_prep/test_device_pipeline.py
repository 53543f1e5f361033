"""Slides to features through one process that owns the devices: equality with the per-slide path, faults, resume."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile

from data_prep import build, device_pipeline, jobs, readers, reading
from data_prep.device_batches import EncoderQueue
from data_prep.device_pipeline import DevicePipeline
from data_prep.device_usage import DeviceClock, DeviceUsage
from data_prep.jobs import Job
from data_prep.settings import PrepareSettings
from data_prep.slides import open_slide
from data_prep.tiling import read_patches, tile_slide
from pathflip_jax import cli
from pathflip_jax.data.records.recipe import read_recipe
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.records.verify import verify
from pathflip_jax.runtime.workers import Worker

SMALL = {"patch_size": 64, "edge_um": 64.0, "slides_per_shard": 2, "workers": 2}
SHARED = Path("/dev/shm")


class Means:
    """Device encoder of the tests: means of a patch's channels and of its quarters, and what it was given."""

    def __init__(self, name: str = "means", batch_size: int = 20, scale: float = 1.0, smallest: int = 1) -> None:
        self.name, self.dim, self.batch_size, self._smallest = name, 15, batch_size, smallest
        self._run = jax.jit(lambda patches: _means(patches) * scale)
        self.shapes, self.failures = [], []

    def __call__(self, patches):
        return np.asarray(self._run(patches))

    def dispatch(self, patches):
        assert len(patches) == self.batch_size
        self.shapes.append(patches.shape)
        if self.failures:
            raise self.failures.pop(0)
        return self._run(patches)

    def halve(self):
        if self.batch_size // 2 < self._smallest:
            return False
        self.batch_size //= 2
        return True


def _means(patches):
    pixels = patches.astype(jnp.float32) / 255
    number, size = pixels.shape[:2]
    quarters = pixels.reshape(number, 2, size // 2, 2, size // 2, 3).mean((2, 4)).reshape(number, 12)
    return jnp.concatenate([pixels.mean((1, 2)), quarters], 1)


@pytest.fixture(scope="module")
def slides(tmp_path_factory, draw, write_tiff) -> Path:
    """Five slides of 12 to 36 patches, none of which fills a whole number of batches."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(5):
        image = draw(448, 512, (0, 128 + 64 * number, 0, 384), seed=number)
        write_tiff(folder / f"S{number}.tiff", image, downsamples=(1, 4))
    return folder


@pytest.fixture
def use(monkeypatch):
    """Makes encoders known by their names, as devices' ones."""

    def use(*encoders):
        known = {encoder.name: encoder for encoder in encoders}
        monkeypatch.setattr(build, "runs_on_device", known.__contains__)
        monkeypatch.setattr(build, "load_encoder", lambda name, half, batch_size, weights: known[name])

    return use


@pytest.fixture
def prepare_by_slide(monkeypatch):
    """Prepares slides as with an encoder that each worker holds, here in this process."""

    def prepare(encoder, folder, out, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(build, "runs_on_device", lambda name: False)
            patch.setattr(build, "run_each", lambda work, jobs, workers: ((job, work(job)) for job in jobs))
            patch.setattr(jobs, "load_encoder", lambda name, half, weights: encoder)
            jobs._loaded.cache_clear()
            report = build.prepare(folder, out, PrepareSettings(encoder=encoder.name, **SMALL | settings))
            jobs._loaded.cache_clear()
            return report

    return prepare


def prepare(folder, out, encoder="means", **settings):
    return build.prepare(folder, out, PrepareSettings(encoder=encoder, **SMALL | settings))


def _bytes(folder: Path) -> dict[str, bytes]:
    names = (path for pattern in ("*.tfrecord", "*.idx", "manifest.json") for path in folder.glob(pattern))
    return {path.name: path.read_bytes() for path in names}


@pytest.fixture(autouse=True)
def rings(monkeypatch):
    """Shared memory of the readers of a test; none of it, and no thread, outlives a run."""
    made, threads = [], set(threading.enumerate())

    class Recorded(SharedMemory):
        def __init__(self, **how) -> None:
            super().__init__(**how)
            made.append(SHARED / self.name)

    monkeypatch.setattr(readers, "SharedMemory", Recorded)
    yield made
    assert not _there(made)
    assert not [thread for thread in set(threading.enumerate()) - threads if "ThreadPool" in thread.name]


def _there(rings: list[Path]) -> list[Path]:
    return [ring for ring in rings if ring.exists()]


def test_records_are_those_of_the_per_slide_path(slides, tmp_path, use, prepare_by_slide):
    encoder = Means()
    use(encoder)
    expected = prepare_by_slide(encoder, slides, tmp_path / "expected")
    encoder.shapes.clear()
    report = prepare(slides, tmp_path / "records")
    assert report.done == expected.done == [f"S{number}" for number in range(5)] and report.finished
    assert _bytes(tmp_path / "records") == _bytes(tmp_path / "expected") and verify(tmp_path / "records") == []
    patches = 6 * (2 + 3 + 4 + 5 + 6)
    assert report.timings.patches == report.device.encoded == report.device.decoded == patches
    # One batch to check the encoder; then only the last one is not full, so that slides share batches.
    assert encoder.shapes == [(20, 64, 64, 3)] * (1 + patches // 20)
    assert 0 < report.device.busy_share <= 1 and report.device.patches_per_second > 0
    assert f"devices: {report.device.patches_per_second:.0f} patches/s, busy " in report.summary()
    assert set(report.timings.seconds) == {"tissue", "read", "write"} and report.timings.peak_bytes > 5e7


def test_second_run_does_only_what_is_missing(slides, tmp_path, use):
    encoder, out = Means(), tmp_path / "records"
    use(encoder)
    prepare(slides, out)
    before = _bytes(out)
    (out / "pathflip-00001.tfrecord").unlink()
    report = prepare(slides, out)
    assert report.done == ["S2", "S3"] and report.skipped == ["S0", "S1", "S4"] and _bytes(out) == before
    encoder.shapes.clear()
    again = prepare(slides, out)
    assert not again.done and again.finished and not encoder.shapes and again.device.encoded == 0


def test_run_that_ends_early_is_continued(slides, tmp_path, use, monkeypatch, rings):
    encoder, out = Means(batch_size=4), tmp_path / "records"
    use(encoder)
    prepare(slides, tmp_path / "whole")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build.Assembly, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(slides, out, workers=1)
    assert rings and not _there(rings)
    parts = {path.stem for path in out.glob(".parts/*.tfrecord")}
    report = prepare(slides, out)
    assert parts and report.finished and report.timings.patches < 120 and _bytes(out) == _bytes(tmp_path / "whole")


def test_bad_slides_are_listed_and_the_rest_goes_on(slides, tmp_path, use, write_tiff, draw):
    folder, out = Path(shutil.copytree(slides, tmp_path / "slides")), tmp_path / "records"
    (folder / "S0.tiff").write_text("not a slide")
    write_tiff(folder / "S1.tiff", draw(448, 512))
    use(Means())
    report = prepare(folder, out)
    assert report.done == ["S2", "S3", "S4"] and [failure.slide for failure in report.failed] == ["S0", "S1"]
    assert "OpenSlide cannot open it" in report.failed[0].error and "no tissue" in report.failed[1].error
    assert [row["slide"] for row in json.loads((out / "failures.json").read_text())] == ["S0", "S1"]
    strict = prepare(folder, tmp_path / "strict", strict=True)
    assert strict.failed and not strict.finished and "--strict" in strict.notes[-1]


def test_slide_that_breaks_in_mid_read_loses_only_itself(slides, tmp_path, use):
    """Its upper half is read and in a batch with other slides' patches when its lower half proves to be damaged."""
    folder = Path(shutil.copytree(slides, tmp_path / "slides"))
    with tifffile.TiffFile(folder / "S4.tiff") as file:
        start, size = (values[9] for values in (file.pages[0].dataoffsets, file.pages[0].databytecounts))
    data = bytearray((folder / "S4.tiff").read_bytes())
    data[start : start + size] = bytes(size)
    (folder / "S4.tiff").write_bytes(data)
    with open_slide(folder / "S4.tiff") as slide, pytest.raises(OSError, match="cannot be read"):
        list(read_patches(slide, tile_slide(slide, 64)))
    encoder = Means(batch_size=8)
    use(encoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_pipeline, "slot_bytes", lambda jobs: 3 * 64**2 * 4)  # four patches in a slot
        report = prepare(folder, tmp_path / "records")
    assert report.done == ["S0", "S1", "S2", "S3"] and report.device.encoded > 6 * (2 + 3 + 4 + 5)
    assert "S4.tiff: its pixels cannot be read" in report.failed[0].error
    prepare([slides / f"S{number}.tiff" for number in range(4)], tmp_path / "others")
    found, expected = _bytes(tmp_path / "records"), _bytes(tmp_path / "others")
    assert all(found[name] == expected[name] for name in expected if name != "manifest.json") and len(expected) == 5


def test_features_beyond_the_dtype_are_their_slides_failure(slides, tmp_path, use):
    use(Means(scale=1e6))
    report = prepare(slides, tmp_path / "records")
    assert not report.done and len(report.failed) == 5 and "overflow float16" in report.failed[0].error
    assert len(prepare(slides, tmp_path / "wide", dtype="bfloat16").done) == 5


def _job(slides: Path, name: str, out: Path, encoder: str = "means", **settings) -> Job:
    given = PrepareSettings(encoder=encoder, **SMALL | settings).of_records()
    return Job(name, name, slides / f"{name}.tiff", out / "x.tfrecord", out / f"{name}.{encoder}.tfrecord", given)


@pytest.mark.skipif(sys.platform != "linux", reason="finds reader processes in /proc")
def test_reader_that_dies_costs_a_second_try_then_its_slide(slides, tmp_path, monkeypatch):
    """S1's reader is killed at each try, S3's at its first: their rows in batches are dropped, the others are whole."""
    monkeypatch.setattr(device_pipeline, "slot_bytes", lambda jobs: 3 * 64**2 * 4)
    encoder, tries, names = Means(batch_size=8), [], [f"S{number}" for number in range(5)]
    take = DevicePipeline._take

    def killing(self, event, found):
        take(self, event, found)
        name = event.slide.jobs[0].slide_id
        if found.start == 4 and name in ("S1", "S3"):
            tries.append(name)
            if tries.count(name) == 1 or name == "S1":
                os.kill(event.reader._worker.submit(os.getpid).result(), signal.SIGKILL)

    monkeypatch.setattr(DevicePipeline, "_take", killing)
    pipeline = DevicePipeline({"means": encoder}, 2)
    found = {job.slide_id: outcome for job, outcome in pipeline.run([_job(slides, name, tmp_path) for name in names])}
    assert sorted(found) == names and sorted(tries) == ["S1", "S1", "S3", "S3"]
    assert [name for name in names if found[name].error] == ["S1"]
    assert "the worker process died" in found["S1"].error and str(slides / "S1.tiff") in found["S1"].error
    for name in ("S0", "S2", "S3", "S4"):
        (info,) = Records([tmp_path / f"{name}.means.tfrecord"]).slides
        assert info.num_patches == found[name].timings.patches == 12 + 6 * int(name[1])
        with open_slide(slides / f"{name}.tiff") as slide:
            tiles = tile_slide(slide, 64)
            patches = np.concatenate(list(read_patches(slide, tiles)))
        rows = {tuple(corner): row for corner, row in zip(tiles.coords, encoder(patches), strict=True)}
        record = Records([tmp_path / f"{name}.means.tfrecord"]).read(0)
        for corner, row in zip(record.coords, record.features, strict=True):
            np.testing.assert_array_equal(row, rows[tuple(corner)].astype(np.float16))


@pytest.mark.parametrize("end", ["cancelled", "anew", "silent"])
def test_reader_that_dies_between_two_requests_is_replaced(slides, tmp_path, monkeypatch, end):
    """Its requests are then cancelled or never answered, or a new process does, which begins the slide again."""
    monkeypatch.setattr(device_pipeline, "slot_bytes", lambda jobs: 3 * 64**2 * 4)
    monkeypatch.setattr(device_pipeline, "_PATIENCE", 0.2)
    monkeypatch.setattr(readers.Reader, "is_over", property(lambda self: self in silent))
    request, made, silent = readers.Reader.request, [], []

    def dying(self, *arguments):
        made.append(arguments)
        if len(made) == 3 and end == "silent":
            silent.append(self)
        if self in silent:
            return
        if len(made) == 3 and end == "anew":
            self._worker.submit(reading._close, -1).result()
        if len(made) == 3 and end == "cancelled":
            future = Future()
            future.cancel()
            arguments[-1](future)
        else:
            request(self, *arguments)

    monkeypatch.setattr(readers.Reader, "request", dying)
    ((job, outcome),) = DevicePipeline({"means": Means(batch_size=5)}, 1).run([_job(slides, "S0", tmp_path)])
    assert not outcome.error and outcome.timings.patches == 12 and len(made) > 6
    (info,) = Records([job.part]).slides
    assert info.num_patches == 12


def test_reader_that_hangs_is_ended(slides, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "SECONDS", 0.5)
    monkeypatch.setattr(readers, "fill", time.sleep)

    def request(self, index, slide, jobs, done):
        self._worker.submit(time.sleep, 60, seconds=0.5).add_done_callback(done)

    monkeypatch.setattr(readers.Reader, "request", request)
    ((job, outcome),) = DevicePipeline({"means": Means()}, 1).run([_job(slides, "S0", tmp_path)])
    assert job.slide_id == "S0" and "crashed or hung" in outcome.error


def _out_of_memory() -> Exception:
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.")


def test_device_out_of_memory_halves_the_batches(slides, tmp_path, use, capsys):
    use(Means())
    prepare(slides, tmp_path / "expected")
    encoder = Means()
    encoder.failures = [_out_of_memory(), _out_of_memory()]
    use(encoder)
    report = prepare(slides, tmp_path / "records")
    assert encoder.batch_size == 5 and _bytes(tmp_path / "records") == _bytes(tmp_path / "expected")
    said = [line for line in capsys.readouterr().err.splitlines() if "memory ran out" in line]
    assert [line.split("patches, ")[1] for line in said] == ["going on with 10", "going on with 5"]
    assert report.finished and set(encoder.shapes) == {(20, 64, 64, 3), (10, 64, 64, 3), (5, 64, 64, 3)}


def test_batches_in_flight_are_cut_when_an_earlier_one_needed_it(slides):
    """The first batch runs out of memory when it is awaited; the second one, of the old size, was started before."""
    encoder = Means(batch_size=6)
    queue = EncoderQueue(encoder, 64)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    batches = [queue.new_batch(), queue.new_batch()]
    for number, batch in enumerate(batches):
        batch.patches[:], batch.used = pixels[6 * number : 6 * number + 6], 6 - number
        encoder.failures = [_out_of_memory()]
        queue.start(batch)
    rows = [queue.features(batch) for batch in batches]
    assert (
        encoder.batch_size == 3 and encoder.shapes[2:] == [(3, 64, 64, 3)] * 4 and len(queue.new_batch().patches) == 3
    )
    np.testing.assert_allclose(np.concatenate(rows), encoder(pixels)[:11], rtol=1e-6)


def test_other_errors_of_the_device_end_the_run(slides, tmp_path, use):
    encoder = Means(smallest=20)
    use(encoder)
    encoder.failures = [_out_of_memory()]
    with pytest.raises(OSError, match=r"'means'.*memory ran out with batches of 20 .*smaller --batch-size"):
        prepare(slides, tmp_path / "records")
    pipeline, dispatch = DevicePipeline({"means": encoder}, 2), encoder.dispatch

    def broken(patches):
        if len(encoder.shapes) > 2:
            raise jax.errors.JaxRuntimeError("INTERNAL: a chip has fallen off")
        return dispatch(patches)

    encoder.dispatch = broken
    with pytest.raises(OSError, match="'means': the device failed: INTERNAL: a chip"):
        list(pipeline.run([_job(slides, f"S{number}", tmp_path) for number in range(5)]))


def test_leaving_early_frees_everything(slides, tmp_path, rings):
    results = DevicePipeline({"means": Means(batch_size=4)}, 2).run(
        [_job(slides, f"S{number}", tmp_path) for number in range(5)]
    )
    next(results)
    assert _there(rings) or sys.platform != "linux"
    results.close()
    assert not _there(rings)
    assert not list(DevicePipeline({}, 2).run([]))


SCRIPT = """
import signal, sys, time
from pathlib import Path
import numpy as np
from data_prep.device_pipeline import DevicePipeline
from data_prep.jobs import Job
from data_prep.settings import PrepareSettings

class Slow:
    name, dim, batch_size, told = "slow", 3, 2, False

    def dispatch(self, patches):
        if not self.told:  # once: nobody reads the pipe afterwards
            print(*[reader._ring.name for reader in pipeline._readers], flush=True)
        self.told = True
        time.sleep(0.5)
        return np.zeros((2, 3), np.float32)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they start in the background
    folder, out = map(Path, sys.argv[1:])
    settings = PrepareSettings(encoder="slow", patch_size=64).of_records()
    names = [f"S{number}" for number in range(5)]
    jobs = [Job(name, "", folder / f"{name}.tiff", out, out / f"{name}.tfrecord", settings) for name in names]
    pipeline = DevicePipeline({"slow": Slow()}, 2)
    list(pipeline.run(jobs))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_process_that_ends(slides, tmp_path, sign):
    """Ctrl-C reaches readers as well; SIGKILL the process alone, whose segments its resource tracker then frees."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PATHFLIP_TEST_MARK": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, str(slides), str(tmp_path)]
    with (
        (tmp_path / "errors").open("wb") as errors,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        ) as process,
    ):
        rings = [SHARED / name for name in process.stdout.readline().decode().split()]
        assert len(_there(rings)) == 2
        os.killpg(process.pid, sign) if sign == signal.SIGINT else process.send_signal(sign)
    assert process.returncode in (-sign, 128 + sign), (tmp_path / "errors").read_text()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (_there(rings) or _processes_of(tmp_path)):
        time.sleep(0.05)
    assert not _there(rings) and not _processes_of(tmp_path)


def _processes_of(mark: Path) -> list[str]:
    """Living processes that were started with this mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            found += [str(path)] if f"PATHFLIP_TEST_MARK={mark}".encode() in path.read_bytes() else []
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is a folder on Linux")
def test_rings_are_of_one_size_whatever_the_slides(slides, tmp_path, monkeypatch, rings):
    """As many slots as readers, and no more patches ahead of the device than these and the batches hold."""
    monkeypatch.setattr(device_pipeline, "slot_bytes", lambda jobs: 3 * 64**2 * 2)
    going, sizes = threading.Event(), []
    encoder = Means(batch_size=2)
    features = EncoderQueue.features

    def slow(self, batch):
        going.wait(60)
        return features(self, batch)

    monkeypatch.setattr(EncoderQueue, "features", slow)
    pipeline = DevicePipeline({"means": encoder}, 2)

    def look() -> None:
        before = 0
        while not pipeline._decoded or before != pipeline._decoded:  # until the readers wait
            before = pipeline._decoded
            time.sleep(0.5)
        sizes.append((pipeline._decoded, sum(ring.stat().st_size for ring in rings)))
        going.set()

    threading.Thread(target=look).start()
    assert len(list(pipeline.run([_job(slides, f"S{number}", tmp_path) for number in range(5)]))) == 5
    ((decoded, ring),) = sizes
    assert ring == 2 * readers.SLOTS * 3 * 64**2 * 2
    assert decoded <= 2 * (device_pipeline._IN_FLIGHT + 2)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(readers.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"takes 38 MB of /dev/shm; .*--shm-size.*--workers"):
        readers.Reader(3 << 22)


def test_slots_hold_a_batch_of_any_patch_size(slides, tmp_path):
    assert reading.slot_bytes([_job(slides, "S0", tmp_path)]) == 3 << 22
    assert reading.slot_bytes([_job(slides, "S0", tmp_path, patch_size=4096)]) == 3 * 4096**2


def test_readers_leave_jax_alone(slides, tmp_path):
    worker = Worker(preload=readers.PRELOADED)
    reader = readers.Reader(3 << 22)
    try:
        slot, job = reading.Slot(reader._ring.name, 0, 3 << 22), _job(slides, "S0", tmp_path)
        assert worker.submit(reading.fill, slot, 0, [job]).result().last
        assert worker.submit(reading.fill, slot, 0, [job]).result() is None
        assert worker.submit(eval, "'jax' in __import__('sys').modules").result() is False
    finally:
        worker.stop()
        reader.close()


def test_busy_share_is_the_union_of_the_batches_times(monkeypatch):
    times = iter([0.0, 1.0, 2.0, 4.0, 8.0, 9.0])  # two batches overlap from 1 to 2; the devices idle from 4 to 8
    monkeypatch.setattr("data_prep.device_usage.time.perf_counter", lambda: next(times))
    clock = DeviceClock()
    first, second = clock.dispatch(), clock.dispatch()
    clock.complete(first, 10)
    clock.complete(second, 10)
    clock.complete(clock.dispatch(), 7)
    usage = clock.usage(27, 1)
    assert (usage.busy, usage.seconds, usage.encoded) == (5.0, 9.0, 27) and usage.busy_share == pytest.approx(5 / 9)
    assert usage.patches_per_second == 3.0


@pytest.mark.parametrize(
    ("waits", "readers", "said"),
    [
        ({"reading": 5.0}, 1, "reading limits: raise --workers, 1 now, up to the 2 cores"),
        ({"reading": 5.0}, 2, "reading limits: 2 cores decode 100 patches/s"),
        ({"writing": 5.0}, 2, "writing limits: give --out"),
        ({}, 2, "filling batches limits"),
        ({"busy": 9.5, "reading": 0.5}, 1, ""),
    ],
)
def test_advice_names_the_stage_that_limits(monkeypatch, waits, readers, said):
    monkeypatch.setattr("data_prep.device_usage.processors", lambda: 2)
    usage = DeviceUsage(**{"encoded": 1000, "decoded": 1000, "seconds": 10.0, "busy": 4.0, "readers": readers} | waits)
    assert usage.advice().startswith(said) and bool(usage.advice()) == bool(said)
    assert usage.as_json()["advice"] == usage.advice() and usage.summary().endswith(usage.advice())
    assert DeviceUsage().busy_share == DeviceUsage().patches_per_second == 0 and not DeviceUsage().advice()


def test_settings_that_exclude_each_other(slides, tmp_path, use):
    use(Means())
    with pytest.raises(ValueError, match="--beam prepares one encoder at a time"):
        use(Means(), Means("others"))
        prepare_several(slides, tmp_path / "records", {"means": 64, "others": 64}, beam=[])
    with pytest.raises(ValueError, match="--batch-size 8: has no effect on Beam"):
        prepare(slides, tmp_path / "records", beam=[], batch_size=8)
    with pytest.raises(ValueError, match="--batch-size 0"):
        PrepareSettings(batch_size=0)
    with pytest.raises(ValueError, match="has no effect with encoder 'stain_texture'"):
        build.prepare(slides, tmp_path / "records", PrepareSettings(batch_size=8))


def prepare_several(folder, out, sizes: dict[str, int], **settings):
    return build.prepare_several(
        folder,
        out,
        [PrepareSettings(encoder=name, **SMALL | settings | {"patch_size": size}) for name, size in sizes.items()],
    )


def test_several_encoders_write_what_each_writes_alone(slides, tmp_path, use):
    sizes = {"means": 64, "other": 64, "wide": 96}
    use(Means(), Means("other", batch_size=7, scale=2.0), Means("wide", batch_size=9))
    for name, size in sizes.items():
        prepare(slides, tmp_path / name, name, patch_size=size)
    reports = prepare_several(slides, tmp_path / "all", sizes)
    for name, report in reports.items():
        assert report.folder == tmp_path / "all" / name and report.finished and len(report.done) == 5
        assert _bytes(report.folder) == _bytes(tmp_path / name) and verify(report.folder) == []
    usage, (first, _, wide) = reports["means"].device, [report.timings.patches for report in reports.values()]
    assert (usage.encoded, usage.decoded) == (2 * first + wide, first + wide)  # patches of one grid are read once
    # A slide that one folder lacks is read for it alone.
    (tmp_path / "all/other/pathflip-00001.tfrecord").unlink()
    again = prepare_several(slides, tmp_path / "all", sizes)
    assert [report.done for report in again.values()] == [[], ["S2", "S3"], []]
    assert again["other"].device.decoded == 6 * (4 + 5)
    assert _bytes(tmp_path / "all/other") == _bytes(tmp_path / "other")


@pytest.mark.skipif(sys.platform != "linux", reason="shared memory is a folder on Linux")
def test_encoder_that_has_a_slide_is_left_out_of_its_second_try(slides, tmp_path, monkeypatch):
    """The reader dies when the patches of the first encoder are encoded, and written, and those of the second not."""
    monkeypatch.setattr(device_pipeline, "slot_bytes", lambda jobs: 3 * 96**2)
    take, killed = DevicePipeline._take, []

    def killing(self, event, found):
        take(self, event, found)
        if found.runs[0].grid == 1 and not killed:
            killed.append(found)
            deadline = time.monotonic() + 20
            while not self._reported and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(event.reader._worker.submit(os.getpid).result(), signal.SIGKILL)

    monkeypatch.setattr(DevicePipeline, "_take", killing)
    pipeline = DevicePipeline({"means": Means(batch_size=6), "wide": Means("wide", batch_size=6)}, 1)
    own = [_job(slides, "S4", tmp_path), _job(slides, "S4", tmp_path, "wide", patch_size=96)]
    ended = []
    for job, outcome in pipeline.run(own):
        assert not outcome.error
        ended.append(job)
        job.part.unlink()  # as when it is assembled
    assert ended == own and killed and not list(tmp_path.glob("*.tfrecord"))
    assert 36 + 16 < pipeline.usage.decoded <= 36 + 16 + readers.SLOTS  # not the patches of the first one again


def test_slide_without_patches_for_one_encoder_has_those_of_the_other(slides, tmp_path, use):
    """Its resolution suffices for patches at 0.5 um per pixel, not for those at 0.25."""
    use(Means(), Means("fine"))
    settings = [PrepareSettings(encoder=name, **SMALL, mpp=mpp) for name, mpp in (("means", 0.5), ("fine", 0.25))]
    reports = build.prepare_several(slides / "S0.tiff", tmp_path, settings)
    assert reports["means"].done == ["S0"] and not reports["means"].failed
    assert "enlarging adds no detail" in reports["fine"].failed[0].error and not reports["fine"].done


def test_grids_of_a_slide_are_read_block_by_block(slides, tmp_path, monkeypatch):
    """Patches of 64 and of 48 px are read together within 256 px, of which a slide has two by two."""
    monkeypatch.setattr("data_prep.slides.BLOCK", 256)
    own = [_job(slides, "S4", tmp_path, name, patch_size=size) for name, size in (("a", 64), ("b", 48))]
    with open_slide(slides / "S4.tiff") as slide:
        chunk = reading._Reading(slide, own).fill(np.empty(3 << 20, np.uint8))
    blocks = []
    for run in chunk.runs:
        corners = chunk.opened.grids[run.grid].coords[run.rows] // 256
        assert len(np.unique(corners, axis=0)) == 1
        blocks.append((*corners[0][::-1].tolist(), run.grid))
    assert blocks == sorted(blocks) and len(blocks) == 8 and chunk.last


def test_encoders_that_cannot_go_together(slides, tmp_path, use):
    use(Means())
    one, other = PrepareSettings(encoder="means"), PrepareSettings(encoder="stain_texture")
    with pytest.raises(ValueError, match=r"--encoder stain_texture: several .* once for each of the others"):
        build.prepare_several(slides, tmp_path / "out", [one, other])
    with pytest.raises(ValueError, match="means, means: expected each once"):
        build.prepare_several(slides, tmp_path / "out", [one, one])
    with pytest.raises(ValueError, match="workers 2, None: expected one value"):
        build.prepare_several(slides, tmp_path / "out", [one, PrepareSettings(encoder="b", workers=2)])
    with pytest.raises(ValueError, match="'hf:x/y': not the name of a folder"):
        build.prepare_several(slides, tmp_path / "out", [one, PrepareSettings(encoder="hf:x/y")])
    assert not (tmp_path / "out").exists()


def test_the_command_takes_several_encoders(slides, tmp_path, use, capsys):
    use(Means(), Means("wide", batch_size=9))
    command = ["prepare", str(slides), "--out", str(tmp_path / "out"), "--encoder", "means", "--encoder", "wide"]
    command += ["--patch-size", "64", "--patch-size", "96", "--edge-um", "64", "--workers", "2"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["means", "wide"] and [len(report["done"]) for report in found.values()] == [5, 5]
    assert 0 < found["wide"]["device"]["busy_share"] <= 1 and found["wide"]["device"]["patches"] > 120
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(tmp_path / "out" / name) for name in found]
    assert cli.main([*command, "--patch-size", "32"]) == 2
    assert "--patch-size given 3 times for 2 encoders" in capsys.readouterr().err


def test_a_registered_encoder_determines_its_patches(slides, tmp_path, small_encoder, capsys):
    recipe, weights = small_encoder
    out, options = tmp_path / "records", ["--encoder", "Small", "--weights", str(weights), "--batch-size", "8"]
    assert cli.main(["prepare", str(slides), "--out", str(out), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["device"]["busy_share"] <= 1
    records = Records(out)
    info = records.slides[0]
    assert (info.encoder, info.patch_size, info.feature_dim) == ("small", recipe.patch_size, recipe.width)
    with open_slide(slides / f"{info.slide_id}.tiff") as slide:
        tiles = tile_slide(slide, recipe.patch_size, recipe.mpp)
        (pixels,) = read_patches(slide, tiles)
    from data_prep.vision_encoders import VisionEncoder
    from pathflip_jax.data.records.large import open_slide as open_record

    features = np.asarray(open_record(records, 0).features, np.float32)
    expected = VisionEncoder(recipe, weights)(pixels)
    order = np.lexsort(tiles.coords.T)
    stored = np.lexsort(np.asarray(open_record(records, 0).coords).T)
    np.testing.assert_allclose(features[stored], expected[order], atol=4e-3, rtol=2e-3)  # float16


def test_readers_decode_by_tifffile_too(slides, tmp_path, use):
    use(Means())
    prepare(slides, tmp_path / "openslide")
    report = prepare(slides, tmp_path / "tifffile", reader="tifffile")
    assert report.finished and not report.notes
    assert _bytes(tmp_path / "tifffile") == _bytes(tmp_path / "openslide")


def test_other_patches_than_the_encoders_are_allowed_and_noted(slides, tmp_path, small_encoder):
    _, weights = small_encoder
    how = {"encoder": "small", "weights": weights, "workers": 1}
    assert not build.prepare(slides / "S0.tiff", tmp_path / "own", PrepareSettings(**how)).notes
    report = build.prepare(slides / "S0.tiff", tmp_path / "other", PrepareSettings(**how, patch_size=64))
    assert (
        report.finished and "patches are 64 px at 0.5 um per px, small was trained on 48 px at 0.5" in report.notes[0]
    )
    assert read_recipe(tmp_path / "other").patch_size == 64 and read_recipe(tmp_path / "own").patch_size == 48


def test_weights_and_names_that_do_not_fit_are_refused(slides, tmp_path, small_encoder, capsys):
    _, weights = small_encoder
    run = ["prepare", str(slides), "--out", str(tmp_path / "records")]
    for options, message in (
        (["--weights", str(weights)], "encoder 'stain_texture' is not registered"),
        (["--encoder", "small", "--weights", str(tmp_path / "absent")], "no such file or folder of weights of small"),
        (["--encoder", "uni_v1", "--weights", str(weights)], "They fit small: is that the encoder you mean?"),
        (["--encoder", "small", "--encoder", "uni_v1", "--weights", str(weights)], "--weights given 1 times for 2"),
        (["--encoder", "small", "--encoder", "SMALL"], "expected each once"),
    ):
        assert cli.main([*run, *options]) == cli.WRONG_INPUT
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "records").glob("*.tfrecord"))

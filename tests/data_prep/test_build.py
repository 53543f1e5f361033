"""Conversion of slides and feature files to records: their content, and the handling of faults."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from data_prep import build, jobs
from data_prep.encoders import load_encoder
from data_prep.pool import run_each, run_one
from data_prep.settings import ImportSettings, PrepareSettings
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.records.verify import verify
from pathflip_jax.data.storage.failures import Failure
from pathflip_jax.runtime.workers import Worker, limits, worker_number

REAL = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real files in {REAL}: set PATHFLIP_TEST_DATA")
SMALL = {"patch_size": 64, "edge_um": 64.0, "slides_per_shard": 2, "workers": 2}


def prepare(slides, out, **settings):
    return build.prepare(slides, out, PrepareSettings(**settings))


def import_features(folder, out, **settings):
    return build.import_features(folder, out, ImportSettings(**settings))


def _write_slide(path: Path, seed: int, tissue: bool = True) -> Path:
    rng = np.random.default_rng(seed)
    image = np.full((448, 512, 3), 242, np.uint8)
    if tissue:
        coarse = rng.integers(0, 60, (48, 48, 3)).astype(np.uint8)
        grain = np.asarray(Image.fromarray(coarse).resize((384, 384), Image.BICUBIC))
        image[:384, :384] = np.array([205, 130, 185]) - grain
    options = {"photometric": "rgb", "tile": (128, 128), "metadata": None, "compression": "deflate"}
    tifffile.imwrite(path, image, resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **options)
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """Five slides of 36 patches; tests that change them work on a copy."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(5):
        _write_slide(folder / f"S{number}.tiff", number)
    return folder


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """The records of all slides, made in one go."""
    out = tmp_path_factory.mktemp("whole") / "records"
    return out, prepare(slides, out, **SMALL)


def _bytes(folder: Path) -> dict[str, bytes]:
    names = (path for pattern in ("*.tfrecord", "*.idx", "manifest.json") for path in folder.glob(pattern))
    return {path.name: path.read_bytes() for path in names}


def test_records_hold_the_features_of_the_patches(slides, whole):
    out, report = whole
    assert report.done == [f"S{number}" for number in range(5)] and not report.failed and not report.skipped
    assert report.finished and not report.failed and json.loads((out / "failures.json").read_text()) == []
    assert "slides written 5" in report.summary()
    assert "180 patches; workers' time: tissue " in report.summary() and report.timings.peak_bytes > 5e7
    records, encode = Records(out), load_encoder("stain_texture")
    assert (records.encoder, records.feature_dim, records.cut, records.patch_slots) == ("stain_texture", 175, "grid", 4)
    assert verify(out) == [] and not (out / ".parts").exists()
    assert sorted(path.name for path in out.glob("*.tfrecord")) == [f"pathflip-0000{i}.tfrecord" for i in range(3)]
    for position, info in enumerate(records.slides):
        slide = records.read(position)
        where = (info.slide_id, info.width, info.height, info.mpp, info.patch_size, info.num_regions)
        assert where == (f"S{position}", 512, 448, 0.5, 64, 9)
        assert len(np.unique(slide.coords, axis=0)) == 36 and slide.coords.max() == 320
        image = tifffile.imread(slides / f"S{position}.tiff")
        patches = np.stack([image[y : y + 64, x : x + 64] for x, y in slide.coords])
        np.testing.assert_array_equal(slide.features, encode(patches).astype(np.float16))


def test_tasks_of_a_job_array_write_what_one_run_writes(slides, whole, tmp_path):
    out = tmp_path / "records"
    first = prepare(slides, out, shard=(1, 2), **SMALL)
    assert first.done == ["S2", "S3"] and not first.finished and "other tasks" in first.summary()
    assert not (out / "manifest.json").exists()
    second = prepare(slides, out, shard=(0, 2), **SMALL)
    assert second.done == ["S0", "S1", "S4"] and second.finished
    assert _bytes(out) == _bytes(whole[0])


def test_second_run_does_only_what_is_missing(whole, slides, tmp_path):
    out = Path(shutil.copytree(whole[0], tmp_path / "records"))
    before = _bytes(out)
    again = prepare(slides, out, **SMALL)
    assert not again.done and again.skipped == whole[1].done and again.finished and _bytes(out) == before
    (out / "pathflip-00001.tfrecord").unlink()
    third = prepare(slides, out, **SMALL)
    assert third.done == ["S2", "S3"] and third.skipped == ["S0", "S1", "S4"] and _bytes(out) == before


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_killed_run_leaves_no_worker_and_is_continued(slides, whole, tmp_path):
    out = tmp_path / "records"
    process = subprocess.Popen(_script(tmp_path, slides, out), env=_environment(tmp_path), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    assert _processes_of(tmp_path)
    while not list(out.glob(".parts/*.tfrecord")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    while _processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _processes_of(tmp_path)
    parts = {path.stem for path in out.glob(".parts/*.tfrecord")}
    report = prepare(slides, out, **SMALL)
    assert parts and report.finished and not report.failed
    assert _bytes(out) == _bytes(whole[0])


def _script(folder: Path, slides: Path, out: Path, before: str = "pass") -> list[str]:
    """A command that prepares slides in a process of its own, as a user's script would."""
    lines = [
        "from data_prep.build import prepare",
        "from data_prep.settings import PrepareSettings",
        "if __name__ == '__main__':",
        f"    {before}",
    ]
    lines.append(f"    prepare({str(slides)!r}, {str(out)!r}, PrepareSettings(**{SMALL}))")
    (folder / "script.py").write_text("\n".join(lines))
    return [sys.executable, str(folder / "script.py")]


def _environment(mark: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PATHFLIP_TEST_MARK": str(mark)}


def _processes_of(mark: Path) -> list[str]:
    """Living processes that were started with this mark in their environment, workers included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [str(path)] if f"PATHFLIP_TEST_MARK={mark}".encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def test_bad_slides_are_listed_and_the_rest_goes_on(slides, tmp_path):
    folder, out = Path(shutil.copytree(slides, tmp_path / "slides")), tmp_path / "records"
    (folder / "S1.tiff").write_bytes((folder / "S1.tiff").read_bytes()[:3000])
    (folder / "S2.tiff").write_text("not a slide")
    _write_slide(folder / "S4.tiff", 0, tissue=False)
    report = prepare(folder, out, **SMALL)
    assert report.failed and report.done == ["S0", "S3"]
    assert [failure.slide for failure in report.failed] == ["S1", "S2", "S4"]
    assert all(failure.file in failure.error for failure in report.failed)
    assert "no tissue" in report.failed[2].error and "OpenSlide cannot open it" in report.failed[1].error
    assert [Failure(**row) for row in json.loads((out / "failures.json").read_text())] == report.failed
    assert "S2.tiff: OpenSlide cannot open it" in report.summary()
    assert [info.slide_id for info in Records(out).slides] == ["S0", "S3"] and verify(out) == []
    # Mended slides join the shard that they belong to; good ones are not worked on again.
    for name in ("S1.tiff", "S2.tiff"):
        shutil.copy(slides / name, folder / name)
    mended = prepare(folder, out, **SMALL)
    assert mended.done == ["S1", "S2"] and mended.skipped == ["S0", "S3"] and len(mended.failed) == 1
    assert [info.slide_id for info in Records(out).slides] == ["S0", "S1", "S2", "S3"] and verify(out) == []


def test_failures_of_a_job_array_come_together(slides, tmp_path):
    folder, out = Path(shutil.copytree(slides, tmp_path / "slides")), tmp_path / "records"
    for name in ("S0", "S2"):
        (folder / f"{name}.tiff").write_text("not a slide")
    for task in range(3):
        prepare(folder, out, shard=(task, 3), **SMALL)
    assert [row["slide"] for row in json.loads((out / "failures.json").read_text())] == ["S0", "S2"]
    assert len(Records(out)) == 3 and verify(out) == []


def test_strict_stops_at_the_first_bad_slide(slides, tmp_path):
    folder, out = Path(shutil.copytree(slides, tmp_path / "slides")), tmp_path / "records"
    (folder / "S0.tiff").write_text("not a slide")
    report = prepare(folder, out, strict=True, **SMALL | {"workers": 1})
    assert report.failed and [failure.slide for failure in report.failed] == ["S0"]
    assert not report.done and not report.finished and not list(out.glob("*.tfrecord"))
    shutil.copy(slides / "S0.tiff", folder)
    assert len(prepare(folder, out, strict=True, **SMALL).done) == 5


def test_nothing_but_bad_slides(tmp_path):
    _write_slide(tmp_path / "S0.tiff", 0, tissue=False)
    report = prepare(tmp_path, tmp_path / "records", **SMALL)
    assert report.failed and not report.finished and not (tmp_path / "records/manifest.json").exists()


def test_changed_settings_are_refused(slides, whole, tmp_path):
    out = Path(shutil.copytree(whole[0], tmp_path / "records"))
    before = _bytes(out)
    with pytest.raises(ValueError, match=r"patch_size 64, now 128.*another --out"):
        prepare(slides, out, **SMALL | {"patch_size": 128})
    with pytest.raises(ValueError, match=r"dtype 'float16', now 'bfloat16'"):
        prepare(slides, out, dtype="bfloat16", **SMALL)
    assert _bytes(out) == before
    (out / "plan.json").unlink()
    with pytest.raises(ValueError, match="not written by this command"):
        prepare(slides, out, **SMALL)


def test_settings_that_cannot_be_leave_the_folder_free(slides, tmp_path):
    out = tmp_path / "records"
    with pytest.raises(ValueError, match="larger patch size"):
        prepare(slides, out, **SMALL | {"patch_size": 16})
    with pytest.raises(ValueError, match="unknown encoder 'nonsense'"):
        prepare(slides, out, encoder="nonsense", **SMALL)
    for wrong in ({"shard": (2, 2)}, {"workers": 0}, {"slides_per_shard": 0}, {"min_tissue": 2}, {"mpp": 0}):
        with pytest.raises(ValueError, match="expected"):
            prepare(slides, out, **SMALL | wrong)
    assert prepare(slides / "S0.tiff", out, **SMALL).done == ["S0"]


def test_a_resolution_given_for_all_slides_or_for_one_wins(slides, tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,mpp,patient_id\nS0,,P1\nS1,0.4,P1\n")
    files, how = [slides / "S0.tiff", slides / "S1.tiff"], SMALL | {"override_mpp": 0.25, "dtype": "bfloat16"}
    report = prepare(files, tmp_path / "records", slides_table=table, **how)
    records = Records(tmp_path / "records")
    assert [round(info.mpp, 4) for info in records.slides] == [0.25, 0.4] and records.dtype.name == "bfloat16"
    assert [info.patch_size for info in records.slides] == [128, 80] and not report.failed
    assert any("0.25" in note and "0.5" in note and "1 slide (S0)" in note for note in report.notes), report.notes
    for wrong in ({"override_mpp": 40}, {"assume_mpp": 0.0}):
        with pytest.raises(ValueError, match=r"mpp (40|0): expected 0.05 to 10 um"):
            prepare(files, tmp_path / "records", **SMALL | wrong)


def test_beam_shares_the_slides_out_itself(slides, tmp_path, monkeypatch):
    for wrong in ({"shard": (0, 2)}, {"strict": True}):
        with pytest.raises(ValueError, match="neither --shard nor --strict"):
            prepare(slides, tmp_path / "records", beam=[], **SMALL | wrong)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "data_prep.beam", raising=False)
    with pytest.raises(ImportError, match=r"--beam needs Apache Beam.*pip install pathflip-jax\[beam\]"):
        prepare(slides, tmp_path / "records", beam=[], **SMALL)


def test_folders_and_ids_that_cannot_be(slides, tmp_path):
    with pytest.raises(FileNotFoundError, match="no slides in it"):
        prepare(tmp_path, tmp_path / "records")
    with pytest.raises(FileNotFoundError, match="none.svs"):
        prepare(tmp_path / "none.svs", tmp_path / "records")
    (tmp_path / "more").mkdir()
    for name in ("S0.tiff", "more/S0.tif"):
        shutil.copy(slides / "S0.tiff", tmp_path / name)
    with pytest.raises(ValueError, match=r"S0.tiff and .*more/S0.tif have the same slide id, S0"):
        prepare(tmp_path, tmp_path / "records")


def test_cases_come_from_the_table_or_the_id(slides, tmp_path):
    folder, table = tmp_path / "slides", tmp_path / "slides.csv"
    folder.mkdir()
    uuid = "0a1b2c3d-0000-4000-8000-0123456789ab"
    names = ("A", "B", f"TCGA-AA-1111-01Z-00-DX1.{uuid}", "TCGA-BB-2222-01Z-00-DX1")
    for name in names:
        shutil.copy(slides / "S0.tiff", folder / f"{name}.tiff")
    table.write_text("slide_id,patient_id\nA.tiff,P7\nTCGA-AA-1111-01Z-00-DX1,P8\nsomething else,P9\n")
    report = prepare(folder, tmp_path / "records", slides_table=table, **SMALL)
    cases = {info.slide_id: info.case_id for info in Records(tmp_path / "records").slides}
    assert cases == dict(zip(names, ("P7", "B", "P8", "TCGA-BB-2222"), strict=True))
    assert any("slides that are not in" in note and ": 2 (B" in note for note in report.notes)
    table.write_text("slide_id,patient_id\nX,P1\nY,P2\n")
    with pytest.raises(ValueError, match=r"slides.csv: none of its 2 slide ids .* it has X, Y, the slides are A, B"):
        prepare(folder, tmp_path / "other", slides_table=table, **SMALL)


def test_full_disk_stops_the_run_and_nothing_is_lost(slides, whole, tmp_path):
    out = tmp_path / "records"
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    command = _script(tmp_path, slides, out, before=limit)
    done = subprocess.run(command, env=_environment(tmp_path), capture_output=True, text=True)
    assert done.returncode and "OSError" in done.stderr and "free space" in done.stderr
    assert not list(out.rglob("*.tmp")) and not list(out.glob("*.tfrecord"))
    assert prepare(slides, out, **SMALL).finished and _bytes(out) == _bytes(whole[0])


def test_a_limit_of_the_process_is_no_fault_of_a_slide(tmp_path, monkeypatch):
    def too_many(*_):
        raise OSError(errno.EMFILE, "Too many open files", "S1.h5")

    monkeypatch.setattr(jobs, "_imported_features", too_many)
    outcome = jobs.import_slide(SimpleNamespace(file=tmp_path / "S1.h5"))
    assert outcome.fatal and "S1.h5" in outcome.error and "ulimit -n" in outcome.error


def test_worker_that_dies_is_its_slides_failure(slides, tmp_path, monkeypatch):
    def dying(work, jobs, workers):
        for job in jobs:
            yield job, None if getattr(job, "slide_id", "") == "S3" else work(job)

    monkeypatch.setattr(build, "run_each", dying)
    report = prepare(slides, tmp_path / "records", **SMALL)
    assert report.done == ["S0", "S1", "S2", "S4"]
    assert [failure.slide for failure in report.failed] == ["S3"] and "worker process died" in report.failed[0].error


def test_pool_outlives_its_workers():
    """Jobs are expressions, because workers import what they run: the third kills its process, whoever shares it."""
    jobs = [f"{number} * 2" for number in range(8)] + ["__import__('os').kill(__import__('os').getpid(), 9)"]
    jobs.insert(2, jobs.pop())
    found = dict(run_each(eval, jobs, 3))
    assert found == {job: None if "kill" in job else eval(job) for job in jobs}
    with pytest.raises(ZeroDivisionError):
        list(run_each(eval, ["1 / 0"], 1))
    assert list(run_each(eval, [], 2)) == []


NUMBER = "__import__('pathflip_jax.runtime.workers', fromlist='x').worker_number()"


def test_workers_are_numbered():
    jobs = [
        "[__import__('time').sleep(0.3), __import__('pathflip_jax.runtime.workers', fromlist='x').worker_number()][1]"
    ] * 4
    assert {result for _, result in run_each(eval, jobs, 2)} == {0, 1}
    assert worker_number() == os.getpid()  # no worker: it knows of no others


def test_a_worker_is_started_anew_after_a_job_that_killed_it():
    worker = Worker(3)
    try:
        assert run_one(worker, eval, "__import__('os').kill(__import__('os').getpid(), 9)") is None
        assert run_one(worker, eval, NUMBER) == 3
    finally:
        worker.stop()


def test_a_worker_that_stalls_or_floods_is_ended_by_its_limits():
    """As `Slide.read` sets them around OpenSlide: a stall ends the worker, an allocation too many is its error."""
    start = "(held := __import__('pathflip_jax.runtime.workers', fromlist='x').limits({}, 2**30)).__enter__() or "
    stall, flood = start.format(0.2) + "__import__('time').sleep(60) or 'slept'", start.format(60) + "len(bytes(2**33))"
    assert dict(run_each(eval, [stall, "1 + 1"], 2)) == {stall: None, "1 + 1": 2}
    if sys.platform == "linux":
        with pytest.raises(MemoryError):
            list(run_each(eval, [flood], 1))
    with limits(0.01, 0):  # this process is nobody's worker
        time.sleep(0.05)


def test_a_worker_that_dies_while_others_start_stops_nothing():
    """The first job kills its process while the pool starts the next ones: no worker is left that nobody ends."""
    jobs = ["__import__('os').kill(__import__('os').getpid(), 9)", *(f"{number} * 2" for number in range(8))]
    before = multiprocessing.active_children()  # such as the reader of files that this process keeps
    for _ in range(3):
        found = dict(run_each(eval, jobs, 8))
        assert found == {job: None if "kill" in job else eval(job) for job in jobs}
    assert not [child for child in multiprocessing.active_children() if child.is_alive() and child not in before]


def _write_features(
    path: Path, rows: int = 12, width: int = 8, encoder: str = "uni", step: int = 256, **change
) -> None:
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(-(-rows // 4))), -1).reshape(-1, 2)[:rows]
    features = change.get("features", np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32))
    with h5py.File(path, "w") as file:
        file["features"] = features
        file["features"].attrs["encoder"] = encoder
        file["coords"] = change.get("coords", grid * step)
        attributes = {"patch_size_level0": step, "patch_size": step, "level0_magnification": 20.0}
        file["coords"].attrs.update(
            attributes | {"target_magnification": 20.0, "level0_width": 2000, "level0_height": 1500}
        )


def test_features_of_other_tools_become_records(tmp_path):
    folder, out = tmp_path / "features", tmp_path / "records"
    folder.mkdir()
    for number in range(3):
        _write_features(folder / f"TCGA-AA-000{number}-01Z.h5", rows=8 + number)
    report = import_features(folder, out, slides_per_shard=2, workers=2)
    records = Records(out)
    assert report.finished and len(records) == 3 and records.encoder == "uni_v1" and verify(out) == []
    assert "27 patches; workers' time: read " in report.summary()
    for position, info in enumerate(records.slides):
        assert (info.case_id, info.mpp, info.patch_size, info.width) == (f"TCGA-AA-000{position}", 0.5, 256, 2000)
        with h5py.File(folder / f"{info.slide_id}.h5") as file:
            slide = records.read(position)
            expected = dict(zip(map(tuple, file["coords"][()]), file["features"][()].astype(np.float16), strict=True))
            for corner, row in zip(map(tuple, slide.coords), slide.features, strict=True):
                np.testing.assert_array_equal(row, expected[corner])
    assert import_features(folder, out, slides_per_shard=2, workers=2).skipped == report.done
    again = import_features(folder, out, slides_per_shard=2, mpp=0.25)  # no file lacks it: nothing changes
    assert again.skipped == report.done and not again.done


def test_bad_feature_files_are_listed_and_the_rest_goes_on(tmp_path):
    folder, out = tmp_path / "features", tmp_path / "records"
    folder.mkdir()
    _write_features(folder / "a_good.h5")
    (folder / "b_cut.h5").write_bytes((folder / "a_good.h5").read_bytes()[:2500])
    (folder / "c_foreign.h5").write_text("no HDF5")
    _write_features(folder / "d_short.h5", coords=np.zeros((11, 2), int))
    _write_features(folder / "e_nan.h5", features=np.full((12, 8), np.nan, np.float32))
    _write_features(folder / "f_wide.h5", width=9)
    _write_features(folder / "g_other.h5", encoder="conch")
    _write_features(folder / "h_large.h5", step=512)
    _write_features(folder / "i_empty.h5", features=np.zeros((0, 8), np.float32), coords=np.zeros((0, 2), int))
    _write_features(folder / "j_huge.h5", features=np.full((12, 8), 1e6, np.float32))
    _write_features(folder / "k_good.h5")
    report = import_features(folder, out, workers=2)
    assert report.done == ["a_good", "k_good"] and report.failed and verify(out) == []
    errors = {failure.slide: failure.error for failure in report.failed}
    said = {
        "b_cut": "not a valid HDF5", "c_foreign": "HDF5", "d_short": "12 features and coords of shape",
        "e_nan": "NaN", "f_wide": "feature_dim 9", "g_other": "encoder 'conch_v1'", "h_large": "patches of 256",
        "i_empty": "no tissue", "j_huge": "overflow float16",
    }  # fmt: skip
    assert set(errors) == set(said)
    for slide, message in said.items():
        assert message in errors[slide] and f"{slide}.h5" in errors[slide], errors[slide]


def test_bare_tensors_are_cut_by_scan(tmp_path):
    torch = pytest.importorskip("torch")
    for name in ("a", "b"):
        torch.save(torch.randn(300, 8), tmp_path / f"{name}.pt")
    report = import_features(tmp_path, tmp_path / "records", workers=1)
    records = Records(tmp_path / "records")
    assert records.cut == "scan" and records.slides[0].region_rows.tolist() == [0, 256, 300]
    assert any("no coordinates" in note for note in report.notes)


@needs_real
def test_files_of_one_dicom_series_are_one_slide(tmp_path):
    (tmp_path / "S1").mkdir()
    for name in ("a.dcm", "b.dcm"):
        shutil.copyfile(REAL / "slides/highdicom_sm_image.dcm", tmp_path / "S1" / name)
    (tmp_path / "c.dcm").write_text("not a slide")
    report = prepare(tmp_path, tmp_path / "records", workers=1)
    assert [failure.slide for failure in report.failed] == ["S1", "c"]  # S1 is glass


@needs_real
def test_real_slides(tmp_path):
    report = prepare(REAL / "slides", tmp_path / "records", workers=2)
    assert report.done == ["cmu-1-small-region"] and len(report.failed) == 5
    (info,) = Records(tmp_path / "records").slides
    assert 40 <= info.num_patches <= 60 and (info.patch_size, info.width, info.height) == (256, 2220, 2967)


@needs_real
@pytest.mark.parametrize("tool", ["clam", "trident", "slidechat_csv"])
def test_real_feature_files(tmp_path, tool):
    report = import_features(REAL / "formats" / tool, tmp_path / "records", workers=1)
    (info,) = Records(tmp_path / "records").slides
    assert (info.slide_id, info.num_patches, info.feature_dim) == ("cmu-1-small-region", 50, 512)
    assert [failure.slide for failure in report.failed] == (["empty"] if tool == "trident" else [])
    assert bool(info.mpp) != any("slides of unknown mpp" in note for note in report.notes)

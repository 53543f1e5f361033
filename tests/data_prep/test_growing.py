"""A cohort that grows, shrinks and is corrected: finished work is kept, and changes are reported."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import assembly, build
from data_prep.plan import _entries, _Slides
from data_prep.plan_file import Entry
from data_prep.settings import ImportSettings
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.records.verify import verify


def import_features(folder, out, **settings):
    return build.import_features(folder, out, ImportSettings(**settings))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """No worker processes: they take a second each, and other tests have them."""
    monkeypatch.setattr(build, "run_each", lambda work, jobs, workers: ((job, work(job)) for job in jobs))


def write(path: Path, *, size=256, mpp=0.5, width=8, encoder="uni", coords=None) -> Path:
    """A feature file; TRIDENT's where it says its size, CLAM's bare one where `size` is 0."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.stack(np.divmod(np.arange(12), 4), 1) * (size or 256) if coords is None else np.array(coords)
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(len(path.stem)).normal(size=(len(grid), width)).astype(np.float32)
        file["features"].attrs["encoder"] = encoder
        file["coords"] = grid
        if size:
            file["coords"].attrs["patch_size_level0"] = size
        if mpp:
            file["coords"].attrs["level0_magnification"] = 10 / mpp
    return path


def ids(out: Path) -> list[str]:
    return [info.slide_id for info in Records(out).slides]


def note(report, text: str) -> str:
    found = [line for line in report.notes if text in line]
    assert len(found) == 1, (text, report.notes)
    return found[0]


@pytest.fixture
def cohort(tmp_path):
    """A folder of three slides, and its records of two slides a shard."""
    for name in ("A", "C", "D"):
        write(tmp_path / f"features/{name}.h5")
    out = tmp_path / "records"

    def run(**options):
        return import_features(tmp_path / "features", out, slides_per_shard=2, **options)

    assert run().done == ["A", "C", "D"]
    return tmp_path / "features", out, run


def test_new_slides_join_behind_those_that_are_done(cohort):
    folder, out, run = cohort
    first = (out / "pathflip-00000.tfrecord").stat().st_mtime_ns
    for name in ("B", "E"):
        write(folder / f"{name}.h5")
    report = run()
    assert report.done == ["B", "E"] and report.skipped == ["A", "C", "D"] and report.finished
    assert [path.name for path in sorted(out.glob("*.tfrecord"))] == [f"pathflip-0000{i}.tfrecord" for i in range(3)]
    assert ids(out) == ["A", "C", "B", "D", "E"] and verify(out) == []
    assert (out / "pathflip-00000.tfrecord").stat().st_mtime_ns == first
    assert not run().done and json.loads((out / "manifest.json").read_text())["num_slides"] == 5


def test_a_job_array_comes_to_one_plan_of_a_grown_cohort(cohort):
    folder, out, run = cohort
    for name in ("B", "E", "F", "G"):
        write(folder / f"{name}.h5")
    reports = [run(shard=(task, 3)) for task in (2, 0, 1)]
    assert [report.done for report in reports] == [["E", "F"], ["G"], ["B"]] and reports[-1].finished
    assert ids(out) == ["A", "C", "B", "D", "E", "F", "G"] and verify(out) == []


def test_slides_that_are_gone_stay_until_they_are_pruned(cohort):
    folder, out, run = cohort
    (folder / "C.h5").unlink()
    (folder / "D.h5").unlink()
    write(folder / "B.h5")
    report = run()
    assert not report.failed and report.done == ["B"] and ids(out) == ["A", "C", "B", "D"]
    assert ": 2 (C, D); kept; pass `--prune` to remove them" in note(report, "not among those given")
    report = run(prune=True)
    assert not report.done and "2 (C, D); removed from the records" in note(report, "not among those given")
    assert ids(out) == ["A", "B"] and verify(out) == [] and not run().notes
    for name in ("A", "B"):
        (folder / f"{name}.h5").unlink()
    write(folder / "Z.h5")
    assert run(prune=True).done == ["Z"] and ids(out) == ["Z"] and verify(out) == []


def test_a_failed_slide_that_is_left_out_is_no_word_worth(tmp_path):
    write(tmp_path / "in/A.h5")
    (tmp_path / "in/B.h5").write_text("broken")
    assert import_features(tmp_path / "in", tmp_path / "out", slides_per_shard=1).failed
    (tmp_path / "in/B.h5").unlink()
    report = import_features(tmp_path / "in", tmp_path / "out", slides_per_shard=1)
    assert not report.failed and not report.notes and verify(tmp_path / "out") == []


def test_shards_of_slides_that_went_before_they_were_done_leave_no_gap(tmp_path):
    for name in "ABCD":
        write(tmp_path / f"in/{name}.h5")
    import_features(tmp_path / "in", tmp_path / "out", slides_per_shard=1, shard=(3, 4))
    for name in "AC":
        (tmp_path / f"in/{name}.h5").unlink()
    report = import_features(tmp_path / "in", tmp_path / "out", slides_per_shard=1)
    assert report.done == ["B"] and report.finished and ids(tmp_path / "out") == ["B", "D"]
    assert verify(tmp_path / "out") == []


def test_a_corrected_table_changes_cases_and_redoes_resolutions(cohort):
    folder, out, run = cohort
    table = folder.parent / "slides.csv"
    table.write_text("slide_id,patient_id,mpp\nA,P1,\nC,P2,\nD,P2,\n")
    report = run(slides_table=table)
    assert not report.done and ": 3 (A, C, D); updated in the records" in note(report, "case has changed")
    assert [info.case_id for info in Records(out).slides] == ["P1", "P2", "P2"] and verify(out) == []
    assert not run().notes  # without the table, its cases stay
    table.write_text("slide_id,patient_id,mpp\nA,P1,\nC,P2,0.48\nD,P3,\n")
    report = run(slides_table=table)
    assert (
        report.done == ["C"]
        and report.skipped == ["A", "D"]
        and "1 (C)" in note(report, "given resolution has changed")
    )
    assert "replaced by 0.48: 1 slide (C)" in note(report, "the file says mpp 0.5")
    found = {info.slide_id: (info.case_id, round(info.mpp, 4)) for info in Records(out).slides}
    assert found == {"A": ("P1", 0.5), "C": ("P2", 0.48), "D": ("P3", 0.5)} and verify(out) == []
    assert not run(slides_table=table).done and not run().done
    table.write_text("slide_id,patient_id,mpp\nA,P1,\nC,P2,\nD,P3,\n")
    assert "1 (C)" in note(run(slides_table=table), "kept as they are")


def test_a_slide_that_cannot_be_redone_is_not_left_with_its_wrong_resolution(cohort):
    folder, out, run = cohort
    table = folder.parent / "slides.csv"
    table.write_text("slide_id,mpp\nC,0.48\n")
    (folder / "C.h5").write_text("broken")
    report = run(slides_table=table)
    assert [failure.slide for failure in report.failed] == ["C"] and ids(out) == ["A", "D"] and verify(out) == []


def test_what_files_lack_can_be_said_later(tmp_path):
    for name in ("A", "B"):
        write(tmp_path / f"in/{name}.h5", mpp=0.25 if name == "A" else 0)
    report = import_features(tmp_path / "in", tmp_path / "out")
    assert "1 (B)" in note(report, "slides of unknown mpp")
    report = import_features(tmp_path / "in", tmp_path / "out", mpp=0.25)
    assert report.done == ["B"] and report.skipped == ["A"]
    assert [info.mpp for info in Records(tmp_path / "out").slides] == [0.25, 0.25]
    write(tmp_path / "in/C.h5", mpp=0)
    report = import_features(tmp_path / "in", tmp_path / "out", mpp=0.24)
    assert report.done == ["C"] and "1 (B)" in note(report, "kept as they are")
    assert [round(info.mpp, 4) for info in Records(tmp_path / "out").slides] == [0.25, 0.25, 0.24]
    report = import_features(tmp_path / "in", tmp_path / "out", override_mpp=0.26)
    assert report.done == ["A", "B", "C"] and verify(tmp_path / "out") == []
    assert [round(info.mpp, 4) for info in Records(tmp_path / "out").slides] == [0.26] * 3


def test_what_an_interrupted_run_was_told_does_not_hold(tmp_path, monkeypatch):
    for name in ("A", "B"):
        write(tmp_path / f"in/{name}.h5", mpp=0)
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):

        def stop(*arguments):
            raise KeyboardInterrupt

        interrupted.setattr(assembly, "assemble", stop)
        import_features(tmp_path / "in", tmp_path / "out", mpp=0.25)
    assert len(list((tmp_path / "out/.parts").glob("*.tfrecord"))) == 2
    report = import_features(tmp_path / "in", tmp_path / "out", mpp=0.5)
    assert [info.mpp for info in Records(tmp_path / "out").slides] == [0.5, 0.5] and report.timings.patches == 24


def test_an_option_does_not_replace_what_files_say(tmp_path):
    write(tmp_path / "in/A.h5", mpp=0.25)
    write(tmp_path / "in/B.h5", mpp=0.5, size=128)
    report = import_features(tmp_path / "in", tmp_path / "out", mpp=0.25)
    assert [info.mpp for info in Records(tmp_path / "out").slides] == [0.25, 0.5]
    assert "0.25 was not used: 1 slide (B)" in note(report, "the file says mpp 0.5")
    assert note(report, "pass --override-mpp")


def test_folders_of_the_first_format_of_plans_go_on(cohort):
    folder, out, run = cohort
    plan = json.loads((out / "plan.json").read_text())
    old = {name: value for name, value in plan["settings"].items() if name not in ("dtype", "override_mpp")}
    (out / "plan.json").write_text(json.dumps({"settings": old, "cases": dict.fromkeys("ACD", "")}))
    write(folder / "B.h5")
    assert run().done == ["B"] and ids(out) == ["A", "C", "B", "D"]
    (out / "plan.json").write_text(json.dumps({"settings": old, "cases": 3}))
    with pytest.raises(ValueError, match="not a plan of records"):
        run()


names = st.sets(st.sampled_from("ABCDEFGHIJ"), min_size=1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=6), st.integers(1, 4))
def test_a_shard_is_for_ever(steps, size):
    """Whatever comes, goes and fails: slides that were planned and are there stay in their shard; none overflows."""

    class Info:
        def __init__(self, shard):
            self.shard, self.mpp = Path(f"pathflip-{shard:05d}.tfrecord"), 0.5

    before, standing = {}, {}
    for given_now, good in steps:
        files = dict.fromkeys(given_now, Path())
        entries = _entries(_Slides(files, standing, before, None, {"command": "import"}, False), size)
        again = _entries(_Slides(files, standing, entries, None, {"command": "import"}, False), size)
        assert again == entries and set(entries) == given_now | standing.keys()
        for slide in (given_now & before.keys()) | standing.keys():
            assert entries[slide].shard == before.get(slide, Entry(entries[slide].shard)).shard
        shards = [entry.shard for entry in entries.values()]
        assert max(map(shards.count, shards)) <= size
        standing |= {slide: Info(entries[slide].shard) for slide in given_now & good}
        before = entries


def test_the_majority_says_what_the_cohort_is(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    write(folder / "A_odd.h5", size=512)
    write(folder / "A_wide.h5", width=9)
    write(folder / "A_other.h5", encoder="conch")
    write(folder / "C_unnamed.h5", encoder="")
    for number in range(4):
        write(folder / f"B{number}.h5")
    report = import_features(folder, out, slides_per_shard=3)
    errors = {failure.slide: failure.error for failure in report.failed}
    assert report.done == ["B0", "B1", "B2", "B3", "C_unnamed"] and verify(out) == []
    assert "A_odd.h5: slide A_odd has patches of 256 um, 7 of 8 slides have 128 um" in errors["A_odd"]
    assert "feature_dim 9, 7 of 8 slides have 8" in errors["A_wide"]
    assert "encoder 'conch_v1', 6 of 7 slides have 'uni_v1'" in errors["A_other"] and len(errors) == 3
    assert {info.encoder for info in Records(out).slides} == {"uni_v1"}
    for number in range(9):  # what stands decides now, however many others come
        write(folder / f"D{number}.h5", size=512)
    report = import_features(folder, out, slides_per_shard=3)
    assert not report.done and len(report.failed) == 12 and verify(out) == []


def test_nobody_decides_without_a_majority(tmp_path):
    for number in range(4):
        write(tmp_path / f"in/S{number}.h5", size=256 if number < 2 else 512)
    with pytest.raises(ValueError, match=r"no majority .*2 with patch size in um 128 \(S0, S1\); 2 .* 256 \(S2, S3\)"):
        import_features(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tfrecord"))
    (tmp_path / "in/S3.h5").unlink()
    report = import_features(tmp_path / "in", tmp_path / "out")
    assert report.done == ["S0", "S1"] and [failure.slide for failure in report.failed] == ["S2"]


def test_tasks_of_a_job_array_agree_on_the_first_that_is_decided(tmp_path):
    sizes = {"S0": 256, "S1": 512, "S2": 256, "S3": 512, "S4": 256}
    for name, size in sizes.items():
        write(tmp_path / f"in/{name}.h5", size=size)
    how = {"slides_per_shard": 1}
    first = import_features(tmp_path / "in", tmp_path / "out", shard=(0, 2), **how)
    assert first.done == ["S0", "S2", "S4"]
    second = import_features(tmp_path / "in", tmp_path / "out", shard=(1, 2), **how)
    assert [failure.slide for failure in second.failed] == ["S1", "S3"] and second.finished
    assert ids(tmp_path / "out") == ["S0", "S2", "S4"] and verify(tmp_path / "out") == []
    assert not (tmp_path / "out/.parts").exists()


def test_votes_hold_until_shards_stand(tmp_path):
    """A task that decided and was killed before it wrote a shard has decided."""
    write(tmp_path / "in/S0.h5")
    write(tmp_path / "in/S1.h5", size=512)
    out = tmp_path / "out"
    (out / ".parts").mkdir(parents=True)
    votes = [["S0", "S0.h5", "uni", 8, "float16", "grid", 256, 0.5]]
    (out / ".parts/votes.json").write_text(json.dumps({"slides": votes}))
    report = import_features(tmp_path / "in", out, shard=(1, 2), slides_per_shard=1)
    assert [failure.slide for failure in report.failed] == ["S1"] and "1 of 1 slides have 128 um" in report.failed[
        0
    ].error


def test_a_guessed_patch_size_gives_way_to_the_cohorts(tmp_path):
    write(tmp_path / "in/A_biopsy.h5", size=0, mpp=0, coords=[(0, 0), (1024, 0)])
    write(tmp_path / "in/A_single.h5", size=0, mpp=0, coords=[(512, 768)])
    for number in range(4):
        write(tmp_path / f"in/B{number}.h5", size=0, mpp=0)
    report = import_features(tmp_path / "in", tmp_path / "out", mpp=0.25)
    assert {info.slide_id: info.patch_size for info in Records(tmp_path / "out").slides} == dict.fromkeys(
        ["A_biopsy", "A_single", "B0", "B1", "B2", "B3"], 256
    )
    assert "2 slides (A_biopsy, A_single)" in note(report, "patch size of the other slides used")
    assert "4 slides (B0, B1, B2 and 1 more)" in note(report, "inferred from the gaps")
    assert verify(tmp_path / "out") == [] and not (tmp_path / "out/.parts").exists()


def test_a_patch_size_that_nobody_tells_is_an_error(tmp_path):
    write(tmp_path / "in/A.h5", size=0, coords=[(512, 768)])
    report = import_features(tmp_path / "in", tmp_path / "out")
    assert [failure.slide for failure in report.failed] == ["A"] and "patch size" in report.failed[0].error
    assert import_features(tmp_path / "in", tmp_path / "out", patch_size=512).done == ["A"]


def test_what_vanishes_is_named_and_strict_stops(tmp_path):
    write(tmp_path / "store/B.h5")
    write(tmp_path / "in/A.h5")
    os.symlink(tmp_path / "store", tmp_path / "in/linked")
    (tmp_path / "slides.csv").write_text("slide_id,patient_id\nA,P1\nB,P2\nC,P3\n")
    report = import_features(tmp_path / "in", tmp_path / "out", slides_table=tmp_path / "slides.csv")
    assert report.done == ["A", "B"] and not report.failed and "(C)" in note(report, "match no slide")
    assert [row["slide"] for row in json.loads((tmp_path / "out/failures.json").read_text())] == ["C"]
    os.symlink("/nowhere/D.h5", tmp_path / "in/D.h5")
    how = {"slides_table": tmp_path / "slides.csv"}
    report = import_features(tmp_path / "in", tmp_path / "out", **how)
    assert report.failed and [failure.slide for failure in report.failed] == ["D"]
    report = import_features(tmp_path / "in", tmp_path / "strict", strict=True, **how)
    assert report.failed and not report.done and not list((tmp_path / "strict").glob("*.tfrecord"))
    listed = [row["slide"] for row in json.loads((tmp_path / "strict/failures.json").read_text())]
    assert listed == ["D", "C"] and "before the first slide" in report.summary()

"""Assembly of a shard from parts: a retry, as by cluster runners, gives the same shard and the same result."""

import dataclasses
import os

import numpy as np
import pytest

from data_prep import shards
from data_prep.jobs import Job, Outcome, StageTimings
from data_prep.shards import Progress, assemble, part_traits
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.cohort import majority_cohort
from pathflip_jax.data.records.records import Records, write_shard

SETTINGS = {"cut": "scan", "edge_um": 2048.0}


@pytest.fixture()
def jobs(tmp_path):
    """Four slides of a shard: two good ones, one that failed, one of another width."""
    (tmp_path / ".parts").mkdir()
    found = []
    for number, width in enumerate((8, 8, 0, 9)):
        name = f"S{number}"
        part = tmp_path / ".parts" / f"{name}.tfrecord"
        job = Job(name, "", tmp_path / f"{name}.h5", tmp_path / "pathflip-00000.tfrecord", part, SETTINGS)
        if width:
            features = np.random.default_rng(number).normal(size=(5, width)).astype(np.float32)
            write_shard(job.part, [SlideFeatures(name, "", features)], **SETTINGS)
        found.append(job)
    return found


def _cohort(jobs):
    return majority_cohort([part_traits(job) for job in jobs if job.part.exists()])


def _answer(progress: Progress) -> tuple:
    return progress.done, progress.failed


def test_parts_become_a_shard_and_a_slide_of_another_cohort_stays_out(jobs):
    shard = jobs[0].shard
    cohort = _cohort(jobs)
    progress = assemble(jobs, cohort)
    assert progress.done == ["S0", "S1"] and [failure.slide for failure in progress.failed] == ["S3"]
    assert "S3.h5" in progress.failed[0].error and "feature_dim 9" in progress.failed[0].error
    assert [info.slide_id for info in Records([shard]).slides] == ["S0", "S1"]
    assert [job.part.exists() for job in jobs] == [False, False, False, True]
    before = shard.read_bytes(), shard.stat().st_mtime_ns
    assert _answer(assemble(jobs, cohort)) == _answer(progress)
    assert (shard.read_bytes(), shard.stat().st_mtime_ns) == before


@pytest.mark.parametrize("after", [0, 1])
def test_a_task_killed_while_parts_go_is_tried_again(jobs, monkeypatch, after):
    removed, remove = [], shards.remove

    def dying(part):
        if len(removed) == after:
            raise KeyboardInterrupt
        removed.append(part)
        remove(part)

    cohort = _cohort(jobs)
    monkeypatch.setattr(shards, "remove", dying)
    with pytest.raises(KeyboardInterrupt):
        assemble(jobs, cohort)
    monkeypatch.undo()
    written = jobs[0].shard.read_bytes()
    assert assemble(jobs, cohort).done == ["S0", "S1"] and jobs[0].shard.read_bytes() == written
    assert not jobs[0].part.exists() and not jobs[1].part.exists()


def test_a_slide_that_comes_later_joins_in_order(jobs):
    good = jobs[:2]
    hidden = jobs[0].part.with_suffix(".hidden")
    os.rename(jobs[0].part, hidden)
    assert assemble(good, None).done == ["S1"]
    os.rename(hidden, jobs[0].part)
    assert assemble(good[:1], _cohort(jobs[:1])).done == ["S0"]
    assert [info.slide_id for info in Records([jobs[0].shard]).slides] == ["S0", "S1"]


def test_progress_adds_up(jobs):
    total = Progress(done=["S0"], timings=StageTimings(3, {"encode": 1.0, "read": 2.0}, 10))
    total.count(jobs[2], Outcome("broken", timings=StageTimings(4, {"encode": 0.5}, 30)))
    total.add(Progress(done=["S1"], timings=StageTimings(peak_bytes=20)))
    assert total.done == ["S0", "S1"] and [failure.error for failure in total.failed] == ["broken"]
    assert dataclasses.asdict(total.timings) == {
        "patches": 7,
        "seconds": {"encode": 1.5, "read": 2.0},
        "peak_bytes": 30,
    }

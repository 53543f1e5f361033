"""One run in a folder at a time, on one host, over several, and in a bucket; a process that is gone blocks no other."""

import json
import os
import shutil
import threading
import time

import pytest

from pathflip_jax.data.storage.files import as_path
from pathflip_jax.runs import lock as run_lock
from pathflip_jax.runs.lock import InUseError, StillEndingError, hold


@pytest.fixture(autouse=True)
def seconds(monkeypatch):
    """Hundredths of them."""
    for name, value in {"HEARTBEAT": 0.02, "STALE": 0.2, "ENDING": 0.5, "SETTLE": 0, "POLL": 0.01}.items():
        monkeypatch.setattr(run_lock, f"{name}_SECONDS", value)


def held(*folders, stopped=lambda: False):
    return hold(folders, stopped)


def read(folder):
    return json.loads((folder / "run.lock").read_bytes())


def leave(place, **facts):
    """A lock as a process of this host has it that lives, but for these facts."""
    place.mkdir(exist_ok=True)
    ours = {"host": "node7", "process": os.getpid(), "started": run_lock._start_of(os.getpid()), "since": "noon"}
    ours |= {"kernel": run_lock._kernel(), "folder": place.stat().st_ino, "token": "theirs", "beat": 0}
    (place / "run.lock").write_text(json.dumps(ours | {"ending": False} | facts))


@pytest.mark.parametrize("place", ["", "memory://bucket/run"])
def test_a_second_start_is_refused_while_the_first_lives(tmp_path, place):
    work, home = tmp_path / "work", as_path(place) if place else tmp_path / "home"
    with held(work, home) as lock:
        lock.require(look=True)
        for folders in ((work,), (home,), (tmp_path / "other", home)):
            with pytest.raises(InUseError, match=rf"process {os.getpid()} on .* is running there.*name another folder"):
                with held(*folders):
                    pytest.fail("two runs in one folder")
        assert not (tmp_path / "other").exists()
        first = read(home)["beat"]
        deadline = time.monotonic() + 10
        while read(home)["beat"] <= first + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read(home)["beat"] > first + 1 and read(work)["process"] == os.getpid()
    assert not list(tmp_path.iterdir()) and not (home / "run.lock").exists()  # nothing was written, nothing is left
    with pytest.raises(KeyError), held(work):
        (work / "config.json").touch()
        raise KeyError
    assert [path.name for path in work.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "facts",
    [
        {"process": 2**22 + 1},
        {"started": "another process of this number"},
        {"kernel": ["of a host that is lost"], "started": "1"},
        {"folder": "another, of which this is a copy"},
    ],
)
def test_what_a_run_that_is_gone_left_is_taken_over(tmp_path, facts, capsys):
    leave(tmp_path, **facts)
    with held(tmp_path):
        assert read(tmp_path)["token"] != "theirs"
    said = capsys.readouterr().err
    assert "on node7 (since noon), which is no longer running; this run takes it over" in said
    assert not list(tmp_path.iterdir())
    assert ("waiting for" in said) == ("kernel" in facts)


def test_a_lock_that_says_nothing_is_taken_over_in_time(tmp_path):
    (tmp_path / "run.lock").touch()
    with held(tmp_path):
        assert read(tmp_path)["process"] == os.getpid()


def test_a_run_that_lives_on_another_host_is_seen_by_its_signs_of_life(tmp_path):
    leave(tmp_path, kernel=["another"])
    later = threading.Timer(0.1, leave, [tmp_path], {"kernel": ["another"], "beat": 1})
    later.start()
    with pytest.raises(InUseError, match="on node7 .* is running there"), held(tmp_path):
        pytest.fail("two runs in one folder")
    later.join()
    assert read(tmp_path)["token"] == "theirs"


def test_a_run_that_saves_and_stops_is_waited_for(tmp_path, capsys):
    leave(tmp_path, ending=True)
    later = threading.Timer(0.1, (tmp_path / "run.lock").unlink)
    later.start()
    with held(tmp_path):
        pass
    later.join()
    assert "waiting for process" in (said := capsys.readouterr().err) and "which is saving before it stops" in said
    leave(tmp_path, ending=True)
    for stopped in (False, True):
        with pytest.raises(StillEndingError, match="still saving; start "), held(tmp_path, stopped=lambda: stopped):  # noqa: B023
            pytest.fail("two runs in one folder")


def test_a_run_says_that_it_stops(tmp_path):
    stop = threading.Event()
    with held(tmp_path / "told", stopped=stop.is_set), held(tmp_path / "saving") as lock:
        assert not read(tmp_path / "told")["ending"]
        stop.set()
        lock.ending()
        deadline = time.monotonic() + 10
        while not read(tmp_path / "told")["ending"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert read(tmp_path / "told")["ending"] and read(tmp_path / "saving")["ending"]


def test_a_run_that_was_not_heard_of_and_lost_its_folder_ends_and_leaves_it(tmp_path):
    """As after a host was suspended, which another one took for lost."""
    with pytest.raises(InUseError, match="process .* on node7 .* has taken it over"), held(tmp_path) as lock:
        leave(tmp_path)
        lock.require(look=True)
    assert read(tmp_path)["token"] == "theirs"


def test_a_copy_of_a_run_is_another_run(tmp_path):
    with held(tmp_path / "run"):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with held(tmp_path / "copy"):
            pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match=r"run/run\.lock: cannot lock the folder for this run .*fix permissions"):
        with held(tmp_path / "run"):
            pass

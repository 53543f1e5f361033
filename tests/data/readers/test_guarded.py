"""The worker that parses files: arrays return intact, and a reader's crash, stall or memory use is the file's error."""

import os
import signal
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from pathflip_jax.data.readers import guarded

READERS = """
import os, signal, time
import numpy as np
from pathflip_jax.data.readers.guarded import Refused, shared_empty

def echo(path, *arguments):
    shared = shared_empty((3, 2), np.dtype("f4"), 100, "x")
    shared[...] = [[1, 2], [3, 4], [5, 6]]
    arrays = {"shared": shared, "copied": np.arange(4)[::2], "none": np.zeros((0, 5), "f2"), "number": np.float64(7)}
    return {"arguments": arguments, "content": open(path).read(), "process": os.getpid()}, arrays

def crash(path):
    os.kill(os.getpid(), signal.SIGSEGV)

def crash_the_used(path):
    import builtins
    if hasattr(builtins, "used"):
        crash(path)
    builtins.used = True
    return {}, {}

def compute(path):
    while True:
        pass

def wait(path):
    time.sleep(60)

def grab(path):
    return {}, {"x": np.ones(2**28)}

def declare(path, rows):
    return {}, {"x": shared_empty((rows, 512), np.dtype("f4"), os.path.getsize(path), "'features'")}

def refuse(path):
    raise Refused("no patches in it")

def fail(path):
    raise RuntimeError("library")

def lack(path):
    import no_such_module
"""


@pytest.fixture(scope="module", autouse=True)
def readers(tmp_path_factory):
    """A module of readers that the worker can import; the worker of other tests does not know its folder."""
    folder = tmp_path_factory.mktemp("readers")
    (folder / "guarded_readers.py").write_text(textwrap.dedent(READERS))
    guarded._stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        yield
    guarded._stop()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.h5"
    path.write_text("hello")
    return path


def parse(reader, file, *arguments, **limits):
    return guarded.parse(f"guarded_readers:{reader}", file, *arguments, **limits)


def test_facts_and_arrays_come_back(file):
    for _ in range(2):
        facts, arrays = parse("echo", file, 1, ["a"])
        assert facts["arguments"] == [1, ["a"]] and facts["content"] == "hello" and facts["process"] != os.getpid()
        assert arrays["shared"].dtype == np.float32 and arrays["shared"].tolist() == [[1, 2], [3, 4], [5, 6]]
        assert arrays["copied"].tolist() == [0, 2] and arrays["none"].shape == (0, 5) and arrays["number"] == 7


def test_one_worker_serves_until_a_library_fails(file):
    first = parse("echo", file)[0]["process"]
    with pytest.raises(ValueError, match=r"x\.h5: no patches in it"):
        parse("refuse", file)
    assert parse("echo", file)[0]["process"] == first
    with pytest.raises(ValueError, match=r"x\.h5: its reader failed \(RuntimeError: library\)"):
        parse("fail", file)
    assert parse("echo", file)[0]["process"] != first, "a library that failed may have broken more than its file"


def test_a_crash_is_the_error_of_its_file(file):
    with pytest.raises(ValueError, match=r"x\.h5: its reader crashed \(SIGSEGV\).*copy or extract it again"):
        parse("crash", file)
    assert parse("echo", file)


def test_a_crash_owed_to_an_earlier_file_is_not_blamed_on_the_next(file):
    for _ in range(3):  # every second one ends the worker, which a fresh one makes good
        assert parse("crash_the_used", file) == ({}, {})


def test_a_reader_that_never_stops_computing(file, monkeypatch):
    monkeypatch.setattr(guarded, "COMPUTING", 1)
    with pytest.raises(ValueError, match=r"x\.h5: its reader was still computing after 2 s"):
        parse("compute", file)


def test_a_reader_that_never_answers(file, monkeypatch):
    monkeypatch.setattr(guarded, "WAITING", 1)
    with pytest.raises(ValueError, match=r"x\.h5: its reader did not answer within 1 s"):
        parse("wait", file)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory is mapped")
def test_a_reader_that_takes_too_much_memory(file):
    with pytest.raises(ValueError, match=r"x\.h5: its reader needs more than 100 MB"):
        parse("grab", file, memory=100_000_000)


def test_an_array_larger_than_its_file_can_hold(file):
    with pytest.raises(ValueError, match=r"x\.h5: 'features' of shape .*2\.048e\+06 GB.* in a file of 5e-06 MB"):
        parse("declare", file, 10**12)
    assert parse("declare", file, 1000)[1]["x"].shape == (1000, 512)


def test_a_missing_library_is_an_import_error(file):
    with pytest.raises(ImportError, match=r"x\.h5: .*no_such_module"):
        parse("lack", file)


def test_a_worker_killed_by_others_is_replaced(file):
    os.kill(parse("echo", file)[0]["process"], signal.SIGKILL)
    assert parse("echo", file)


def test_threads_take_turns(file):
    found = []
    threads = [threading.Thread(target=lambda: found.append(parse("echo", file)[1]["shared"].sum())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [21] * 8


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:os.fork.*:RuntimeWarning")
def test_a_forked_process_starts_its_own(file):
    ours, (reads, writes) = parse("echo", file)[0]["process"], os.pipe()
    child = os.fork()
    if not child:
        os.write(writes, str(parse("echo", file)[0]["process"]).encode())
        guarded._stop()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert int(os.read(reads, 20)) != ours == parse("echo", file)[0]["process"]
    os.close(reads), os.close(writes)


def test_the_worker_ends_with_its_process(file, tmp_path):
    """One that is killed says nothing to its worker: the closed socket does."""
    script = "import os, sys; from pathflip_jax.data.readers import guarded; "
    script += f"sys.path.append({sys.path[-1]!r}); found = guarded.parse('guarded_readers:echo', {str(file)!r}); "
    script += "print(found[0]['process'], flush=True); os.kill(os.getpid(), 9)"
    import subprocess

    worker = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout)

    assert ends(worker)


def test_a_reader_that_nobody_needs_any_more_ends_its_worker(file):
    reader = guarded.Reader()
    worker = reader.parse("guarded_readers:echo", file)[0]["process"]
    del reader
    assert ends(worker)


def ends(process: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False

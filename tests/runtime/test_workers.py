"""Worker processes: started from any script and by any process, ended with it, limited in time."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from pathflip_jax.runtime.workers import DEATHS, Worker, exit_name, limits, worker_number

SCRIPT = """
import os
from pathflip_jax.runtime.workers import Worker
print("script", flush=True)
{preloaded}
print(worker.submit(os.getpid).result() != os.getpid())
worker.stop()
"""


@pytest.fixture
def worker():
    worker = Worker(3)
    yield worker
    worker.stop()


@pytest.mark.parametrize("made", ["Worker()", "Worker(preload='json')"])
def test_a_script_need_not_be_made_for_workers(made, tmp_path):
    """Nothing guards its body by `if __name__ == "__main__"`, and no worker runs it again."""
    (tmp_path / "script.py").write_text(SCRIPT.format(preloaded=f"worker = {made}"))
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["script", "True"], "")


def test_the_process_is_kept_between_jobs_and_replaced_after_a_death(worker):
    first = worker.submit(os.getpid).result()
    assert worker.submit(os.getpid).result() == first != os.getpid()
    death = worker.submit(eval, "__import__('os').kill(__import__('os').getpid(), 11)").exception()
    assert isinstance(death, DEATHS) and exit_name(death) == "SIGSEGV"
    assert exit_name(worker.submit(os._exit, 3).exception()) == "exit code 3"
    assert worker.submit(worker_number).result() == 3 and worker.submit(os.getpid).result() != first


def test_a_process_that_ends_between_two_jobs_is_replaced(worker):
    first = worker.submit(os.getpid).result()
    os.kill(first, signal.SIGKILL)
    time.sleep(0.5)  # until it is noticed
    assert worker.submit(os.getpid).result() != first


def test_a_job_that_takes_too_long_is_ended(worker):
    start = time.monotonic()
    worker.submit(os.getpid).result()
    with pytest.raises(TimeoutError):
        worker.submit(time.sleep, 60, seconds=0.2).result()
    assert time.monotonic() - start < 30
    assert worker.submit(os.getpid).result()


def _ask_within(pipe) -> None:
    pipe.send(Worker().submit(os.getppid).result())


def test_a_daemon_may_have_a_worker():
    """The workers of PyTorch's loaders are daemons, which multiprocessing lets start no process."""
    ours, theirs = multiprocessing.Pipe()
    daemon = multiprocessing.get_context("spawn").Process(target=_ask_within, args=(theirs,), daemon=True)
    daemon.start()
    assert ours.poll(60) and ours.recv() == daemon.pid
    daemon.join(30)
    assert daemon.exitcode == 0, "its worker kept it from ending"


def test_limits_hold_in_workers_alone(worker):
    with limits(0.01, 0):
        time.sleep(0.05)
    stall = "(held := __import__('pathflip_jax.runtime.workers', fromlist='x').limits(0.1, 2**30)).__enter__() or "
    death = worker.submit(eval, stall + "__import__('time').sleep(60)").exception()
    assert exit_name(death) == "SIGALRM"

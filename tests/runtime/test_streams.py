"""A closed output pipe neither ends a command nor changes its exit code; output lost to a full disk is an error."""

import subprocess
import sys

import pytest

PRINTS = """
import os, sys
from pathflip_jax.runtime import streams
streams.keep_open()
with open(sys.argv[1], "w") as file:
    for number in range(5000):
        print("a line of results", number)
        print("a line of the log", number, file=sys.stderr)
    if not os.path.samefile("/dev/full", "/proc/self/fd/2"):
        os.write(2, b"a line of a library")
    file.write("content")
streams.flush()
sys.exit(7)
"""


def run(redirected: str, file, *options: str) -> tuple[int, str]:
    """The exit code of a program that prints much, with its streams as bash leaves them; what others said on stderr."""
    line = f'set -o pipefail; "$@" {redirected}'
    command = ["bash", "-c", line, "bash", sys.executable, *options, "-c", PRINTS, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.mark.parametrize("options", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "redirected",
    ["2> /dev/null | head -n 1", "2>&1 > /dev/null | head -n 1", "<&- >&- 2>&-", "> /dev/null 2> /dev/full"],
)
def test_a_stream_that_nobody_reads_ends_nothing(redirected, options, tmp_path):
    assert run(redirected, tmp_path / "file", *options) == (7, "")
    assert (tmp_path / "file").read_text() == "content"  # no stream's place was given to it


def test_results_that_a_full_disk_loses_are_an_error(tmp_path):
    code, said = run("> /dev/full", tmp_path / "file")
    assert code == 1 and "OSError: [Errno 28] No space left on device; write it elsewhere: 'standard output'" in said


def test_what_the_encoding_lacks_is_written_as_an_escape():
    code = "from pathflip_jax.runtime import streams; streams.keep_open(); print('µm \\udcfc')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\\xb5m \\udcfc\n", b"")

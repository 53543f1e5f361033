"""Stand-ins for gcloud, srun, kubectl, ... on the PATH: they record how they were called and do a little of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

PRELUDE = """#!{python} -IS
import json, os, sys, time
from pathlib import Path
HERE, argv = Path({folder!r}), sys.argv[1:]
with open(HERE / "calls", "a") as out:
    out.write(json.dumps([{name!r}, *argv]) + "\\n")
def next_line(name, default):  # what is planned for this call
    path = HERE / name
    lines = path.read_text().split() if path.exists() else []
    path.write_text(" ".join(lines[1:]))
    return lines[0] if lines else default
"""

# `gcloud storage` over folders: gs://lab/x is buckets/lab/x. Copies end as planned: whole (0) or after so many files.
BUCKETS = """
import re, shutil
def place(text):
    return HERE / "buckets" / text.removeprefix("gs://") if text.startswith("gs://") else Path(text)
if argv[:2] == ["storage", "cp"]:
    source, target = argv[2:]
    if source == "-":
        place(target).parent.mkdir(parents=True, exist_ok=True)
        place(target).write_text(sys.stdin.read())
    elif not place(source).exists():
        sys.exit(1)
    else:
        shutil.copy(place(source), place(target))
    sys.exit()
if argv[:2] == ["storage", "rsync"]:
    flags = [word for word in argv[2:] if word.startswith("--")]
    source, target = (place(word) for word in argv[2:] if not word.startswith("--"))
    skip = [flag.removeprefix("--exclude=") for flag in flags if flag.startswith("--exclude=")]
    if not source.is_dir() or not target.is_dir() and "gs:" not in argv[-1]:
        sys.exit(1)
    most = int(next_line("copies", "0")) or 10**6
    def files(folder):
        names = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
        return [name for name in names if not any(re.match(rule, name) for rule in skip)]
    for number, name in enumerate(files(source)):
        if number == most:
            sys.exit(1)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
    if "--delete-unmatched-destination-objects" in flags:
        for name in set(files(target)) - set(files(source)):
            (target / name).unlink()
    sys.exit()
"""


class StandIns:
    """A folder that comes first on the PATH."""

    def __init__(self, folder: Path):
        self.folder, self._started = folder, []

    def add(self, name: str, body: str = "") -> None:
        """A program of this name; `body` is Python that sees `argv`, HERE (this folder) and next_line."""
        path = self.folder / name
        path.write_text(PRELUDE.format(python=sys.executable, folder=str(self.folder), name=name) + body)
        path.chmod(0o755)

    def plan(self, name: str, *lines: object) -> None:
        """Outputs of next_line(name), call by call."""
        (self.folder / name).write_text(" ".join(map(str, lines)))

    def calls(self, *begin: str) -> list[list[str]]:
        """The calls so far that begin with these words."""
        path = self.folder / "calls"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in calls if call[: len(begin)] == list(begin)]

    def bucket(self, url: str) -> Path:
        """The folder behind gs://..."""
        return self.folder / "buckets" / url.removeprefix("gs://")

    def start(self, script: str, *options: str, **settings: object) -> subprocess.Popen:
        """Start a launch script with these settings and nothing else of this environment."""
        path = f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.folder), "TMPDIR": str(self.folder), "JAX_PLATFORMS": "cpu"}
        environment |= {name: str(value) for name, value in settings.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([LAUNCH / script, *options], env=environment, start_new_session=True, **pipes)
        self._started.append(process)
        return process

    def run(self, script: str, *options: str, **settings: object) -> subprocess.CompletedProcess:
        """Run a launch script to its end."""
        process = self.start(script, *options, **settings)
        out, err = process.communicate(timeout=400)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def end(self) -> None:
        """Leave nothing behind, whatever a test did not wait for."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


@pytest.fixture
def stand_ins(tmp_path) -> Iterator[StandIns]:
    """No stand-in yet."""
    (tmp_path / "bin").mkdir()
    stand_ins = StandIns(tmp_path / "bin")
    yield stand_ins
    stand_ins.end()


@pytest.fixture
def buckets(stand_ins, tiny_cohort) -> StandIns:
    """A `gcloud storage` whose gs://lab/cohort holds the tiny cohort."""
    stand_ins.add("gcloud", BUCKETS)
    cohort = stand_ins.bucket("gs://lab/cohort")
    shutil.copytree(tiny_cohort.records, cohort / "records")
    shutil.copytree(tiny_cohort.vocabulary, cohort / "vocabulary")
    for path in (tiny_cohort.texts, tiny_cohort.slides):
        shutil.copy(path, cohort / path.name)
    return stand_ins

"""Runner of peers: tests that need an environment of their own, built once under .peers/ (`make test-peers`).

    python tests/peers/run.py [NAME ...] [--jobs N] [--torch torch==VERSION]

A peer is a folder here with a `peer.toml`:

    proves = "what holds when it passes"
    requirements = "requirements/peers/NAME.txt"   # pinned; installed without their dependencies
    python = "3.13"            # if it differs from the project's own environment
    torch = true               # install the CPU build of the Makefile, if there is one for that Python
    project = true             # install this project too, editable
    suite = ["tests/data"]     # quick tests of the ordinary suite to run; otherwise those of the peer's folder

`prepare.py`, if there is one, runs first in the project's own environment and writes the input of the peer to the
folder that it is given; the tests find that folder in PEER_INPUT. Exits with 1 if a peer fails or could not be built.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

PEERS = Path(__file__).parent
ROOT = PEERS.parents[1]
ENVIRONMENTS = ROOT / ".peers"


def read_peers() -> dict[str, dict]:
    """The settings of every peer by its name."""
    return {path.parent.name: tomllib.loads(path.read_text()) for path in sorted(PEERS.glob("*/peer.toml"))}


def find_python(version: str) -> str:
    """Interpreter of a version such as 3.13, from PATH or pyenv. Raises FileNotFoundError if there is none."""
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for command in (shutil.which(f"python{version}"), *map(str, installed)):
        if command and subprocess.run([command, "-c", ""], capture_output=True).returncode == 0:
            return command
    raise FileNotFoundError(f"no Python {version} on PATH or in ~/.pyenv/versions: install it, or run only other peers")


def build(name: str, peer: dict, torch: str) -> Path:
    """The Python of the peer's environment, which is rebuilt if its requirements have changed."""
    environment = ENVIRONMENTS / name
    python, stamp = environment / "bin" / "python", environment / "built"
    requirements = ROOT / peer["requirements"]
    wanted = hashlib.sha256(repr(sorted(peer.items())).encode() + requirements.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(environment, ignore_errors=True)
    base = find_python(peer["python"]) if "python" in peer else sys.executable
    subprocess.run([base, "-m", "venv", environment], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--requirement", requirements], check=True)
    if peer.get("project"):
        subprocess.run([*pip, "--editable", ROOT], check=True)
    if peer.get("torch"):
        index = os.environ.get("TORCH_INDEX", "")
        subprocess.run([python, ROOT / "requirements/torch_cpu.py", torch, "--index-url", index], check=True)
    stamp.write_text(wanted)
    return python


def run_tests(name: str, peer: dict, python: Path, jobs: int) -> int:
    """Run the peer's tests in its environment; returns their exit code."""
    given = ENVIRONMENTS / f"{name}-input"
    shutil.rmtree(given, ignore_errors=True)
    given.mkdir()
    own = PEERS / name
    if (own / "prepare.py").is_file():
        subprocess.run([sys.executable, own / "prepare.py", given], check=True, cwd=ROOT)
    environment = os.environ | {"PEER_INPUT": str(given), "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "pytest", "-q"]
    if "suite" in peer:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(ENVIRONMENTS / f"{name}-cache" / "jax")
        command += ["-m", "not slow", "-o", f"cache_dir={ENVIRONMENTS / f'{name}-cache'}"]
        command += ["--numprocesses", str(jobs), "--dist", "loadfile", "--no-loadscope-reorder", *peer["suite"]]
    else:
        command += ["-c", PEERS / "pytest.ini", "--rootdir", ROOT, own]  # else a folder hides a library of its name
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main() -> int:
    """Run the named peers, or all, and print the result of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = read_peers()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"peers to run, of {', '.join(peers)}; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="parallel test processes (2)")
    parser.add_argument(
        "--torch", default="torch==2.13.0", help="torch requirement of peers that need it (torch==2.13.0)"
    )
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - peers.keys()):
        parser.error(f"unknown peer: {', '.join(unknown)}; expected some of {', '.join(peers)}")
    results = {}
    for name in options.names or peers:
        print(f"== {name}: {peers[name]['proves']}", flush=True)
        start = time.monotonic()
        try:
            code = run_tests(name, peers[name], build(name, peers[name], options.torch), options.jobs)
            results[name] = "passed" if code == 0 else f"FAILED (pytest's exit code {code})"
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            results[name] = f"NOT RUN: {error}"
        results[name] += f", {time.monotonic() - start:.0f} s"
    print("\n".join(f"peer {name}: {result}" for name, result in results.items()))
    return int(not all(result.startswith("passed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())

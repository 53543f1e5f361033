"""Install the CPU build of torch for the tests, or say why not; never gigabytes of CUDA.

On Linux the main package index serves torch built for CUDA. This asks pip which build it would install, from
the configured index or the given one, and installs it only if it requires no CUDA library. Run with the
environment's own Python: `python requirements/torch_cpu.py torch==2.13.0 [--index-url URL]`.
"""

import argparse
import json
import subprocess
import sys
from importlib import metadata

from pip._vendor.packaging.requirements import Requirement

PIP = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]


def cuda_requirements(requirement: str, index: list[str]) -> list[str] | None:
    """CUDA packages that the torch found by pip would pull in on this machine; None where pip finds no torch."""
    asked = subprocess.run([*PIP, "--dry-run", "--report", "-", *index, requirement], capture_output=True, text=True)
    if asked.returncode:
        return None
    found = json.loads(asked.stdout)["install"]
    requires = [Requirement(line) for item in found for line in item["metadata"].get("requires_dist", [])]
    wanted = [r for r in requires if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [r.name for r in wanted if r.name.startswith(("nvidia-", "cuda-", "triton"))]


def main() -> int:
    """Install, and return 0 also where no CPU build is available: the tests that need torch then skip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requirement", help="the exact version, such as torch==2.13.0")
    parser.add_argument("--index-url", default="", help="an index of CPU builds; empty to use pip's own settings")
    options = parser.parse_args()
    name, _, version = options.requirement.partition("==")
    try:
        if metadata.version(name).split("+")[0] == version:
            return 0
    except metadata.PackageNotFoundError:
        pass
    index = ["--index-url", options.index_url] if options.index_url else []
    cuda = cuda_requirements(options.requirement, index)
    if cuda is None or cuda:
        found = (
            "pip finds no such version" if cuda is None else f"pip would pick a CUDA build ({', '.join(cuda[:3])}, ...)"
        )
        print(
            f"{options.requirement} is not installed: {found}. The tests that need torch will be skipped. To run them, "
            "give an index of CPU builds (pytorch.org lists it): make test TORCH_INDEX=URL"
        )
        return 0
    return subprocess.run([*PIP, *index, options.requirement]).returncode


if __name__ == "__main__":
    sys.exit(main())

"""Import path of the benchmarks, which are scripts that import each other."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark_modules():
    """benchmark_modules(name) imports benchmarks/<name>.py; the imports are removed after each test file."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")} | {"accelerator_parts", "real_tissue_parts"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] in names]:
        del sys.modules[name]

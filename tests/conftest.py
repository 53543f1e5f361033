"""Shared test setup: compilation effort, parallel processes, and a tiny cohort on disk."""

import gc
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import finish_folder, shard_name, write_shard
from pathflip_jax.data.texts.wordpiece import train_wordpiece

# Nearly all the time of the suite goes to compiling, before anything here imports JAX. A program compiles in a fraction
# of the time, to the same mathematics, without the optimisation of LLVM, without the newer emitters of fused loops, and
# in one piece; those of an earlier run are taken as they are. A folder for each test process: entries of the cache do
# not appear whole.
PROCESS = os.environ.get("PYTEST_XDIST_WORKER", "alone")
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end a process that names this flag
    QUICK_TO_COMPILE += ("--xla_cpu_use_fusion_emitters=false",)
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK_TO_COMPILE))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax" / PROCESS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

collect_ignore = ["peers"]  # they run in environments of their own: `make test-peers`

# Files that take a process minutes, the longest first.
LONG = (
    "benchmarks/test_faults.py",
    "launch/test_launch_processes.py",
    "benchmarks/test_sides.py",
    "runtime/test_two_processes.py",
    "data/storage/test_buckets.py",
    "benchmarks/test_aot.py",
    "runtime/test_sharding.py",
    "training/test_loop.py",
    "vision/test_encoders.py",
    "viewer/test_page.py",
    "test_wheel.py",
    "llm/test_generate.py",
    "model/test_pathflip2.py",
    "model/test_pathflip.py",
    "training/test_language.py",
    "test_pathflip2.py",
    "runs/test_checkpoints.py",
    "inference/test_assistant.py",
    "data_prep/test_beam.py",
    "docs/test_tutorial.py",
    "export/test_from_finetune.py",
    "model/test_layers.py",
    "llm/test_decoder.py",
    "convert/test_torch_model.py",
    "convert/test_decoder.py",
    "evaluate/test_run.py",
    "runtime/test_memory.py",
)

SENTENCES = (
    "Glands infiltrate the stroma.",
    "Necrosis is extensive.",
    "Fat is seen at the edge.",
    "No mucin is present.",
    "Lymphoid aggregates are dense.",
    "The tumor measures 1.8 cm.",
)


def _beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


decoder_folder = _beside("decoder_folders").decoder_folder  # a fixture
small_encoder = _beside("vision_weights").small_encoder  # a fixture; the module is imported by tests under this name
if importlib.util.find_spec("beartype") is not None:  # most environments of `make test-peers` lack it
    _shapes = _beside("shapes")
    _shapes.install()
else:
    _shapes = None


@pytest.fixture(autouse=True)
def _strict(request: pytest.FixtureRequest) -> Iterator[None]:
    """Shapes, dtypes and ranks as the code says, in the tests of operations, networks and losses."""
    strict_rooms = {Path(__file__).with_name(room) for room in ("ops", "model", "vision", "losses")}
    with _shapes.strict() if request.path.parent in strict_rooms else nullcontext():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first: else one process begins the longest when nothing is left for the other."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    """Freeze the objects of the imports, so that Python's garbage collector does not scan them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Gives a port that nothing listens on."""

    def find() -> int:
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            return listener.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def run_together():
    """Runs commands side by side to their end, each in its environment: exit codes, and (stdout, stderr) of each."""

    def run(commands, environments, timeout: float = 300) -> tuple[list[int], list[tuple[str, str]]]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen(c, env=e, **pipes) for c, e in zip(commands, environments, strict=True)]
        try:
            said = [process.communicate(timeout=timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        return [process.returncode for process in started], said

    return run


@dataclass(frozen=True)
class Cohort:
    """Paths of the parts of a cohort. Tests that change files work on a copy."""

    records: Path
    texts: Path
    slides: Path
    vocabulary: Path
    scratch: Path

    def copy_records(self) -> Path:
        """A copy of the records that a test may damage."""
        return Path(shutil.copytree(self.records, self.scratch / f"copy{len(list(self.scratch.iterdir()))}"))

    def settings(self) -> list[str]:
        """The options of `pathflip train` that name this cohort."""
        parts = {"records": self.records, "texts": self.texts, "slides": self.slides, "tokenizer": self.vocabulary}
        return [f"--config.data.{name}={path}" for name, path in parts.items()]


@pytest.fixture
def task_of_folds(tiny_cohort, tmp_path) -> Path:
    """The tiny cohort's table as a task of Patho-Bench: fold_0 is its split, fold_1 the split with sides exchanged."""
    exchanged = {"train": "train", "val": "test", "test": "val"}
    rows = [line.split(",") for line in tiny_cohort.slides.read_text().splitlines()[1:]]
    lines = ["case_id\tslide_id\tstructure\tfold_0\tfold_1"]
    lines += [f"{p}\t{slide}\t{int(label == 'solid')}\t{s}\t{exchanged[s]}" for slide, p, label, s in rows]
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "k=all.tsv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("task_col: structure\nlabel_dict: {0: glandular, 1: solid}\n")
    return folder / "k=all.tsv"


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory) -> Cohort:
    """24 slides of 16 wide random features; a third each for train, val and test; two slides to every sixth patient."""
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    slides, texts, table = [], [], ["slide_id,patient_id,label,split"]
    for number in range(24):
        name, patient = f"S{number:02d}", f"P{number - (number % 6 == 1):02d}"
        grid = np.stack(np.meshgrid(np.arange(6), np.arange(5)), axis=-1).reshape(-1, 2)
        grid = grid[rng.random(len(grid)) < 0.8]
        features = rng.normal(size=(len(grid), 16)).astype(np.float32)
        place = {"coords": (grid * 64).astype(np.int32), "patch_size": 64, "mpp": 0.5, "width": 384, "height": 320}
        slides.append(SlideFeatures(name, patient, features, encoder="tiny", **place))
        caption = " ".join(rng.permutation(SENTENCES)[:5])
        texts.append({"slide_id": name, "case_id": patient, "caption": caption})
        split = ("train", "train", "val", "test")[number // 6]
        table.append(f"{name},{patient},{'glandular' if number % 2 else 'solid'},{split}")
    records = folder / "records"
    records.mkdir()
    for shard in range(2):
        write_shard(records / shard_name(shard), slides[shard * 12 : shard * 12 + 12], edge_um=64.0)
    finish_folder(records, edge_um=64.0)
    (folder / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "slides.csv").write_text("\n".join(table) + "\n")
    train_wordpiece([row["caption"] for row in texts], folder / "vocabulary", vocab_size=200)
    (folder / "scratch").mkdir()
    parts = ("records", "reports.jsonl", "slides.csv", "vocabulary", "scratch")
    return Cohort(*(folder / part for part in parts))

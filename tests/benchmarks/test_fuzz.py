"""A few hundred inputs of the campaign, and detection of each kind of fault."""

import json
import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.compilation_cache.compilation_cache import reset_cache

for name in ("torch", "h5py"):
    pytest.importorskip(name)

# Only a few inputs of these: they start processes or read whole folders.
SLOW = {"checkpoint", "slide prepare", "slide thumbnail", "manifest"}


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("fuzz")


@pytest.fixture(scope="module")
def sandbox(bench, tmp_path_factory):
    """A sandbox as in the campaign, which sets `tempdir`; a compilation cache would count as written outside."""
    kept = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", None)
        yield bench.Sandbox(tmp_path_factory.mktemp("fuzz") / "one")
    jax.config.update("jax_enable_compilation_cache", kept)
    reset_cache()


def known(benchmark_modules):
    return {reader.name: reader for reader in benchmark_modules("fuzz_readers").readers()}


@pytest.mark.filterwarnings("ignore")  # warnings of NumPy and h5py about unusual values
def test_broken_files_are_read_or_refused_by_name(bench, benchmark_modules, sandbox):
    readers = known(benchmark_modules)
    accepted = set()
    for name, reader in readers.items():
        if name in SLOW:
            continue
        for number in range(6 if name[:2] == "h5" else 14):
            attempt = sandbox.attempt(reader, 7, number)
            assert attempt.outcome in bench.PASSED, f"{name}: {attempt}"
            accepted |= {name} if attempt.outcome == "accepted" else set()
    assert len(accepted) > len(readers) / 2, "a reader that refuses everything is not tried"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(SLOW))
def test_broken_slides_and_checkpoints(bench, benchmark_modules, sandbox, name):
    reader = known(benchmark_modules)[name]
    for number in range(12):
        attempt = sandbox.attempt(reader, 7, number)
        assert attempt.outcome in bench.PASSED, f"{name}: {attempt}"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_in_any_place(bench, benchmark_modules, sandbox, data):
    """Valid files with bytes inserted by hypothesis, which shrinks failing examples."""
    readers = known(benchmark_modules)
    reader = readers[data.draw(st.sampled_from(sorted(set(readers) - SLOW - {"pt", "state dict"})))]
    sandbox.load(reader)
    seed = data.draw(st.sampled_from(sandbox.sound))
    start, size = data.draw(st.integers(0, len(seed))), data.draw(st.integers(0, 12))
    inserted = data.draw(st.binary(max_size=12) | st.sampled_from(benchmark_modules("mutations").TOKENS))
    broken = seed[:start] + inserted + seed[start + size :]
    # The sandbox takes this for the reader that it has loaded.
    sandbox.reader = broken_reader = replace(reader, mutate=lambda rng, seeds: broken)
    attempt = sandbox.attempt(broken_reader, 0, 0)
    sandbox.reader = reader
    assert attempt.outcome in bench.PASSED, f"{reader.name}: {attempt}"


def probe(benchmark_modules, read):
    return benchmark_modules("fuzz_readers").Reader(
        "probe", 1, "x.bin", lambda _: [b"hello"], lambda rng, seeds: seeds[0], read
    )


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("outcome", "read"),
    [
        ("accepted", lambda path, out: (out / "x").write_text("fine")),
        ("refused", lambda path, out: fail(ValueError(f"{path}: no"))),
        ("unnamed", lambda path, out: fail(OSError("no"))),
        ("type", lambda path, out: fail(KeyError(f"{path}"))),
        ("outside", lambda path, out: (out / "../../../x.npz").write_text("there")),
        ("outside", lambda path, out: os.mkdir(out.parents[2] / "made")),
        ("code", lambda path, out: (out.parents[1] / "seeds" / "canary").touch()),
        ("code", lambda path, out: os.system("true")),
    ],
)
def test_a_fault_is_seen(benchmark_modules, sandbox, outcome, read):
    assert sandbox.attempt(probe(benchmark_modules, read), 0, 0).outcome == outcome
    for left in ("x.npz", "made"):
        place = sandbox.out.parents[2] / left
        place.rmdir() if place.is_dir() else place.unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore")
def test_the_payloads_would_run_where_they_are_let(bench, benchmark_modules, sandbox):
    """The canary works: the payloads that the campaign feeds to .pt readers create the file that it watches."""
    reader = known(benchmark_modules)["pt"]
    sandbox.load(reader)
    payloads = [seed for seed in sandbox.sound if seed[:1] == b"\x80" and str(sandbox.canary).encode() in seed]
    trusting = replace(reader, read=lambda path, out: pickle.loads(path.read_bytes()))
    found = set()
    for payload in payloads:
        sandbox.reader = eager = replace(trusting, mutate=lambda rng, seeds, payload=payload: payload)
        found.add(sandbox.attempt(eager, 0, 0).outcome)
    assert len(payloads) > 5 and found == {"code"}
    sandbox.reader = None


@pytest.mark.filterwarnings("ignore")
def test_an_input_is_a_function_of_seed_and_number(benchmark_modules, sandbox):
    for reader in known(benchmark_modules).values():
        if reader.name in ("h5 clam", "csv slides", "json captions", "pt", "tfrecord"):
            sandbox.load(reader)
            drawn = [[reader.mutate(random.Random(n), sandbox.sound) for n in range(5)] for _ in range(2)]
            assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1, reader.name


def test_the_memory_of_a_worker_does_not_begin_at_that_of_the_campaign(bench):
    """The peak of getrusage would: a process started from a large one would exceed the limit with any file."""
    ballast = np.ones(2**29, np.uint8)
    command = [sys.executable, "-c", "import fuzz; print(fuzz.peak_bytes())"]
    done = subprocess.run(command, cwd=Path(bench.__file__).parent, capture_output=True, text=True, check=True)
    assert 1e6 < int(done.stdout) < ballast.nbytes


@pytest.mark.slow
def test_the_campaign_writes_its_table(bench, tmp_path, monkeypatch, capsys):
    out = tmp_path / "f.json"
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--inputs=60", "--h5=8", "--jobs=1", "--json", str(out)])
    assert bench.main() == 0
    found = json.loads(out.read_text())
    assert found["inputs"] == 60 == sum(sum(row.values()) for row in found["readers"].values())
    assert sum(row["accepted"] + row["refused"] for row in found["readers"].values()) == 60
    assert not any(found["faults"].values()) and "60 inputs in" in capsys.readouterr().out


def test_inputs_are_shared_out(bench):
    counts = {name: len(numbers) for name, numbers in bench.share_out(100_000, 5_000, 0, None).items()}
    assert sum(counts.values()) == 100_000 and np.sum([n for name, n in counts.items() if name[:3] == "h5 "]) == 5_000
    assert min(counts.values()) > 100 and bench.share_out(3, 1, 5, "pt") == {"pt": [5, 6, 7]}
    with pytest.raises(ValueError, match="none of the readers: h5 clam"):
        bench.share_out(3, 1, 5, "x")

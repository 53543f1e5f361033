"""The records benchmark: a complete run that compares with every format it names."""

import json
import sys

import pytest

for name in ("torch", "h5py"):
    pytest.importorskip(name)


def test_every_format_is_written_and_read(benchmark_modules, tmp_path, monkeypatch):
    bench, out = benchmark_modules("records"), tmp_path / "records.json"
    sizes = ["--slides=2", "--patches=600", "--width=8", "--regions=2", "--repeats=1"]
    monkeypatch.setattr(sys, "argv", ["records.py", *sizes, "--json", str(out)])
    bench.main()
    found = json.loads(out.read_text())["results"]
    assert set(found) == {"write", "cohort", "slide", "regions"}
    for formats in found.values():
        assert formats["records"]["ratio"] == 1.0 and len(formats) > 2
        assert all(row["ms"] > 0 for row in formats.values())

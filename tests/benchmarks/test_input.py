"""The benchmark of the input pipeline: captions, the DataLoader side, arithmetic, and a complete tiny run."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
h5py = pytest.importorskip("h5py")
pytest.importorskip("transformers")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ["--slides=4", "--patches=600", "--width=8", "--batch-size=2", "--epochs=1", "--repeats=2", "--workers=1"]


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("input")


def test_captions_have_the_length_of_real_ones(bench, tmp_path):
    captions = bench.make_captions(60, tmp_path, np.random.default_rng(0))
    tokenizer = bench.AutoTokenizer.from_pretrained(tmp_path)
    lengths = [len(ids) for ids in tokenizer(captions)["input_ids"]]
    assert abs(np.mean(lengths) - 222) < 12
    assert max(lengths) < 400
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(captions)["input_ids"])
    sentences = [bench.split_sentences(caption) for caption in captions]
    assert 6 < np.mean([len(s) for s in sentences]) < 10
    assert all(caption.count(".") == len(s) for caption, s in zip(captions, sentences, strict=True))


@pytest.mark.parametrize("suffix", [".h5", ".pt"])
def test_their_side_reads_whole_files_and_draws_runs_of_patches(bench, tmp_path, suffix):
    features = np.arange(700 * 4, dtype=np.float16).reshape(700, 4) / 4
    path = tmp_path / f"a{suffix}"
    if suffix == ".h5":
        with h5py.File(path, "w") as file:
            file["features"] = features
    else:
        torch.save(torch.from_numpy(features), path)
    caption = bench.make_captions(1, tmp_path / "vocabulary", np.random.default_rng(0))[0]
    tokenizer = bench.AutoTokenizer.from_pretrained(tmp_path / "vocabulary")
    random.seed(0)
    found = bench.Source([path], [caption], tokenizer, regions=24)[0]
    assert np.array_equal(found["patches"].numpy(), features[:512].reshape(2, 256, 4))  # the rest is no whole run
    ids, mask = found["caption"]
    assert ids.shape == (1, 384) and mask.sum() == len(tokenizer(caption)["input_ids"])
    assert found["subcaptions"].shape == (2, 8, 192)


def test_a_rate_counts_what_was_delivered_and_refuses_another_number_of_slides(bench):
    slides, size = bench.rate(iter([(2, 100), (2, 300)]), 4)
    assert size == pytest.approx(100 * slides)
    with pytest.raises(RuntimeError, match="4 slides were delivered, expected 5"):
        bench.rate(iter([(2, 100), (2, 300)]), 5)


def test_ratios_are_of_the_same_repeat_and_of_bytes(bench):
    ours, theirs = [(10.0, 8e9), (10.0, 2e9), (10.0, 6e9)], [(5.0, 1e9), (5.0, 1e9), (5.0, 2e9)]
    found = bench.summarise({"warm": {"records": ours, "h5": theirs}})["warm"]
    assert found["records"] == {"slides_per_s": 10, "gb_per_s": 6, "ratio": 1, "quartiles": [1, 1]}
    assert found["h5"] == {"slides_per_s": 5, "gb_per_s": 1, "ratio": 3, "quartiles": [2.5, 5.5]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slides=2", "--batch-size=4"], "expected at least one whole batch per epoch"),
        (["--slides=100000000"], "lower --slides"),
    ],
)
def test_options_that_measure_nothing_are_refused(bench, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bench.check(bench.make_parser().parse_args(options), tmp_path)


def test_a_tiny_run(tmp_path):
    command = [sys.executable, BENCHMARKS / "input.py", *TINY, "--json", tmp_path / "out.json", "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert set(content) == {"machine", "settings", "results", "stages_ms_per_slide"}
    for state in ("cold", "warm", "resident"):
        assert list(content["results"][state]) == ["records", "h5", ".pt"]
        for found in content["results"][state].values():
            assert found["slides_per_s"] > 0 and found["gb_per_s"] > 0
        assert f"{content['results'][state]['h5']['ratio']:.2f}x as fast" in done.stdout
    for found in content["stages_ms_per_slide"].values():
        parts = found["sampling, copying"] + found["reading"] + found["text"] + found["rest"]
        assert parts == pytest.approx(found["all"])
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


def test_a_missing_side_is_no_ratio(tmp_path):
    (tmp_path / "h5py.py").write_text("raise ModuleNotFoundError('none', name='h5py')\n")
    run = "import sys, runpy; sys.path[:0] = sys.argv[1:3]; runpy.run_path(sys.argv[2] + '/input.py')"
    done = subprocess.run([sys.executable, "-c", run, tmp_path, BENCHMARKS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "h5py is missing, which one side of the comparison needs" in done.stderr and not done.stdout

"""The step benchmark: its sides agree with the released model; its ratios and refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GOLDEN = BENCHMARKS.parent / "tests" / "golden" / "base"
PACKAGES_OF_DATA = (
    "orbax", "grain", "tensorflow", "tensorflow_datasets", "h5py", "openslide", "ml_collections", "matplotlib",
    "pyarrow", "google_crc32c", "pandas", "tensorboardX", "tqdm", "jinja2",
)  # fmt: skip


@pytest.fixture(scope="module")
def modules(benchmark_modules):
    return {name: benchmark_modules(name) for name in ("sides", "step", "released_style", "competent_torch")}


@pytest.fixture(scope="module")
def case():
    with np.load(GOLDEN / "io.npz") as archive:
        return {name: archive[name] for name in archive.files}


def golden_settings() -> dict:
    from pathflip_jax.convert.checkpoint_files import read_checkpoint
    from pathflip_jax.convert.pytorch import infer_config

    meta = json.loads((GOLDEN / "meta.json").read_text(encoding="utf-8"))["config"]
    return infer_config(read_checkpoint(GOLDEN / "state_dict.safetensors"), heads=meta["heads"]).to_dict()


@pytest.mark.parametrize(("file", "name"), [("released_style", "ReleasedStyle"), ("competent_torch", "CompetentTorch")])
def test_a_side_gives_the_released_models_losses_and_gradients(modules, case, file, name):
    model = getattr(modules[file], name)(golden_settings()).eval()
    model.load_state_dict(safetensors.load_file(GOLDEN / "state_dict.safetensors"), strict=True)
    inputs = ("patches", "caption_ids", "caption_mask", "subcaption_ids", "subcaption_mask", "negatives")
    slide, region = model.losses({key: torch.from_numpy(case[key]) for key in inputs})
    assert slide.item() == pytest.approx(float(case["loss_slide"]), rel=1e-5)
    assert region.item() == pytest.approx(float(case["loss_region"]), rel=1e-5)
    (slide + region).backward()
    theirs, compared = safetensors.load_file(GOLDEN / "grads.safetensors"), 0
    for key, parameter in model.named_parameters():
        if key in theirs and parameter.grad is not None:
            error = (parameter.grad - theirs[key]).abs().max().item()
            assert error <= max(1e-7, 1e-3 * theirs[key].abs().max().item()), key
            compared += 1
    assert compared > 50


def test_the_released_side_keeps_every_map_of_every_pass(modules, case):
    model = modules["released_style"].ReleasedStyle(golden_settings()).eval()
    patches = torch.from_numpy(case["patches"])
    model.encode_slide_batch(patches)
    layers = len(model.Qformer.bert.encoder.layer)
    crossing = sum(layer.crossattention is not None for layer in model.Qformer.bert.encoder.layer)
    assert len(model.maps) == (1 + patches.shape[1]) * (layers + crossing)


def test_trimmed_texts_lose_only_padding(modules):
    ids, mask = modules["sides"].pad([np.arange(1, 12), np.arange(1, 4)], 64)
    short, short_mask = modules["competent_torch"].trim(torch.from_numpy(ids), torch.from_numpy(mask))
    assert short.shape == (2, 16) and short_mask.sum() == 14
    assert short[0, :11].tolist() == list(range(1, 12))


def test_token_lengths_are_those_of_real_captions(modules):
    rows = np.array(json.loads((BENCHMARKS / "token_lengths.json").read_text())["slides"])
    assert rows.shape[1] == 1 + modules["sides"].K
    assert abs(rows[:, 0].mean() - 222) < 10 and abs(rows[:, 1:].mean() - 58) < 4
    assert rows[:, 0].max() <= 384 and rows[:, 1:].max() <= 192
    assert abs(rows[:2].sum() / 2 - 688) < 10  # the slides that the base job takes


def test_a_slow_yardstick_counts_at_what_it_may_take(modules):
    step = modules["step"]

    def found(seconds):
        return {"times": {"train_base": {"ours": [5.0], "released": [seconds]}}, "ratios": {"train_base": seconds / 5}}

    assert step.allowed_seconds("train_base", 250e9) == pytest.approx(2 * 9.7 * 1.15)
    fair = found(18.0)
    assert step.hold_to_yardstick(fair, 250e9) == {} and fair["ratios"]["train_base"] == 3.6
    slow = found(18.0)
    assert step.hold_to_yardstick(slow, 500e9) == {"train_base": pytest.approx(9.7 * 1.15 / 18)}
    assert slow["ratios"]["train_base"] == pytest.approx(9.7 * 1.15 / 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "rivals", "jobs", "compiled"),
    [
        ("pathflip", ["released", "competent"], ["train_base", "encode_text"], False),
        ("pathflip", ["competent"], ["encode_text"], True),  # a training step compiles for minutes, its losses do not
        ("pathflip2", ["eager"], ["train_base", "encode_whole_slide"], False),
    ],
)
def test_the_whole_benchmark_at_a_small_size(modules, tmp_path, monkeypatch, family, rivals, jobs, compiled):
    out = tmp_path / "step.json"
    options = ["--family", family, "--small", "--regions=3", "--rounds=1", "--sides", "ours", *rivals, "--jobs", *jobs]
    monkeypatch.setattr(sys, "argv", ["step.py", *options, "--json", str(out)])
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0" if compiled else "1")
    assert modules["step"].main() == 0
    measured = {*jobs, *(f"memory_{job}" for job in jobs if job.startswith("train"))}
    expected = {name + "_competent" * (rival == "competent") for name in measured for rival in rivals}
    assert set(json.loads(out.read_text())["ratios"]) == expected


def test_sides_that_differ_are_not_compared(modules, monkeypatch, capsys):
    def run_side(side, job, options, *more):
        off = 1e-3 if side == "competent" else 0.0
        np.savez(more[more.index("--outputs") + 1], arr0=np.ones(3) + off)
        return {}

    monkeypatch.setattr(modules["step"], "run_side", run_side)
    monkeypatch.setattr(sys, "argv", ["step.py", "--small"])
    assert modules["step"].main() == 1
    assert "ours and competent differ by 1.0e-03" in capsys.readouterr().err


def test_the_step_benchmark_needs_none_of_the_data_packages(tmp_path):
    """It runs with only jax, flax, optax, jaxtyping, numpy, torch and transformers installed."""
    program = f"""
import sys
for name in {PACKAGES_OF_DATA!r}:
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, {str(BENCHMARKS)!r})
import sides, step
from pathlib import Path
step._write_weights(Path({str(tmp_path)!r}), step.FAMILIES["pathflip"].small)
assert step.flops.parameters(step.FAMILIES["pathflip"].small) > 1000
sys.argv = ["sides.py", "--side", "ours", "--job", "train_base", "--small", "--regions", "2", "--steps", "0"]
sys.argv += ["--weights", {str(tmp_path)!r}, "--outputs", {str(tmp_path / "outputs.npz")!r}]
sys.exit(sides.main(sides.FAMILY, ""))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "outputs.npz") as archive:
        assert all(np.isfinite(archive[name]).all() for name in archive.files)

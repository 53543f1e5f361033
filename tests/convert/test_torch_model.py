"""The PyTorch module against the released model's outputs, and against JAX: outputs and gradients."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from safetensors.numpy import load_file, save_file  # noqa: E402
from torch.nn import functional  # noqa: E402

from pathflip_jax.convert import checkpoint_files, pytorch  # noqa: E402
from pathflip_jax.convert.families import names  # noqa: E402
from pathflip_jax.convert.torch_model import PathFLIP as TorchPathFLIP  # noqa: E402
from pathflip_jax.model.config import PathFLIPConfig  # noqa: E402
from pathflip_jax.model.parameters import abstract_params, flatten, unflatten  # noqa: E402
from pathflip_jax.model.pathflip import PathFLIP  # noqa: E402

TESTS = Path(__file__).parents[1]
BASE = TESTS / "golden" / "base"
SIZES = dict(embed_dim=24, hidden=36, heads=3, intermediate=40, vocab_size=31, max_positions=16)
CONFIGS = {
    "linear": PathFLIPConfig(feature_dim=20, layers=4, num_queries=3, **SIZES),
    "mlp": PathFLIPConfig(
        feature_dim=13, layers=3, num_queries=2, cross_attention_freq=3, patch_projection="mlp", patch_hidden=17,
        region_layers=1, region_heads=4, text_region_heads=2, logit_bias_init=-3.0, **SIZES,
    ),
    "one layer": PathFLIPConfig(feature_dim=7, layers=1, num_queries=1, region_heads=2, **SIZES),
}  # fmt: skip


@functools.cache
def pair(name: str) -> tuple[PathFLIP, TorchPathFLIP]:
    """The same random weights in JAX and in PyTorch; no entry is left at a special value such as 0 or 1."""
    config, random = CONFIGS[name], np.random.default_rng(3)
    flat = {
        key: (key.endswith("/scale") + random.normal(0, 0.15, x.shape)).astype(np.float32)
        for key, x in abstract_params(config).items()
    }
    flat["logit_scale"] = np.float32(2.3)
    theirs = TorchPathFLIP(config.to_dict()).eval()
    state = {key: torch.from_numpy(x) for key, x in pytorch.to_torch(flat, config).items()}
    theirs.load_state_dict(state, strict=True)
    return unflatten(config, jax.tree.map(jnp.asarray, flat)), theirs


def assert_close(ours, theirs, atol=1e-4):
    """Same shape, and the largest difference within `atol`."""
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol)


@functools.cache
def inputs(name: str) -> dict[str, np.ndarray]:
    """Three slides, the second with a padded region, the third with two and one of a single patch."""
    config, random = CONFIGS[name], np.random.default_rng(5)
    patches = random.normal(size=(3, 4, 6, config.feature_dim)).astype(np.float32)
    mask = random.random((3, 4, 6)) < 0.7
    mask[0, :, 0] = True
    mask[1, 2] = False
    mask[2, 2:] = False
    mask[2, 1] = np.arange(6) == 4
    lengths = np.array([[9, 5, 2], [12, 3, 4], [2, 12, 7]])
    text_mask = np.arange(12) < lengths[..., None]
    tokens = np.where(text_mask, random.integers(1, config.vocab_size, text_mask.shape), 0)
    return {"patches": patches, "mask": mask, "tokens": tokens, "text_mask": text_mask}


@jax.jit
def encode_jax(model: PathFLIP, case: dict):
    """Slides with attention, texts [B, C, D], pooled regions and weights, by JAX."""
    slides = model.encode_slides(jnp.asarray(case["patches"]), jnp.asarray(case["mask"]), attention=True)
    B, C, T = case["tokens"].shape
    positions = np.broadcast_to(np.arange(T), (B, C, T))
    first = np.broadcast_to(np.arange(C) * T, (B, C))
    texts = model.encode_texts([(case["tokens"], case["text_mask"].astype(jnp.int32), positions)], first)
    return slides, texts, *model.text_region(texts, slides.regions, slides.region_mask)


def encode_torch(model: TorchPathFLIP, case: dict):
    """The same by PyTorch."""
    case = {key: torch.from_numpy(x) for key, x in case.items()}
    slides = model.encode_slides(case["patches"], case["mask"], attention=True)
    texts = model.encode_texts(case["tokens"].flatten(0, 1), case["text_mask"].flatten(0, 1))
    texts = texts.unflatten(0, case["tokens"].shape[:2])
    return slides, texts, *model.text_region_attention(texts, slides.regions, slides.region_mask)


@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_the_released_model(masked):
    meta = json.loads((BASE / "meta.json").read_text())["config"]
    state = checkpoint_files.read_checkpoint(BASE / "state_dict.safetensors")
    model = TorchPathFLIP(pytorch.infer_config(state, heads=meta["heads"]).to_dict()).eval()
    model.load_state_dict({key: torch.from_numpy(np.array(x)) for key, x in state.items()}, strict=True)
    with np.load(BASE / "io.npz") as archive:
        case = {key: torch.from_numpy(archive[key]) for key in archive.files}
    with torch.no_grad():
        mask = torch.ones(case["patches"].shape[:3], dtype=torch.bool) if masked else None
        slides = model.encode_slides(case["patches"], mask, attention=True)
        ids, text_mask = (case[f"subcaption_{part}"] for part in ("ids", "mask"))
        subcaptions = model.encode_texts(ids.flatten(0, 1), text_mask.flatten(0, 1)).unflatten(0, ids.shape[:2])
        found = {
            "slide_features": slides.slide,
            "region_features": slides.regions,
            "slide_attention": slides.slide_attention.flatten(3),
            "region_attention": slides.region_attention,
            "caption_features": model.encode_texts(case["caption_ids"], case["caption_mask"]),
            "text_region_attention": model.text_region_attention(subcaptions, slides.regions)[1],
        }
    for key, value in found.items():
        assert_close(case[key], value)


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_jax(name):
    ours, theirs = pair(name)
    with torch.no_grad():
        a, b = encode_jax(ours, inputs(name)), encode_torch(theirs, inputs(name))
    for field in a[0]._fields:
        assert_close(getattr(a[0], field), getattr(b[0], field))
    for x, y in zip(a[1:], b[1:], strict=True):
        assert_close(x, y)
    assert np.abs(np.asarray(a[0].slide)).max() > 0.1  # not trivially zero


def test_gradients_agree_with_jax(name="mlp"):
    """With padding, of a function of every output that, unlike the losses, weighs each entry differently."""
    ours, theirs = pair(name)
    case, random = inputs(name), np.random.default_rng(7)
    outputs = encode_jax(ours, case)
    weights = [random.normal(size=x.shape).astype(np.float32) for x in (outputs[0].slide, *outputs[1:3])]

    def value(model, case, encode, library):
        slides, texts, pooled, _ = encode(model, case)
        parts = zip(weights, (slides.slide, texts, pooled), strict=True)
        return sum((library.asarray(w) * library.tanh(x)).sum() for w, x in parts)

    gradients = flatten(jax.jit(jax.grad(lambda model: value(model, case, encode_jax, jnp)))(ours))
    theirs.zero_grad()
    value(theirs, case, encode_torch, torch).backward()
    reference = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    reached = 0
    for entry in names(CONFIGS[name]):
        expected = reference[entry.torch]
        found = np.asarray(gradients[entry.path])
        expected = np.zeros_like(found) if expected is None else entry.to_jax(expected.numpy())
        np.testing.assert_allclose(found, expected, rtol=0, atol=max(1e-3 * np.abs(expected).max(), 1e-5))
        reached += np.abs(expected).max() > 1e-3
    assert reached > 0.7 * len(reference)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name):
    """More slots, more regions, more tokens, whatever they hold; and a slide without any patch harms no other."""
    _, model = pair(name)
    case = inputs(name)
    padded = {
        "patches": np.pad(case["patches"], ((0, 1), (0, 2), (0, 3), (0, 0)), constant_values=np.nan),
        "mask": np.pad(case["mask"], ((0, 1), (0, 2), (0, 3))),
        "tokens": np.pad(case["tokens"], ((0, 1), (0, 0), (0, 2)), constant_values=3),
        "text_mask": np.pad(case["text_mask"], ((0, 1), (0, 0), (0, 2))),
    }
    with torch.no_grad():
        plain, texts, pooled, weights = encode_torch(model, case)
        more, more_texts, more_pooled, more_weights = encode_torch(model, padded)
    assert_close(more.slide[:3], plain.slide, 1e-5)
    assert_close(more.regions[:3, :4], plain.regions, 1e-5)
    assert_close(more.slide_attention[:3, :, :, :4, :6], plain.slide_attention, 1e-6)
    assert_close(more_texts[:3], texts, 1e-5)
    assert_close(more_pooled[:3], pooled, 1e-5)
    assert_close(more_weights[:3, :, :4], weights, 1e-6)
    assert not more.regions[:, 4:].any() and not more.regions[3].any() and not more_weights[3].any()
    assert all(torch.isfinite(x).all() for x in (more.slide, more.regions, more_pooled))


def test_one_region_alone_is_that_region_in_the_batch():
    """The Region Q-Former sees a region's own patches: before the region transformer regions are independent."""
    _, model = pair("linear")
    case = {key: torch.from_numpy(x) for key, x in inputs("linear").items()}
    with torch.no_grad():
        whole = model.encode_slides(case["patches"], case["mask"], attention=True).region_attention
        alone = model.encode_slides(case["patches"][:1, 1:2], case["mask"][:1, 1:2], attention=True).region_attention
    assert_close(alone.sum((-2, -1)), torch.ones(alone.shape[:3]), 1e-5)  # it does attend
    assert_close(whole[:1, :, :, 1:2], alone, 1e-6)


def released_losses(outputs: dict, negatives: torch.Tensor, scale: torch.Tensor, model: TorchPathFLIP, meta: dict):
    """The released losses in PyTorch, in loops, with torch's own cross-entropy (DESIGN section 4)."""
    slides, captions = (functional.normalize(outputs[key], dim=-1) for key in ("slide_features", "caption_features"))
    logits = slides @ captions.T / meta["temperature"]
    target = torch.arange(len(slides))
    smoothing = {"label_smoothing": meta["label_smoothing"]}
    slide_loss = sum(functional.cross_entropy(x, target, **smoothing) for x in (logits, logits.T)) / 2

    subcaptions, regions = outputs["subcaptions"], outputs["region_features"]
    B, K, _ = subcaptions.shape
    region_loss = torch.zeros(())
    for i in range(B):
        others = [subcaptions[j, negatives[i, j]] for j in range(B) if j != i]
        texts = torch.stack([*subcaptions[i], *others])
        labels = torch.tensor([1.0] * K + [-1.0] * (B - 1))
        pooled, _ = model.text_region_attention(texts[None], regions[i : i + 1])
        z = scale * functional.cosine_similarity(pooled[0], texts, dim=-1)
        region_loss = region_loss - functional.logsigmoid(labels * z).sum()
    return slide_loss, region_loss / (K + B - 1)


def write_parity_folder(folder: Path, name: str) -> None:
    """A folder of the form of tests/golden/base, computed by the PyTorch module with random weights."""
    config, random = CONFIGS[name], np.random.default_rng(11)
    _, model = pair(name)
    B, K, T = 4, 2, 12
    config_meta = {
        "bert_hidden": config.hidden, "layers": config.layers, "heads": config.heads,
        "intermediate": config.intermediate, "cross_attention_freq": config.cross_attention_freq,
        "num_query_tokens": config.num_queries, "patch_dim": config.feature_dim, "embed_dim": config.embed_dim,
        "subcaptions": K, "path_encoder": {"linear": "Linear", "mlp": "MLP"}[config.patch_projection],
        "temperature": 0.1, "label_smoothing": 0.1,
    }  # fmt: skip

    def texts(*shape):
        mask = np.arange(shape[-1]) < random.integers(2, shape[-1] + 1, (*shape[:-1], 1))
        return np.where(mask, random.integers(1, config.vocab_size - 1, shape), 0), mask.astype(np.int64)

    case = {"patches": random.normal(size=(B, 5, 3, config.feature_dim)).astype(np.float32)}
    case["caption_ids"], case["caption_mask"] = texts(B, T)
    case["subcaption_ids"], case["subcaption_mask"] = texts(B, K, T // 2)
    case["negatives"] = np.where(np.eye(B, dtype=bool), -1, random.integers(0, K, (B, B)))
    given = {key: torch.from_numpy(x) for key, x in case.items()}
    model.zero_grad()
    slides = model.encode_slides(given["patches"], attention=True)
    ids, mask = given["subcaption_ids"].flatten(0, 1), given["subcaption_mask"].flatten(0, 1)
    outputs = {
        "slide_features": slides.slide,
        "region_features": slides.regions,
        "caption_features": model.encode_texts(given["caption_ids"], given["caption_mask"]),
        "subcaptions": model.encode_texts(ids, mask).unflatten(0, (B, K)),
        "slide_attention": slides.slide_attention.flatten(3),
        "region_attention": slides.region_attention,
    }
    attention = model.text_region_attention(outputs["subcaptions"], slides.regions)[1]
    outputs["text_region_attention"] = attention
    losses = released_losses(outputs, given["negatives"], model.logit_scale, model, config_meta)
    outputs["loss_slide"], outputs["loss_region"], outputs["loss"] = *losses, sum(losses)
    outputs["loss"].backward()
    del outputs["subcaptions"]
    (folder / "bert").mkdir()
    bert = {"vocab_size": config.vocab_size - 1, "max_position_embeddings": config.max_positions}
    (folder / "bert" / "config.json").write_text(json.dumps(bert))
    (folder / "meta.json").write_text(json.dumps({"config": config_meta}))
    np.savez(folder / "io.npz", **case, **{key: x.detach().numpy() for key, x in outputs.items()})
    # An optional bias is no part of the released model, nor of such a folder.
    state = {key: x.numpy() for key, x in model.state_dict().items() if key != "logit_bias"}
    save_file({key: np.array(x) for key, x in state.items()}, folder / "state_dict.safetensors")
    gradients = {key: x.grad.numpy() for key, x in model.named_parameters() if x.grad is not None}
    save_file(gradients, folder / "grads.safetensors")


@functools.cache
def parity():
    """The module tests/parity.py."""
    spec = importlib.util.spec_from_file_location("parity", TESTS / "parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [pytest.param("linear", marks=pytest.mark.slow), "mlp"])
def test_parity_command_passes_on_other_folders(name, tmp_path, capsys, monkeypatch):
    # Such folders name none of these: they are as released there.
    released = {
        "region_heads": 8,
        "text_region_heads": 8,
        "region_layers": 2,
        "logit_bias_init": None,
        "patch_hidden": None,
    }
    monkeypatch.setitem(CONFIGS, f"released {name}", PathFLIPConfig.from_dict(CONFIGS[name].to_dict() | released))
    write_parity_folder(tmp_path, f"released {name}")
    assert parity().main([str(tmp_path)]) == 0, capsys.readouterr().out


def test_parity_finds_a_wrong_gradient():
    theirs = load_file(BASE / "grads.safetensors")
    config = parity().read_config(BASE)
    ours = {
        entry.path: entry.to_jax(theirs[entry.torch]) if entry.torch in theirs else np.zeros(1, np.float32)
        for entry in names(config)
    }
    assert all(row.ok for row in parity().compare_gradients(ours, theirs, config))
    theirs["fg_head.w_v.weight"] = theirs["fg_head.w_v.weight"] * 1.01
    failed = [row.name for row in parity().compare_gradients(ours, theirs, config) if not row.ok]
    assert failed == ["d loss / d text_region/value/kernel"]

"""Inference: padding and order change nothing, maps follow their patches, wrong input is named."""

import subprocess
import sys

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import pathflip_jax
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.regions import cut_regions
from pathflip_jax.grounding import methods
from pathflip_jax.inference import predictor as inference
from pathflip_jax.inference.predictor import Predictor, region_slots
from pathflip_jax.model.config import PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.model.pathflip2 import PathFLIP2
from pathflip_jax.runtime.buckets import bucket

CONFIG = PathFLIPConfig(
    feature_dim=12, embed_dim=16, hidden=24, layers=1, heads=2, intermediate=32, num_queries=3, vocab_size=60,
    max_positions=40, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
)  # fmt: skip
WORDS = "tumor necrosis gland fat no invasion of stroma with mucin".split()


class Words:
    """A tokenizer of ten words: [CLS] 1, [SEP] 2, the words from 3 on."""

    def encode(self, texts, max_length):
        return [np.array([1, *(3 + WORDS.index(w) for w in t.split()), 2], np.int32)[:max_length] for t in texts]


@pytest.fixture(scope="module")
def predictor():
    data = {"cut": "grid", "edge_um": 512.0, "encoder": "descriptor", "caption_length": 32}
    return Predictor(PathFLIP(CONFIG, nnx.Rngs(0)), {"data": data}, Words(), name="runs/tiny")


def make_slide(columns=9, rows=6, seed=0, **changes):
    """Patches of 256 pixels at 0.5 um in no order, with holes: regions of 4 x 4 patches."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    coords = (rng.permutation(grid)[: int(0.8 * len(grid))] * 256).astype(np.int32)
    values = {
        "slide_id": f"S{seed}", "case_id": f"P{seed}", "coords": coords, "patch_size": 256, "mpp": 0.5,
        "features": rng.normal(size=(len(coords), 12)).astype(np.float32),
        "width": columns * 256, "height": rows * 256, "encoder": "descriptor",
    }  # fmt: skip
    return SlideFeatures(**(values | changes))


@jax.jit
def encode_slides(model, patches, mask):
    return model.encode_slides(patches, mask, attention=True)


@jax.jit
def attend(model, texts, regions, mask):
    return model.text_region(texts, regions, mask)


def exactly(predictor, slide):
    """The model's own answer for a slide without any padding but that of unequal regions."""
    regions = cut_regions(slide, cut="grid", edge_um=512.0)
    slots = region_slots(regions.order, regions.rows)
    return slots, encode_slides(predictor.model, slide.features[slots][None], (slots >= 0)[None])


@given(st.integers(1, 100_000))
def test_buckets_hold_and_waste_little(n):
    assert n <= bucket(n) <= max(1.5 * n, 1)
    assert len({bucket(i) for i in range(1, 1025)}) <= 20


def test_region_slots_keep_every_patch_once():
    order, rows = np.array([4, 2, 0, 1, 3, 5]), np.array([0, 2, 5, 6])
    assert region_slots(order, rows).tolist() == [[4, 2, -1], [0, 1, 3], [5, -1, -1]]


def test_padding_to_buckets_changes_nothing(predictor):
    slide = make_slide(17, 5)
    slots, expected = exactly(predictor, slide)
    found = predictor.encode_slide(slide)
    assert slots.shape[0] < bucket(slots.shape[0]) and slots.shape[1] < bucket(slots.shape[1]), "nothing was padded"
    assert found.slide == pytest.approx(np.asarray(expected.slide[0]), abs=1e-5)
    assert found.regions == pytest.approx(np.asarray(expected.regions[0]), abs=1e-5)
    assert found.grid.shape == (len(found.regions), 2)


def test_batches_come_back_in_order(predictor):
    slides = [make_slide(columns, rows, seed) for seed, (columns, rows) in enumerate([(9, 6), (3, 3), (9, 6), (9, 6)])]
    together = list(predictor.encode_slides(iter(slides), batch_size=3))
    assert [e.slide_id for e in together] == ["S0", "S1", "S2", "S3"]
    for slide, embedding in zip(slides, together, strict=True):
        alone = predictor.encode_slide(slide)
        assert embedding.slide == pytest.approx(alone.slide, abs=1e-5)
        assert embedding.regions == pytest.approx(alone.regions, abs=1e-5)


def test_texts_attend_to_regions_as_in_the_loss_of_the_run(predictor):
    loss = {"region_pooling": "cosine", "pooling_temperature": 0.2, "region_weight": 1.0}
    pooled = Predictor(predictor.model, predictor.config | {"loss": loss}, Words())
    regions, texts = predictor.encode_slide(make_slide()).regions, predictor.encode_texts(["gland", "fat"]).region
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (texts, regions)]
    powers = np.exp(unit[0] @ unit[1].T / 0.2)
    assert pooled.attend_regions(texts, regions) == pytest.approx(powers / powers.sum(1, keepdims=True), abs=1e-5)
    assert pooled.attend_single_regions(regions) == pytest.approx(unit[1], abs=1e-5)
    assert predictor.attend_regions(texts, regions) != pytest.approx(pooled.attend_regions(texts, regions), abs=1e-3)
    for broken in ({}, {"pooling_temperature": "warm"}):
        with pytest.raises(ValueError, match='runs/one: .* no valid "pooling_temperature"'):
            Predictor(predictor.model, {"loss": {"region_pooling": "cosine"} | broken}, None, "runs/one")


COSINE = {"region_pooling": "cosine", "pooling_temperature": 0.1}
PATHFLIP2 = PathFLIP2Config(
    feature_dim=16, embed_dim=8, hidden=8, layers=1, heads=2, intermediate=8, vocab_size=64, max_positions=40, tokens=2,
    token_heads=2, text_region_heads=2, top_k=2,
)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "loss", "refused", "noted"),
    [
        ("pathflip", {}, "", ""),
        ("pathflip", COSINE | {"region_weight": 1.0}, "", ""),
        ("pathflip", {"region_weight": 0.0}, "region attention patch similarity", "cosine"),
        ("pathflip", COSINE | {"region_weight": 0.0}, "", "region attention patch similarity cosine"),
        ("pathflip", {"slide_weight": 0.0}, "", "slide"),
        ("pathflip2", {"region_weight": 1.0}, "", ""),
        ("pathflip2", {"region_weight": 0.0}, "region patch similarity cosine", ""),
        ("pathflip2", {"slide_weight": 0}, "slide", ""),
    ],
)
def test_methods_whose_parts_a_runs_loss_did_not_train(predictor, caplog, family, loss, refused, noted):
    model = predictor.model if family == "pathflip" else PathFLIP2(PATHFLIP2, nnx.Rngs(0))
    run, found = Predictor(model, {"loss": loss}, Words(), name=f"runs/{family}{sorted(loss.items())}"), []
    for name in methods.METHODS if family == "pathflip" else methods.METHODS.keys() - {"attention"}:
        try:
            methods.check_method(run, name)
        except ValueError as error:
            weight = "slide_weight" if "slide_weight" in loss else "region_weight"
            assert str(error).startswith(f"{run.name}: ") and f"(loss.{weight} is 0)" in str(error)
            found.append(name)
    assert set(found) == set(refused.split())
    told = [name for name in methods.METHODS if f"method {name!r} maps" in caplog.text]
    assert set(told) == set(noted.split())
    assert set(methods.trained_methods(run)).isdisjoint([*found, *told])


def test_a_converted_checkpoint_states_no_loss_and_may_use_every_method(predictor):
    run = Predictor(predictor.model, {"data": {}}, Words())
    assert run.untrained == run.unaligned == {} and methods.trained_methods(run) == list(methods.METHODS)


def test_slides_of_a_case_are_one_bag(predictor):
    one, two = make_slide(seed=1), make_slide(3, 3, seed=2)
    bag = predictor.bag([one, two])
    first, second = predictor.bag(one), predictor.bag(two)
    assert len(bag.slots) == len(first.slots) + len(second.slots)
    taken = bag.slots[bag.slots >= 0]
    assert sorted(taken) == list(range(len(one.features) + len(two.features)))
    last = bag.slots[-1][bag.slots[-1] >= 0]
    assert np.array_equal(bag.features[last], two.features[second.slots[-1][second.slots[-1] >= 0]])
    assert predictor.encode_slide([one, two]).regions.shape[0] == len(bag.slots)


def test_texts_come_back_in_order_whatever_shares_their_call(predictor):
    texts = ["tumor", "no invasion of stroma with mucin", "fat", "necrosis"]
    together = predictor.encode_text(texts, batch_size=2)
    encode = jax.jit(lambda model, *x: model.encode_texts(*x))
    for text, row in zip(texts, together, strict=True):
        tokens = Words().encode([text], 99)[0]
        inputs = [jnp.asarray(x, jnp.int32)[None, None] for x in (tokens, np.ones(len(tokens)), np.arange(len(tokens)))]
        expected = encode(predictor.model, [inputs], jnp.zeros((1, 1), jnp.int32))[0, 0]
        assert row == pytest.approx(np.asarray(expected), abs=1e-5)
    assert predictor.encode_text("fat").shape == (1, 16)


@pytest.mark.parametrize("method", list(methods.METHODS))
def test_maps_follow_their_patches(predictor, method):
    """The same slide with its patches in another order has the same map in that order."""
    slide = make_slide()
    order = np.random.default_rng(3).permutation(len(slide.coords))
    shuffled = make_slide(features=slide.features[order], coords=slide.coords[order])
    texts = ["tumor", "fat of stroma"]
    found = predictor.ground(slide, texts, method=method, context=1000)
    again = predictor.ground(shuffled, texts, method=method, context=1000)
    assert found.patch_scores.shape == (2, len(slide.coords)) and found.texts == tuple(texts)
    assert again.patch_scores == pytest.approx(found.patch_scores[:, order], abs=2e-5)
    assert np.ptp(found.patch_scores, axis=1).min() > 1e-4
    assert np.abs(found.patch_scores[0] - found.patch_scores[1]).max() > 1e-4
    prepared = methods.prepare(predictor, slide, method=method, context=1000)  # once, then any text
    assert np.array_equal(methods.score(predictor, prepared, texts).patch_scores, found.patch_scores)
    less = methods.score(predictor, prepared, texts[0], negative=texts[1])
    assert less.patch_scores[0] == pytest.approx(found.patch_scores[0] - found.patch_scores[1], abs=1e-5)
    assert less.texts == (texts[0],) and less.negative == (texts[1],)


def test_region_and_attention_maps_are_the_models_own(predictor):
    slide = make_slide()
    slots, encoding = exactly(predictor, slide)
    text = predictor.encode_text(["tumor"])
    _, weights = attend(predictor.model, text[None], encoding.regions, encoding.region_mask)
    by_region = np.log(np.asarray(weights[0, 0]) * len(slots))
    cross = np.asarray(encoding.region_attention[0]).mean((0, 1))  # [R, S]
    region_map = predictor.ground(slide, "tumor", method="region")
    refined = predictor.ground(slide, "tumor", method="attention")
    assert region_map.region_scores[0] == pytest.approx(by_region, abs=1e-4)
    for r, row in enumerate(slots):
        valid = row >= 0
        assert region_map.patch_scores[0, row[valid]] == pytest.approx(by_region[r], abs=1e-4)
        expected = by_region[r] + np.log(cross[r, valid] * valid.sum())
        assert refined.patch_scores[0, row[valid]] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["slide", "region"])
def test_the_highest_negative_text_is_subtracted(predictor, method):
    slide = make_slide()
    apart = [predictor.ground(slide, text, method=method) for text in ("tumor", "fat", "mucin of stroma")]
    found = predictor.ground(slide, ["tumor"], negative=["fat", "mucin of stroma"], method=method)
    assert found.texts == ("tumor",) and found.negative == ("fat", "mucin of stroma")
    for name in ("patch_scores", "region_scores"):
        tumor, *others = (getattr(one, name)[0] for one in apart)
        assert getattr(found, name)[0] == pytest.approx(tumor - np.maximum(*others), abs=1e-5)


def test_attention_without_text_is_the_slide_passs_own(predictor):
    slide = make_slide()
    slots, encoding = exactly(predictor, slide)
    weights = np.asarray(encoding.slide_attention[0]).mean((0, 1))  # [R, S]
    found = predictor.attend(slide)
    valid = slots >= 0
    assert found[slots[valid]] == pytest.approx(np.log(weights[valid] * len(slide.features)), abs=1e-4)
    assert np.exp(found).mean() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["slide", "similarity", "cosine", "patch"])
def test_window_maps_equal_patches_encoded_one_by_one(predictor, method):
    slide = make_slide(4, 3)
    text = predictor.encode_text(["necrosis"])[0]
    n = len(slide.features)
    model = predictor.model
    if method == "slide":
        one = np.ones((1, 1, 1), bool)
        parts = [encode_slides(model, x[None, None, None], one).slide[0] for x in slide.features]
    else:
        encoding = encode_slides(model, slide.features[None, :, None], np.ones((1, n, 1), bool))
        if method == "patch":
            _, weights = attend(model, text[None, None], encoding.regions, encoding.region_mask)
        parts = list(encoding.regions[0])
    if method == "similarity":
        parts = [attend(model, text[None, None], r[None, None], np.ones((1, 1), bool))[0][0, 0] for r in parts]
    if method == "patch":
        expected = np.log(np.asarray(weights[0, 0]) * n)
    else:
        expected = [np.dot(text, p) / np.linalg.norm(text) / np.linalg.norm(p) for p in map(np.asarray, parts)]
    found = predictor.ground(slide, "necrosis", method=method, window=1, context=1000)
    assert found.patch_scores[0] == pytest.approx(np.array(expected), abs=1e-4)


def test_a_large_slide_is_asked_once_whether_it_fits(predictor, monkeypatch):
    slide, asked = make_slide(6, 5), []
    expected = predictor.encode_slide(slide)
    large = Predictor(predictor.model, predictor.config, predictor.tokenizer)
    monkeypatch.setattr(inference, "LARGE", 1e15)
    monkeypatch.setattr(inference.memory, "free_bytes", lambda device: 0)
    for _ in range(2):  # refused the second time too
        with pytest.raises(MemoryError, match=rf"1 slides of up to {len(slide.features)} patches needs"):
            large.encode_slide(slide)
    monkeypatch.setattr(inference.memory, "free_bytes", lambda device: asked.append(device) or 2**40)
    shared = inference._encode_slides._cache_size()
    for _ in range(2):
        found = large.encode_slide(slide)
        assert (found.slide == expected.slide).all() and (found.regions == expected.regions).all()
    assert len(asked) == 2 and inference._encode_slides._cache_size() == shared  # its size, then its program


@pytest.mark.parametrize(
    "data",
    [["grid"], {"recipe": {"mpp": "fine"}}, {"edge_um": "far"}, {"caption_length": [3]}, {"edge_px": float("inf")}],
)
def test_a_config_of_something_else_names_its_run(data):
    with pytest.raises(ValueError, match='runs/x: its config.json has no valid section "data"'):
        Predictor(None, {"data": data}, None, "runs/x")


def test_a_slide_of_the_wrong_encoder_is_refused(predictor):
    with pytest.raises(ValueError, match=r"S0.*'other'.*'descriptor'"):
        predictor.encode_slide(make_slide(encoder="other"))
    with pytest.raises(ValueError, match=r"S0.*5 wide.*12"):
        predictor.encode_slide(make_slide(features=np.zeros((43, 5), np.float32)))
    predictor.encode_slide(make_slide(encoder=""))  # a file that does not say is taken at its word


MADE = {"encoder": "uni_v1", "weights": "34cd" * 16, "pooling": "class", "patch_size": 256, "mpp": 0.5}


@pytest.fixture
def of_uni(predictor):
    """A run whose config.json holds the recipe of its features."""
    data = predictor.config["data"] | {"encoder": "uni_v1", "recipe": MADE}
    return Predictor(predictor.model, {"data": data}, Words(), name="runs/uni")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "12ab" * 16}, r"weights \(12ab12ab12ab…, not 34cd34cd34cd…\); prepare .* `--encoder uni_v1`"),
        ({"patch_size": 224}, r"patches \(224 px at 0.5 um per px, not 256 px at 0.5 um per px\)"),
        ({"pooling": "mean"}, r"pooling \(mean, not class\)"),
        ({"precision": "bfloat16", "weights": ""}, ""),
        ({"encoder": "UNI"}, ""),
    ],
)
def test_a_slide_of_another_recipe_is_refused(of_uni, predictor, changes, message):
    slide = make_slide(encoder="", recipe=FeatureRecipe(**MADE | changes))
    if message:
        with pytest.raises(ValueError, match=f"^slide S0: .* that runs/uni was trained on: they differ in {message}"):
            of_uni.encode_slide(slide)
    else:
        of_uni.encode_slide(slide)
    predictor.encode_slide(slide)  # a run of an earlier version, which knows of no recipe


def test_a_feature_file_has_the_patch_size_of_its_recipe(of_uni):
    of_uni.encode_slide(make_slide(encoder="UNI"))  # another spelling, and nothing known of its weights
    of_uni.encode_slide(make_slide(encoder="", mpp=0.0))
    with pytest.raises(ValueError, match=r"patches \(64 um, not 256 px at 0.5 um per px\)"):
        of_uni.encode_slide(make_slide(encoder="", mpp=0.25))
    with pytest.raises(ValueError, match="features come from 'uni_v2', runs/uni was trained on 'uni_v1'"):
        of_uni.encode_slide(make_slide(encoder="uni_v2"))


def test_what_cannot_be_grounded_is_refused(predictor):
    with pytest.raises(ValueError, match=r"S0.*coordinates"):
        predictor.ground(make_slide(coords=None), "tumor")
    with pytest.raises(ValueError, match=r"'magic' is not supported; expected one of region"):
        predictor.ground(make_slide(), "tumor", method="magic")
    with pytest.raises(ValueError, match=r"window 4.*odd"):
        predictor.ground(make_slide(), "tumor", window=4)
    with pytest.raises(ValueError, match=r"no words: '  '"):
        predictor.ground(make_slide(), ["tumor", "  "])


def test_read_slide_takes_feature_files_and_records(tiny_cohort, tmp_path):
    found = pathflip_jax.read_slide(tiny_cohort.records, slide_id="S05")
    assert found.slide_id == "S05" and found.features.shape == (len(found.coords), 16)
    with pytest.raises(ValueError, match=r"24 slides \(S00, S01, S02, \.\.\.\); choose one"):
        pathflip_jax.read_slide(tiny_cohort.records)
    with pytest.raises(ValueError, match="no slide 'S99'"):
        pathflip_jax.read_slide(tiny_cohort.records, slide_id="S99")
    with h5py.File(tmp_path / "S1.h5", "w") as file:
        file["features"], file["coords"] = np.ones((3, 4), np.float32), np.arange(6).reshape(3, 2) * 256 + 7
    found = pathflip_jax.read_slide(tmp_path / "S1.h5", patch_size=256, mpp=0.5, encoder="descriptor")
    assert (found.slide_id, found.patch_size, found.mpp, found.encoder) == ("S1", 256, 0.5, "descriptor")
    assert pathflip_jax.read_slide(tmp_path / "S1.h5", "renamed", patch_size=256).slide_id == "renamed"


def test_read_slide_says_what_it_does_not_take(tmp_path):
    (tmp_path / "S1.svs").write_bytes(b"II*\0 and so on")
    with pytest.raises(ValueError, match=r"S1\.svs: a slide, not its features.*load\(RUN\)\.read\(.*pathflip prepare"):
        pathflip_jax.read_slide(tmp_path / "S1.svs")
    with pytest.raises(FileNotFoundError, match=r"gone\.h5"):
        pathflip_jax.read_slide(tmp_path / "gone.h5")
    with pytest.raises(FileNotFoundError, match="it is not a run"):
        pathflip_jax.load(tmp_path)


def test_importing_the_package_is_instant():
    code = "import sys, pathflip_jax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = pathflip_jax.nothing

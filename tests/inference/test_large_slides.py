"""Blockwise encoding of slides equals encoding in a single call."""

import numpy as np
import pytest
from flax import nnx

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.inference import large_slides
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP

CONFIG = PathFLIPConfig(
    feature_dim=6, embed_dim=8, hidden=12, layers=2, cross_attention_freq=1, heads=2, intermediate=16, num_queries=3,
    vocab_size=20, max_positions=8, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
)  # fmt: skip


def slide_of(columns: int, rows: int) -> SlideFeatures:
    rng = np.random.default_rng(columns)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    coords = (rng.permutation(grid)[: int(0.8 * len(grid))] * 256).astype(np.int32)
    features = rng.normal(size=(len(coords), 6)).astype(np.float16)
    return SlideFeatures(f"S{columns}", "", features, coords, 256, 0.5)


@pytest.mark.slow  # compiles a program for every part of the model
def test_blocks_of_regions_give_what_the_whole_slide_gives(monkeypatch):
    model = PathFLIP(CONFIG, nnx.Rngs(0))
    predictor = Predictor(model, {"data": {"cut": "grid", "edge_um": 512.0, "encoder": ""}}, None)
    slides = [slide_of(19, 9), slide_of(5, 4), [slide_of(13, 9), slide_of(9, 5)]]
    whole = list(predictor.encode_slides(slides))
    monkeypatch.setattr(large_slides, "MOST_PATCHES", 16 * 8)
    monkeypatch.setattr(large_slides, "BLOCK_PATCHES", 16 * 4)
    monkeypatch.setattr(large_slides, "ROWS_AT_ONCE", 5)
    given = []
    encode = large_slides.encode_in_blocks
    monkeypatch.setattr(large_slides, "encode_in_blocks", lambda *args: given.append(args) or encode(*args))
    for before, after in zip(whole, predictor.encode_slides(slides), strict=True):
        assert after.slide == pytest.approx(before.slide, abs=1e-6)
        assert after.regions == pytest.approx(before.regions, abs=1e-6)
    assert [len(list(blocks())) for _, blocks in given] == [4, 5], "the large ones alone, the last block short"

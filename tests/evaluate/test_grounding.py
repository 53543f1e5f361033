"""Grounding against outlines: which patches are true, which count, and what an AUC is."""

import numpy as np
import pytest
from sklearn import metrics

from pathflip_jax.data.features import SlideFeatures
from pathflip_jax.evaluate import grounding, summary
from pathflip_jax.grounding.outlines import Polygon, write_outlines

SQUARE = Polygon(np.array([[100, 100], [260, 100], [260, 260], [100, 260], [100, 100]], float))


@pytest.fixture
def slide():
    coords = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2) * 64
    features = np.zeros((36, 4), np.float32)
    return SlideFeatures("S1", "P1", features, coords.astype(np.int32), patch_size=64, mpp=0.5)


def test_true_patches_and_those_cut_by_an_outline(slide, tmp_path):
    write_outlines(tmp_path / "S1.geojson", {"tumor": [SQUARE]})
    inside, counts = grounding.true_patches(tmp_path, slide, ["tumor", "fat"])
    centres = slide.coords + 32
    assert inside[0].tolist() == ((centres > 100) & (centres < 260)).all(1).tolist()
    assert not inside[1].any() and counts.all()
    _, clear = grounding.true_patches(tmp_path, slide, ["tumor", "fat"], clear=0.25)
    low, high = np.maximum(slide.coords, 100), np.minimum(slide.coords + 64, 260)
    share = np.clip(high - low, 0, None).prod(1) / 64**2
    assert clear.tolist() == ((share < 0.25) | (share > 0.75)).tolist() and not clear.all()
    with pytest.raises(FileNotFoundError, match=r"S1\.geojson"):
        grounding.true_patches(tmp_path / "gone", slide, ["tumor"])


def test_concept_aucs_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    inside = rng.random((4, 50)) < 0.3
    inside[2], inside[3] = False, True
    found = rng.normal(size=(4, 50)).round(1)
    counts = rng.random(50) < 0.8
    aucs = grounding.concept_aucs(inside, found, counts)
    for c in range(2):
        assert aucs[c] == pytest.approx(metrics.roc_auc_score(inside[c][counts], found[c][counts]))
    assert np.isnan(aucs[2:]).all()


def test_a_concepts_map_is_the_mean_of_its_texts(slide):
    class Predictor:
        def ground(self, slide, texts, **how):
            assert how == {"window": 3}
            return type("Grounding", (), {"patch_scores": np.array([[len(t)] * 36 for t in texts], float)})

    found = grounding.concept_scores(Predictor(), slide, {"a": ["x", "xyz"], "b": ["xx"]}, window=3)
    assert found[:, 0].tolist() == [2.0, 2.0] and found.shape == (2, 36)


def test_a_slides_figure_is_the_mean_over_its_concepts():
    found = summary.slide_means(np.array([[0.5, np.nan, 1.0], [np.nan] * 3]))
    assert found[0] == 0.75 and np.isnan(found[1])


def test_a_colour_map_needs_training_slides(slide, tmp_path):
    with pytest.raises(ValueError, match="no training slide has both"):
        grounding.ColourMap([slide], {}, tmp_path, ["tumor"])

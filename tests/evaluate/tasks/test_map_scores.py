"""Grounding against outlines: true patches, patches that count, and the AUC."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn import metrics

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.readers.outlines import Polygon, write_outlines
from pathflip_jax.evaluate.tasks import grounding, map_scores, truth

SQUARE = Polygon(np.array([[100, 100], [260, 100], [260, 260], [100, 260], [100, 100]], float))


@pytest.fixture
def slide():
    coords = np.stack(np.meshgrid(np.arange(6), np.arange(6)), -1).reshape(-1, 2) * 64
    features = np.zeros((36, 4), np.float32)
    return SlideFeatures("S1", "P1", features, coords.astype(np.int32), patch_size=64, mpp=0.5)


def test_true_patches_and_those_cut_by_an_outline(slide, tmp_path):
    write_outlines(tmp_path / "S1.geojson", {"tumor": [SQUARE]})
    inside, counts = truth.true_patches(tmp_path, slide, ["tumor", "fat"])
    centres = slide.coords + 32
    assert inside[0].tolist() == ((centres > 100) & (centres < 260)).all(1).tolist()
    assert not inside[1].any() and counts.all()
    _, clear = truth.true_patches(tmp_path, slide, ["tumor", "fat"], clear=0.25)
    low, high = np.maximum(slide.coords, 100), np.minimum(slide.coords + 64, 260)
    share = np.clip(high - low, 0, None).prod(1) / 64**2
    assert clear.tolist() == ((share < 0.25) | (share > 0.75)).tolist() and not clear.all()
    with pytest.raises(FileNotFoundError, match=r"S1\.geojson"):
        truth.true_patches(tmp_path / "gone", slide, ["tumor"])


def test_concept_aucs_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    inside = rng.random((4, 50)) < 0.3
    inside[2], inside[3] = False, True
    found = rng.normal(size=(4, 50)).round(1)
    counts = rng.random(50) < 0.8
    aucs = map_scores.concept_aucs(inside, found, counts)
    for c in range(2):
        assert aucs[c] == pytest.approx(metrics.roc_auc_score(inside[c][counts], found[c][counts]))
    assert np.isnan(aucs[2:]).all()


def test_a_concepts_map_is_the_mean_of_its_texts(slide):
    class Predictor:
        def ground(self, slide, texts, **how):
            assert how == {"window": 3}
            return type("Grounding", (), {"patch_scores": np.array([[len(t)] * 36 for t in texts], float)})

    found = map_scores.concept_scores(Predictor(), slide, {"a": ["x", "xyz"], "b": ["xx"]}, window=3)
    assert found[:, 0].tolist() == [2.0, 2.0] and found.shape == (2, 36)


def test_a_slides_figure_is_the_mean_over_its_concepts():
    found = grounding.slide_means(np.array([[0.5, np.nan, 1.0], [np.nan] * 3]))
    assert found[0] == 0.75 and np.isnan(found[1])


def test_a_colour_map_needs_training_slides(slide, tmp_path):
    with pytest.raises(ValueError, match="no training slide has both"):
        map_scores.ColourMap([slide], {}, tmp_path, ["tumor"])


def test_a_colour_map_does_not_know_the_slide_that_it_maps(slide, tmp_path, monkeypatch):
    """Else its thresholds, which training slides choose, were those of colours that it has seen."""
    inside = Polygon(np.array([[0, 0], [400, 0], [400, 400], [0, 400], [0, 0]], float))
    other = SlideFeatures("S2", "P2", slide.features, slide.coords, patch_size=64, mpp=0.5)
    write_outlines(tmp_path / "S1.geojson", {"tumor": [inside]})
    write_outlines(tmp_path / "S2.geojson", {})
    monkeypatch.setattr(map_scores.colour, "patch_colours", lambda path, coords, size: np.full((len(coords), 3), 9.0))
    found = map_scores.ColourMap([slide, other], {"S1": "a", "S2": "b"}, tmp_path, ["tumor"])
    assert (found(slide) == 0).all() and (found(other) == 1).all()


def test_pointing_is_won_by_the_highest_patch_that_counts():
    inside = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]], bool)
    found = np.array([[1, 2, 9, 0, 0], [1, 2, 3, 4, 5], [7, 7, 7, 7, 1]], float)
    counts = np.array([True, True, False, True, True])
    hits = map_scores.pointing_hits(inside, found, counts)
    assert hits[0] == 1 and np.isnan(hits[1]) and hits[2] == pytest.approx(1 / 3)  # patch 2 does not count; three tie


def test_dice_is_scikit_learns_f1():
    rng = np.random.default_rng(0)
    true, score = rng.random(40) < 0.4, rng.normal(size=40).round(1)
    thresholds = np.array([-9.0, -0.3, 0.0, 0.7, 9.0])
    expected = [metrics.f1_score(true, score >= threshold, zero_division=0) for threshold in thresholds]
    assert map_scores.dice_at(thresholds, true, score) == pytest.approx(expected)


def test_thresholds_are_the_training_slides_best():
    """No score of the slides has, as a threshold, a better mean Dice than the chosen one."""
    rng = np.random.default_rng(1)
    slides = []
    for _ in range(3):
        inside = np.stack([rng.random(25) < 0.3, np.zeros(25, bool)])
        slides.append(((inside, rng.random(25) < 0.9), rng.normal(size=(2, 25)) + inside))
    chosen = map_scores.choose_thresholds(slides, 2)
    seen = [(inside[0, counts], found[0, counts]) for (inside, counts), found in slides]

    def reached(threshold):
        return np.mean([metrics.f1_score(true, score >= threshold, zero_division=0) for true, score in seen])

    best = max(reached(threshold) for _, scores in seen for threshold in scores)
    assert best - 0.01 <= reached(chosen[0]) <= best + 1e-9
    assert np.isnan(chosen[1])  # no slide shows the concept


def test_scored_slides_have_no_say_in_the_thresholds():
    def features(slide_id):
        return SimpleNamespace(slide_id=slide_id, coords=np.zeros((36, 2)), patch_size=64)

    inside = np.arange(36)[None] < 9
    known = (inside, np.ones(36, bool))
    maps = {"train": np.arange(36, 0, -1.0)[None], "S1": np.arange(36, 0, -1.0)[None] + 100}
    found = map_scores.score_maps(lambda slide: maps[slide.slide_id], features, {"S1": known}, {"train": known})
    assert 27 <= found.thresholds[0] <= 28
    assert found.auc[0, 0] == found.pointing[0, 0] == 1
    assert found.dice[0, 0] == pytest.approx(2 * 9 / (36 + 9))  # by the old threshold all patches are marked
    alone = map_scores.score_maps(lambda slide: maps[slide.slide_id], features, {"S1": known}, {})
    assert np.isnan(alone.dice).all() and alone.auc[0, 0] == 1


def test_chance_is_the_share_of_patches_inside():
    inside = np.array([[True, False, False, False], [False] * 4])
    found = map_scores.chance({"S1": (inside, np.array([True, True, True, False]))})
    assert found.auc[0, 0] == 0.5 and found.pointing[0, 0] == pytest.approx(1 / 3)
    assert found.dice[0, 0] == pytest.approx(metrics.f1_score([1, 0, 0], [1, 1, 1]))
    assert np.isnan([found.auc[0, 1], found.pointing[0, 1], found.dice[0, 1]]).all()


def test_lesions_need_a_slides_measures(slide, tmp_path):
    write_outlines(tmp_path / "S1.geojson", {"tumor": [SQUARE]})
    with pytest.raises(ValueError, match=r"S1: its size or mpp is unknown.*--mpp"):
        truth.read_lesion_task(tmp_path, [slide], ["tumor"], "tumor")
    large = Polygon(SQUARE.ring * 8)
    write_outlines(tmp_path / "S1.geojson", {"tumor": [large]})
    known = SlideFeatures("S1", "P1", slide.features, slide.coords, 64, 0.5, width=3000, height=3000)
    task = truth.read_lesion_task(tmp_path, [known], ["fat", "tumor"], "tumor")
    assert task.concept == 1 and [area.counts for area in task.slides["S1"].areas] == [True]


def test_what_outlines_cannot_tell_is_a_warning(slide, tmp_path):
    geometry = {"type": "Polygon", "coordinates": [SQUARE.ring.tolist()]}
    named = [{"names": ["Tumor", "Region"]}, {"name": "Vessel"}]
    features = [{"type": "Feature", "geometry": geometry, "properties": {"classification": one}} for one in named]
    point = {"type": "Point", "coordinates": [1, 2]}
    features.append({"type": "Feature", "geometry": point, "properties": {}})
    (tmp_path / "S1.geojson").write_text(json.dumps(features))
    (tmp_path / "texts.json").write_text(json.dumps({"tumor": ["tumor cells"]}))
    cohort = SimpleNamespace(
        slide_ids=["S1"], warnings=[], features=lambda _: slide, train_features=lambda seed: [slide]
    )
    found = truth.read_outlined(cohort, tmp_path / "texts.json", tmp_path, clear=None, lesions=None, seed=0)
    assert found.truth["S1"][0].sum() == 4  # the class "Tumor: Region" is of the concept "tumor"
    text = "\n".join(cohort.warnings)
    assert "S1.geojson: 1 Point left out" in text and "'Vessel' on 1 slide" in text and "Region" not in text
    (tmp_path / "texts.json").write_text(json.dumps({"fat": ["fat"]}))
    with pytest.raises(ValueError, match="none of its concepts.*'Tumor: Region' on 1 slide"):
        truth.read_outlined(cohort, tmp_path / "texts.json", tmp_path, clear=None, lesions=None, seed=0)

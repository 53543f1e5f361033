"""Baselines of mosaics: probes that are told classes or outlines find what features hold, and nothing in noise."""

import numpy as np
import pytest

from data_prep.build import import_features
from data_prep.settings import ImportSettings

SLIDES = {"train": 24, "val": 7, "test": 14}


@pytest.fixture
def score(benchmark_modules, textures_file, tmp_path):
    def run(**changes):
        textures, words = (benchmark_modules(f"real_tissue_parts.{name}") for name in ("textures", "words"))
        baselines = benchmark_modules("real_tissue_parts.baselines")
        found = textures.read_textures(textures_file(**changes))
        folder = textures.write_texture_cohort(tmp_path / "slides", found, words.TEXTURES, SLIDES, 0)
        settings = ImportSettings(mpp=textures.MPP, edge_um=300.0, workers=1)
        import_features(folder / "features", tmp_path / "records", settings)
        slides = baselines.read_slides(folder, tmp_path / "records", list(words.TEXTURES), "test", window=1)
        return {
            name: {task: float(one(np.ones((1, SLIDES["test"])))[0]) for task, one in tasks.items()}
            for name, tasks in baselines.score_baselines(slides).items()
        }

    return run


def test_probes_find_classes_in_features_that_tell_them(score, benchmark_modules):
    baselines = benchmark_modules("real_tissue_parts.baselines")
    found = score()
    assert found[baselines.OUTLINE_PROBES]["grounding"] > 0.95
    assert found[baselines.CLASS_PROBES]["grounding"] > 0.8
    assert found[baselines.OUTLINE_PROBES]["zero_shot_windows"] > 0.8
    assert found[baselines.EXACT_SETS]["retrieval"] > 0.9
    assert found[baselines.CLASS_PROBES]["retrieval"] > 5 / 14
    assert found[baselines.LINEAR]["grounding"] > 0.7


def test_probes_find_nothing_in_noise(score, benchmark_modules):
    baselines = benchmark_modules("real_tissue_parts.baselines")
    found = score(features=np.random.default_rng(1).normal(size=(1280, 9)).astype(np.float32))
    for name in (baselines.CLASS_PROBES, baselines.OUTLINE_PROBES, baselines.LINEAR):
        assert abs(found[name]["grounding"] - 0.5) < 0.08
    assert found[baselines.EXACT_SETS]["retrieval"] > 0.9

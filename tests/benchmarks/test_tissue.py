"""The benchmark of tissue masks: its measures, and slides that are known and the same each time."""

import numpy as np
import pytest
from PIL import Image

from data_prep.slides import open_slide


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("tissue")


@pytest.fixture
def truth(bench, benchmark_modules, monkeypatch):
    module = benchmark_modules("tissue_truth")
    monkeypatch.setattr(module, "EDGE", 480)
    module._files.cache_clear()
    yield module
    module._files.cache_clear()


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    for folder, kinds in (
        ("kather2016/tiles", ("01_TUMOR", "02_STROMA", "07_ADIPOSE", "08_EMPTY")),
        ("ebhi_seg/images", "x"),
    ):
        (tmp_path / "real" / folder).mkdir(parents=True)
        for kind in kinds:
            colour = 235 if kind == "08_EMPTY" else (190, 90, 160)
            tile = np.clip(np.array(colour) + rng.integers(-9, 9, (150, 150, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(tile).save(tmp_path / "real" / folder / f"{kind}__0.png")
    return tmp_path


def test_slides_are_the_same_each_time_and_tissue_is_where_it_is_said_to_be(truth, data):
    for condition in ("clean", "fat", "blue pen", "dust", "black border"):
        known, again = truth.compose(data, condition, 0), truth.compose(data, condition, 0)
        np.testing.assert_array_equal(known.picture, again.picture)
        assert known.picture.shape == (480, 480, 3) and known.tissue.mean() < 0.5
        assert not (known.artefact & known.tissue).any() and known.scored.mean() > 0.5
        if condition == "clean":
            assert known.tissue.mean() > 0.05
            stained = np.ptp(known.picture.astype(int), axis=-1) > 60
            assert (stained != known.tissue).mean() < 0.03 and not known.artefact.any()
        if condition.endswith("pen") or condition in ("dust", "black border"):
            assert known.artefact.any()


def test_measures(bench, tmp_path):
    tissue = np.zeros((400, 400), bool)
    tissue[:200] = True
    artefact = np.zeros_like(tissue)
    artefact[300:] = True
    scored = np.ones_like(tissue)
    scored[:, 200:] = False
    known = bench.Known("a", "clean", np.zeros((400, 400, 3), np.uint8), tissue, artefact, scored)
    mask = np.zeros((50, 50), bool)
    mask[:20] = mask[40:45] = True
    assert bench.score(mask, 8.0, known) == {
        "dice": round(2 * 160 / (200 + 200), 4), "lost": 0.2, "glass": 0.2, "artefact": 0.4
    }  # fmt: skip
    perfect = bench.score(tissue[::8, ::8], 8.0, known)
    assert perfect == {"dice": 1.0, "lost": 0.0, "glass": 0.0, "artefact": 0.0}
    rows = [{"slide": "a", "condition": "clean", "side": "otsu"} | perfect | {"artefact": None}]
    assert bench.summary(rows)["clean"]["otsu"] == {"dice": 1.0, "lost": 0.0, "glass": 0.0}
    bench.write(tmp_path / "s.tif", np.full((512, 512, 3), 240, np.uint8))
    with open_slide(tmp_path / "s.tif") as slide:
        assert slide.mpp == 0.5 and slide.image.level_count == 3

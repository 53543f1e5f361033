"""The page as a folder: whole, with the model's own scores and OpenSlide's tiles, and nothing of what went wrong."""

import json
import re
import shutil

import numpy as np
import pytest

from pathflip_jax import cli
from pathflip_jax.viewer import static
from pathflip_jax.viewer.layers import STEPS

TEXTS = ["necrosis", "fat"]


@pytest.fixture
def command(run_folder, tiny_cohort, slides_dir, tmp_path):
    sources = [
        "--records",
        str(tiny_cohort.records),
        "--slides-dir",
        str(slides_dir),
        "--texts",
        *TEXTS,
        "--method",
        "region",
    ]
    return ["report", str(run_folder), *sources, "--out", str(tmp_path / "page"), "--json"]


def read_script(path, start):
    found = re.fullmatch(rf"globalThis\.PATHFLIP{start}(.*?)\)?;\n", path.read_text(), re.DOTALL)
    return json.loads(found[1])


def test_a_page_holds_scores_areas_and_tiles(command, predictor, session, tmp_path, capsys, pixels):
    assert cli.main([*command, "--negative", "glands", "--slide-ids", "S01", "S04", "S20"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    out = tmp_path / "page"
    assert outcome["done"] == ["S01", "S04", "S20"] and outcome["page"] == str(out / "index.html")
    assert outcome["bytes"] == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    page = read_script(out / "slides.js", " = ")
    assert (page["live"], page["texts"], page["encoder"]) == (False, TEXTS, "tiny")
    assert [slide["image"] for slide in page["slides"]] == [True, True, False]
    for number, name in enumerate(outcome["done"]):
        slide = session.slides[int(name[1:])]
        content = read_script(out / "slides" / str(number) / "slide.js", rf"\.loaded\({number}, ")
        expected = predictor.ground(slide.features(), TEXTS, negative=["glands"], method="region")
        assert [layer["text"] for layer in content["layers"]] == TEXTS
        scores = [layer["scores"] for layer in content["layers"]]
        np.testing.assert_allclose(scores, expected.patch_scores, atol=1e-4)
        assert np.array_equal(np.reshape(content["coords"], (-1, 2)), expected.coords)
        assert all(layer["areas"].keys() == set(map(str, STEPS)) for layer in content["layers"])
        if slide.image is None:
            assert content["image"] is None and not (out / "slides" / str(number) / "tiles").exists()
            continue
        image, tiles = content["image"], out / "slides" / str(number) / "tiles"
        assert (image["width"], image["height"], image["first"], image["last"]) == (384, 320, 8, 9)
        assert sorted(file.name for file in (tiles / "9").iterdir()) == ["0_0.jpg", "0_1.jpg", "1_0.jpg", "1_1.jpg"]
        live = session.pictures.tile(slide.image, 9, 1, 0)
        assert (tiles / "9/1_0.jpg").read_bytes() == live


def test_a_page_of_maps_that_were_never_trained_is_not_begun(command, run_folder, tmp_path, capsys):
    folder = shutil.copytree(run_folder, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"loss": {"region_weight": 0.0}}))
    assert cli.main(["report", str(folder), *command[2:]]) == 2
    told = capsys.readouterr().err
    assert f"{folder}: method 'region' maps the attention of texts to regions" in told
    assert "(loss.region_weight is 0); use a trained one: slide" in told and not (tmp_path / "page").exists()


def test_levels_slides_and_order_can_be_chosen(command, tmp_path, capsys, predictor, session):
    assert cli.main([*command, "--max-pixels", "200", "--most-slides", "2"]) == 0
    text = predictor.encode_text(TEXTS)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    slides = np.stack([predictor.encode_slide(slide.features()).slide for slide in session.slides])
    best = np.argsort(-(slides / np.linalg.norm(slides, axis=1, keepdims=True) @ text.T).max(1))[:2]
    assert json.loads(capsys.readouterr().out)["done"] == [session.slides[i].slide_id for i in best]
    page = read_script(tmp_path / "page/slides.js", " = ")
    assert len(page["slides"][0]["similarities"]) == 2


def test_the_page_names_no_path_of_this_machine(command, tmp_path, slides_dir):
    """It is mailed to others. The run is named as it was given."""
    assert cli.main([*command, "--slide-ids", "S01"]) == 0
    for file in (tmp_path / "page").rglob("*.js"):
        assert str(slides_dir) not in file.read_text()


def test_ground_writes_the_page_of_its_slide(run_folder, tiny_cohort, slides_dir, tmp_path, capsys):
    place = ["--slide-id", "S01", "--image", str(slides_dir / "S01.tiff"), "--out", str(tmp_path / "maps")]
    command = ["ground", str(tiny_cohort.records), *TEXTS, "--checkpoint", str(run_folder), "--method", "region"]
    assert cli.main([*command, *place, "--page", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    page = tmp_path / "maps/page"
    assert written["page"] == str(page / "index.html") and (page / "page/openseadragon.min.js").is_file()
    content = read_script(page / "slides/0/slide.js", r"\.loaded\(0, ")
    scores = np.load(written["scores"])["patch_scores"]
    np.testing.assert_allclose([layer["scores"] for layer in content["layers"]], scores, atol=1e-4)


def test_a_broken_slide_is_reported_and_the_rest_is_there(command, slides_dir, tmp_path, capsys):
    whole = (slides_dir / "S01.tiff").read_bytes()
    (slides_dir / "S01.tiff").write_bytes(whole[:-6000])  # OpenSlide still takes it for a slide
    assert cli.main([*command, "--slide-ids", "S00", "S01", "S02"]) == 1
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["done"] == ["S00", "S02"]
    assert outcome["failed"][0]["slide"] == "S01"
    assert [slide["id"] for slide in read_script(tmp_path / "page/slides.js", " = ")["slides"]] == ["S00", "S02"]


def test_a_folder_is_written_anew_or_left_alone(command, tmp_path, capsys, monkeypatch):
    out = tmp_path / "page"
    assert cli.main([*command, "--slide-ids", "S00"]) == 0
    assert cli.main([*command, "--slide-ids", "S03"]) == 0
    assert [slide["id"] for slide in read_script(out / "slides.js", " = ")["slides"]] == ["S03"]
    before = (out / "slides.js").read_bytes()
    monkeypatch.setattr(static, "layer_facts", lambda layer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([*command, "--slide-ids", "S00"])
    assert (out / "slides.js").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"page", "slides"}, "something half written was left"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.doc").write_text("mine")
    assert cli.main([*command[:-3], "--out", str(other)]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (other / "thesis.doc").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--slide-ids", "S99"], "no slide 'S99' among the 24"),
        (["--texts", "fat", "fat"], "the same text is given twice"),
        (["--texts", " "], "no words"),
    ],
)
def test_wrong_input_is_named(command, change, message, tmp_path, capsys):
    assert cli.main([*command, *change]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "page").exists()


@pytest.mark.parametrize("option, value", [("--quality", "0"), ("--quality", "96"), ("--most-slides", "0")])
def test_numbers_out_of_bounds_are_named(command, option, value, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command, option, value])
    assert f"{option}: {value}: expected a whole number" in capsys.readouterr().err

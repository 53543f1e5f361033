"""Files of a grounding: GeoJSON that QuPath's own rules take, CLAM's attention file, and nothing half written."""

import json

import h5py
import numpy as np
import pytest

from pathflip_jax.data.readers.outlines import contains, read_outlines
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.grounding import files, pictures
from pathflip_jax.grounding.boxes import find_boxes
from pathflip_jax.grounding.surface import make_surface


@pytest.fixture
def found(made, grid, hot):
    ring = {(x, y) for x in (7, 8, 9) for y in (4, 5, 6)} - {(8, 5)}
    return made(grid * 64 + 500, np.stack([hot(ring | {(0, 0), (1, 1)}), hot({(2, 2), (2, 3)})]))


@pytest.fixture
def boxes(found):
    return find_boxes(found, make_surface(found, smooth=0), 0.5)


def test_geojson_has_what_qupath_reads(found, boxes, tmp_path):
    path = tmp_path / "S1.geojson"
    write_json(path, files.as_geojson("S1", found.texts, boxes), **files.FOR_READERS)
    content = json.loads(path.read_text())
    assert content["type"] == "FeatureCollection" and len(content["features"]) == len(boxes) == 3
    for feature, box in zip(content["features"], boxes, strict=True):
        properties = feature["properties"]
        assert feature["type"] == "Feature" and properties["objectType"] == "annotation"
        assert properties["classification"]["name"] == box.text
        assert all(0 <= c <= 255 and isinstance(c, int) for c in properties["classification"]["color"])
        assert properties["name"].startswith(box.text)
        assert set(properties["measurements"]) == {"score", "peak", "patches", "area mm^2"}
        parts = feature["geometry"]["coordinates"]
        for rings in parts if feature["geometry"]["type"] == "MultiPolygon" else [parts]:
            assert all(ring[0] == ring[-1] and len(ring) >= 4 for ring in rings)
    assert len({feature["id"] for feature in content["features"]}) == 3
    colours = {tuple(f["properties"]["classification"]["color"]) for f in content["features"]}
    assert len(colours) == 2
    outlines = read_outlines(path)  # what `pathflip evaluate --outlines` reads
    for number, text in enumerate(found.texts):
        held = contains(outlines[text], found.coords + 32.0)
        assert held.tolist() == (found.patch_scores[number] > 0.5).tolist()


def test_facts_list_the_boxes_of_each_text(found, boxes, tmp_path):
    facts = files.as_facts(found, [0.5, 0.5], 0.0, boxes)
    path = tmp_path / "S1.json"
    write_json(path, facts, **files.FOR_READERS)
    again = json.loads(path.read_text())
    assert [len(text["boxes"]) for text in again["texts"]] == [2, 1]
    assert again["texts"][1]["boxes"][0]["patches"] == 2 and again["mpp"] == 0.5 and again["width"] is None


def test_attention_is_laid_out_as_clam_does(found, tmp_path):
    path = files.write_attention(tmp_path / "S1_blockmap.h5", found, 1)
    with h5py.File(path) as file:
        scores, coords = file["attention_scores"][:], file["coords"][:]
        assert file.attrs["text"] == "text 1" and file["coords"].attrs["patch_size_level0"] == 64
    assert scores.dtype == np.float32 and scores[:, 0].tolist() == found.patch_scores[1].tolist()
    assert np.issubdtype(coords.dtype, np.integer) and coords.tolist() == found.coords.tolist()


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1}, **files.FOR_READERS)
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")}, **files.FOR_READERS)
    assert json.loads(path.read_text()) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_names_of_texts_are_file_names():
    assert pictures.short_name(1, "Tumor necrosis, ../../etc/passwd") == "1-tumor-necrosis-e"
    assert pictures.short_name(2, "壊死") == "2"
    assert len(pictures.short_name(10, "word " * 100)) <= 19


def test_slides_that_tell_their_bounds_are_counted_from_there(found, boxes):
    """QuPath shows an MRXS slide from its bounds on, and takes annotations in the same pixels."""
    plain, cropped = (files.as_geojson("S1", found.texts, boxes, bounds) for bounds in ((0, 0), (300, 40)))
    pairs = zip(plain["features"], cropped["features"], strict=True)
    for here, there in ((a["geometry"], b["geometry"]) for a, b in pairs if a["geometry"]["type"] == "Polygon"):
        moved = np.array(here["coordinates"][0]) - np.array(there["coordinates"][0])
        assert (moved == (300, 40)).all()

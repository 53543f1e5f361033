"""Outlines: GeoJSON in and out, and which patches they hold."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip_jax.data.readers import outlines
from pathflip_jax.data.readers.outlines import Polygon

SQUARE = np.array([[100, 100], [300, 100], [300, 300], [100, 300], [100, 100]], float)
HOLE = np.array([[150, 150], [250, 150], [250, 250], [150, 250], [150, 150]], float)


def feature(coordinates, name="tumor", kind="Polygon"):
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "annotation", "classification": {"name": name, "color": [1, 2, 3]}},
    }


def test_round_trip(tmp_path):
    written = {"tumor": [Polygon(SQUARE, (HOLE,)), Polygon(SQUARE + 500)], "fat": [Polygon(HOLE)]}
    outlines.write_outlines(tmp_path / "a.geojson", written)
    found = outlines.read_outlines(tmp_path / "a.geojson")
    assert list(found) == ["tumor", "fat"]
    assert np.array_equal(found["tumor"][0].holes[0], HOLE)
    assert np.array_equal(found["tumor"][1].ring, SQUARE + 500)


@pytest.mark.parametrize("wrap", [lambda f: {"type": "FeatureCollection", "features": [f]}, lambda f: [f], lambda f: f])
def test_collections_lists_and_single_features(tmp_path, wrap):
    multi = feature([[SQUARE.tolist(), HOLE.tolist()], [(SQUARE + 500).tolist()]], kind="MultiPolygon")
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(wrap(multi)), encoding="utf-8-sig")
    (polygons,) = outlines.read_outlines(path).values()
    assert len(polygons) == 2 and len(polygons[0].holes) == 1


def _written(tmp_path, *features):
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        ({"classification": {"names": ["Tumor", "Region"], "color": [1, 2, 3]}}, "Tumor: Region"),
        ({"classification": {"names": ["Tumor"]}}, "Tumor"),
        ({"classification": {"name": "Tumor", "names": []}}, "Tumor"),
        ({"classification": {"name": "Tumor: Positive"}}, "Tumor: Positive"),
        ({"classification": "Tumor"}, "Tumor"),
        ({"classification": None, "name": "Tumor"}, "Tumor"),
        ({"classification": {"names": []}, "name": " Tumor "}, "Tumor"),
    ],
)
def test_classes_as_qupath_writes_them(tmp_path, properties, name):
    path = _written(tmp_path, feature([SQUARE.tolist()]) | {"properties": properties})
    found = outlines.read_outlines(path)
    assert list(found) == [name]
    assert len(outlines.of_concept(found, "tumor")) == 1 and outlines.unknown_classes(found, ["TUMOR "]) == []
    assert outlines.of_concept(found, "tum") == [] and outlines.unknown_classes(found, ["stroma"]) == [name]


def test_polygons_are_found_in_collections_and_what_has_no_area_is_named(tmp_path):
    polygon = {"type": "Polygon", "coordinates": [SQUARE.tolist(), HOLE.tolist()]}
    several = {"type": "MultiPolygon", "coordinates": [[HOLE.tolist()], [(SQUARE + 500).tolist()]]}
    points = {"type": "MultiPoint", "coordinates": [[1, 2], [3, 4]]}
    inner = {"type": "GeometryCollection", "geometries": [several, points]}
    whole = {"type": "GeometryCollection", "geometries": [polygon, inner, {"type": "Polygon", "coordinates": []}]}
    path = _written(
        tmp_path,
        feature([[0, 0], [5, 5]], kind="LineString"),
        feature([]) | {"geometry": whole},
        feature([]) | {"geometry": None},
        feature([1, 2], kind="Point", name=None),
    )
    found = outlines.read_annotations(path)
    assert [len(polygon.holes) for polygon in found.outlines["tumor"]] == [1, 0, 0]
    assert found.left_out == {
        "LineString": [0],
        "MultiPoint": [1],
        "empty Polygon": [1],
        "feature without a geometry": [2],
        "Point": [3],
    }
    assert "1 MultiPoint" in found.note() and "features 0, 1, 2, 3, counted from 0" in found.note()
    assert outlines.read_annotations(_written(tmp_path, feature([SQUARE.tolist()]))).note() == ""


def test_collections_within_collections_have_no_end():
    whole = {"type": "Polygon", "coordinates": [SQUARE.tolist()]}
    for _ in range(5000):
        whole = {"type": "GeometryCollection", "geometries": [whole]}
    assert [kind for kind, _ in outlines._simple(whole)] == ["Polygon"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps([{"type": "Polygon", "coordinates": [SQUARE.tolist()]}]), "feature 0.*no class"),
        (json.dumps({"type": "GeometryCollection", "geometries": []}), "feature 0.*GeometryCollection"),
        (json.dumps([feature([SQUARE.tolist()]), feature([], kind="Circle")]), "feature 1.*'Circle'"),
        (json.dumps([feature([SQUARE[:2].tolist()])]), "feature 0.*2 points"),
        (json.dumps([feature([SQUARE.tolist()]) | {"properties": {"classification": {"names": "x"}}}]), "feature 0"),
        ("{not json", "not a GeoJSON"),
        (json.dumps([{"type": "Feature"}]), "feature 0"),
        (json.dumps([feature([SQUARE.tolist()], name=None)]), "no class"),
        (json.dumps([feature([1, 2], kind="Point")]), "annotations is a polygon"),
        (json.dumps([feature([["x"]])]), "feature 0"),
        (json.dumps([3]), "feature 0"),
        ("3", "no list of features"),
        ('{"type": "FeatureCollection"}', "no list of features"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps([feature([[SQUARE.tolist()]])]), "feature 0"),
        (json.dumps([feature([[[1e308, 0], [1, 1]]])]), "feature 0"),
        (json.dumps([feature([SQUARE.tolist()]) | {"properties": {"classification": ["x"]}}]), "feature 0"),
    ],
)
def test_faulty_files_name_the_fault(tmp_path, content, message):
    path = tmp_path / "broken.geojson"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        outlines.read_outlines(path)
    assert "broken.geojson" in str(error.value)


def test_patch_centres_decide():
    coords = np.array([[90, 90], [80, 90], [280, 100], [190, 190], [95, 295]])
    found = outlines.patches_inside([Polygon(SQUARE, (HOLE,))], coords, 32)
    assert found.tolist() == [True, False, True, False, False]


def test_area_fraction_equals_the_overlap_of_rectangles():
    rng = np.random.default_rng(0)
    coords = rng.integers(0, 400, (200, 2))
    found = outlines.area_fraction([Polygon(SQUARE)], coords, 64, samples=64)
    low, high = np.maximum(coords, 100), np.minimum(coords + 64, 300)
    expected = np.clip(high - low, 0, None).prod(1) / 64**2
    assert np.abs(found - expected).max() < 0.04
    assert outlines.area_fraction([Polygon(SQUARE)], coords[:0], 64).shape == (0,)


KEYS = st.sampled_from(["type", "coordinates", "geometries", "geometry", "features", "name", "names", "properties"])
TYPES = ["Point", "Polygon", "MultiPolygon", "GeometryCollection", "Feature", "FeatureCollection", "", "x"]
LEAVES = st.none() | st.booleans() | st.integers(-9, 9) | st.just(float("nan")) | st.sampled_from(TYPES)
THINGS = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=8)


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(["type", "geometry", "properties"]), THINGS), THINGS, THINGS)
def test_whatever_a_file_holds_it_is_read_or_named(tmp_path_factory, first, geometry, classification):
    path = tmp_path_factory.getbasetemp() / "any.geojson"
    found = feature([SQUARE.tolist()]) | {"geometry": geometry, "properties": {"classification": classification}}
    for content in (first, [first], {"type": "FeatureCollection", "features": [found]}, geometry):
        path.write_text(json.dumps(content))
        try:
            assert all(name and polygons for name, polygons in outlines.read_outlines(path).items())
        except ValueError as error:
            assert "any.geojson" in str(error)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=3, max_size=8), st.integers(1, 9))
def test_raster_agrees_with_points(corners, downsample):
    """The raster of an outline is the point test at the centres of its pixels."""
    corners = np.array(corners) + [0.37, 0.41]  # so that no pixel's centre lies on a line between lattice points
    around = corners - corners.mean(0)
    corners = corners[np.argsort(np.arctan2(around[:, 1], around[:, 0]), kind="stable")]  # a ring that does not cross
    polygon = Polygon(np.concatenate([corners, corners[:1]]))
    shape = (500 // downsample, 500 // downsample)
    mask = outlines.rasterise([polygon], shape, (0, 0), downsample)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    centres = (np.stack([columns.ravel(), rows.ravel()], 1) + 0.5) * downsample
    points = outlines.contains([polygon], centres).reshape(shape)
    assert (mask != points).sum() <= 3


def test_many_small_outlines_are_painted_as_on_the_whole_raster():
    rng = np.random.default_rng(0)
    polygons = []
    for _ in range(60):
        centre, angles = rng.uniform(-20, 220, 2), np.sort(rng.uniform(0, 2 * np.pi, 9))
        ring = centre + rng.uniform(2, 40, (9, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)
        polygons.append(Polygon(ring, (centre + (ring - centre) * 0.4,)))
    found = outlines.rasterise(polygons, (50, 70), np.array([3.0, 5.0]), 3.0)
    centres = np.stack(np.meshgrid(np.arange(70), np.arange(50)), -1).reshape(-1, 2) * 3.0 + [4.5, 6.5]
    np.testing.assert_array_equal(found.ravel(), outlines.contains(polygons, centres))


def test_features_without_a_class_get_the_one_that_the_caller_names(tmp_path):
    ring = [[0, 0], [40, 0], [40, 40], [0, 40], [0, 0]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    feature = {"type": "Feature", "properties": {"tissue_id": 0}, "geometry": geometry}  # as TRIDENT writes it
    path = tmp_path / "s.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    assert list(outlines.read_annotations(path, "Tissue").outlines) == ["Tissue"]
    with pytest.raises(ValueError, match="feature 0 has no class"):
        outlines.read_annotations(path)

"""Our GeoJSON read by GDAL and measured by shapely; what they write is kept in tests/golden for ours to read."""

import json
import os
from pathlib import Path

import geopandas
import numpy as np
import pytest
from shapely import MultiPolygon, Polygon, box

INPUT = Path(os.environ["PEER_INPUT"])
KEPT = Path(__file__).parents[2] / "golden" / "geopandas.geojson"
MM2 = 0.5**2 * 1e-6  # of a level-0 pixel


def test_gdal_reads_every_area_valid_and_as_large_as_we_say():
    table, expected = geopandas.read_file(INPUT / "areas.geojson"), json.loads((INPUT / "areas.json").read_text())
    assert len(table) == len(expected) == 3 and table.geometry.is_valid.all()
    assert table["objectType"].tolist() == ["annotation"] * 3
    for (_, row), area in zip(table.iterrows(), expected, strict=True):
        classification, measured = (
            value if isinstance(value := row[key], dict) else json.loads(value)
            for key in ("classification", "measurements")
        )
        assert classification["name"] == area["text"] and row["name"].startswith(area["text"])
        assert measured["area mm^2"] == area["area_mm2"]
        np.testing.assert_allclose(row.geometry.area * MM2, area["area_mm2"], rtol=0.05)  # outlines cut corners
        x, y, width, height = area["bounds"]
        assert box(x - 1, y - 1, x + width + 1, y + height + 1).covers(row.geometry)
    assert any(shape.interiors for shape in table.geometry.explode().tolist())


@pytest.mark.filterwarnings("ignore:'crs' was not provided:UserWarning")  # pixels of a slide are on no globe
def test_what_geopandas_writes_is_the_golden_file(tmp_path):
    """A table of tissue areas: a square with a hole, and an area of two parts, each with its class in a column."""
    hole = Polygon([(100, 100), (300, 100), (300, 300), (100, 300)], [[(150, 150), (250, 150), (250, 250), (150, 250)]])
    two = MultiPolygon([box(600, 600, 700, 700), box(800, 600, 900.5, 700)])
    table = geopandas.GeoDataFrame({"classification": ["tumor", "fat"], "grade": [2, None]}, geometry=[hole, two])
    table.to_file(tmp_path / "geopandas.geojson", driver="GeoJSON")
    if not KEPT.exists():
        KEPT.write_bytes((tmp_path / "geopandas.geojson").read_bytes())
    assert json.loads((tmp_path / "geopandas.geojson").read_text()) == json.loads(KEPT.read_text())

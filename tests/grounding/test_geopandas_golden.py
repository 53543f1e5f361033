"""Reading of outlines that geopandas wrote (tests/golden/geopandas.geojson, kept by the peer `geojson`)."""

from pathlib import Path

import numpy as np

from pathflip_jax.data.readers.outlines import contains, read_outlines

KEPT = Path(__file__).parents[1] / "golden" / "geopandas.geojson"


def test_outlines_of_geopandas_hold_what_they_mean():
    found = read_outlines(KEPT)
    assert list(found) == ["tumor", "fat"] and len(found["fat"]) == 2
    points = np.array([[120, 200], [200, 200], [650, 650], [750, 650], [900.2, 650]], float)  # in the hole, between
    assert contains(found["tumor"], points).tolist() == [True, False, False, False, False]
    assert contains(found["fat"], points).tolist() == [False, False, True, False, True]

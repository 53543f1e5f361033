"""Patch names of feature tables: all known spellings give the same positions, unknown or ambiguous ones are refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip_jax.data.readers.csv_features import read_csv

SPELLINGS = {
    "{x}_{y}": 0,
    "{x}_{y}.png": 0,
    "{x}.0_{y}.0": 0,
    "{x}.0_{y}.000.jpeg": 0,
    "S1_{x}_{y}.jpg": 0,
    "S1_{x}_{y}_256.jpg": 256,
    "S1_{x}_{y}_256_256.jpg": 256,
    "S1_{x}_{y}_{x2}_{y2}.png": 512,
    "other_{x}_{y}": 0,
    "patches/S1/{x}_{y}.png": 0,
    "patches\\S1\\{x}_{y}.png": 0,
    "S1_{x}_{y}_level0.png": 0,
    "S1 [x={x};y={y};w=512;h=512]": 512,
    "S1 [d=2;x={x};y={y};w=512;h=512].tif": 512,
    "S1_x{x}_y{y}.png": 0,
    "x_{x}_y_{y}": 0,
    "{x}x_{y}y.png": 0,
    "77_{x}_{y}": 0,
    "case_x2_{x}_{y}": 0,
}
PLACES = st.lists(
    st.tuples(st.integers(-400, 200_000), st.integers(-400, 200_000)), min_size=2, max_size=6,
    unique_by=(lambda place: place[0], lambda place: place[1]),
)  # fmt: skip


def write(path, names):
    rows = [f"0.5,1.5,{name}" for name in names]
    path.write_text("\n".join(["0,1,patch", *rows]) + "\n")
    return path


def spelt(name, places):
    return [name.format(x=x, y=y, x2=x + 512, y2=y + 512) for x, y in places]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(SPELLINGS)), PLACES)
def test_every_known_spelling_is_read_whole(tmp_path_factory, name, places):
    path = write(tmp_path_factory.mktemp("csv") / "S1.csv", spelt(name, places))
    fields = read_csv(path, "S1")
    assert fields["coords"].tolist() == [list(place) for place in places]
    assert fields.get("patch_size", 0) == SPELLINGS[name] and fields["features"].shape == (len(places), 2)


@pytest.mark.parametrize("name", sorted(SPELLINGS))
def test_a_single_patch(tmp_path, name):
    """Of one row, nothing but the slide's id tells a number in front from a place."""
    path = write(tmp_path / "S1.csv", spelt(name, [(1000, 2000)]))
    if name.startswith("77_"):
        with pytest.raises(ValueError, match="not clear"):
            read_csv(path, "S1")
    else:
        assert read_csv(path, "S1")["coords"].tolist() == [[1000, 2000]]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["patch1", "patch2"], r"line 2: ends in 'patch1'.*x_y, slide_x_y"),
        (["S1-1000_2000"], "line 2"),
        (["1000-2000"], "line 2"),
        (["S1_1000_2000_20x.png"], "line 2"),
        (["S1_1000_2000_level1"], "coordinates of level 1, expected those of level 0"),
        (["S1_1000_2000_mpp0.5"], "line 2"),
        (["1_2_3_4_5", "6_7_8_9_10"], "not clear which of the 5 numbers are x and y"),
        (["10_1000_2000", "20_1512_2512"], "not clear which of the 3 numbers are x and y"),
        (["1000_2000", "S9_1000_2000_256"], r"names with \[2, 3\] numbers"),
        (["S1 [x=1;y=2;w=512;h=512]", "S1 [x=513;y=2;w=256;h=256]"], "patches of 2 sizes"),
        (["S1 [x=1;y=2;w=512;h=300]"], "a patch of 512 x 300, expected a square"),
    ],
)
def test_unknown_and_unclear_names_are_refused(tmp_path, names, said):
    path = write(tmp_path / "S1.csv", names)
    with pytest.raises(ValueError, match=said) as error:
        read_csv(path, "S1")
    assert str(path) in str(error.value) and "expected" in str(error.value)


def test_a_slide_id_of_digits_is_no_place(tmp_path):
    path = write(tmp_path / "1000.csv", ["1000_1000_2000", "1000_1512_2000"])
    assert read_csv(path, "1000")["coords"].tolist() == [[1000, 2000], [1512, 2000]]
    path = write(tmp_path / "1000.csv", ["1000_2000", "1000_2512"])
    assert read_csv(path, "1000")["coords"].tolist() == [[1000, 2000], [1000, 2512]], "a column at x 1000"
    assert np.isfinite(read_csv(path, "1000")["features"]).all()

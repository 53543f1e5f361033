"""SlideChat's CSV tables of patch features: one row per patch, whose name holds its coordinates."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pathflip_jax.data.readers.feature_format import FeatureFields, FeatureFormat, is_text, slide_id_of
from pathflip_jax.data.storage.folders import describe_placeholder

LONGEST_LINE = 2**20  # characters of a CSV line: 2,560 numbers of 17 digits are 50,000
_NUMBER = r"-?\d{1,12}(?:\.\d{1,6})?"
_PICTURE = re.compile(r"\.(png|jpe?g|tiff?|bmp|webp|npy|pt)$", re.IGNORECASE)
_LEVEL = re.compile(r"[_ -]level[_-]?(\d+)$", re.IGNORECASE)
# "x=1000", "x1000" or "x_1000", not the x of a word.
_LABELLED = re.compile(rf"(?<![A-Za-z0-9])(x|y|w|h|d)[=:_ ]?({_NUMBER})(?![A-Za-z0-9.])", re.IGNORECASE)
_LABELLED_AFTER = re.compile(rf"(?:^|_)({_NUMBER})x_({_NUMBER})y$")  # GigaPath: 01000x_02000y
_UNLABELLED = re.compile(rf"(?:^|_){_NUMBER}(?:_{_NUMBER})+$")
EXPECTED = (
    "expected the patch's x and y in pixels at level 0 at the end of its name: x_y, slide_x_y, slide_x_y_size, or "
    "[x=..,y=..,w=..,h=..]"
)


class _Place(NamedTuple):
    """Numbers in a patch's name: x, y and any numbers before or after them, and a size labelled as such.

    `has_slide_id`: the name began with the slide id, so that none of the numbers belongs to it.
    """

    numbers: tuple[float, ...]
    size: float = 0.0
    has_slide_id: bool = False


def read_csv(path: Path, mpp: float | None = None, encoder: str | None = None) -> FeatureFields:
    """Content of a table with a header, one float column per feature, and a last column with the patch's name.

    Names may begin with the slide id. Raises ValueError for a foreign or truncated table, with its line.
    """
    features, places, names, slide_id = [], [], [], slide_id_of(path)
    expected = "expected SlideChat's table: columns of numbers and a last column x_y"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = iter(lambda: file.readline(LONGEST_LINE + 1), "")
            columns = len(_row(next(lines, "")))
            if columns < 2:
                raise ValueError(f"{path}: the header has {columns} columns; {expected}")
            for number, line in enumerate(lines, 2):
                row, place = _row(line), f"{path}: line {number}"
                if len(row) != columns:
                    found = f"{len(row)} columns, the header has {columns}"
                    raise ValueError(f"{place}: {found}; the file is truncated or not SlideChat's, write it again")
                try:
                    features.append(np.array(row[:-1], np.float32))
                except (ValueError, OverflowError):
                    raise ValueError(f"{place}: not all numbers (it ends in {row[-1]!r:.60}); {expected}") from None
                try:
                    places.append(_parse(row[-1], slide_id))
                except ValueError as error:
                    raise ValueError(f"{place}: ends in {row[-1]!r:.60}: {error}") from None
                names.append(row[-1])
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a csv table ({error}); {expected}") from None
    try:
        coords, size = _coords_and_size(places)
    except ValueError as error:
        raise ValueError(f"{path}: patch names such as {names[0]!r:.60}: {error}; {EXPECTED}") from None
    fields = {"features": np.array(features, np.float32).reshape(-1, columns - 1), "coords": coords}
    return fields | ({"patch_size": size} if size else {})


def _row(line: str) -> list[str]:
    """Fields of a line; rows never span several lines. Raises csv.Error for an oversized line."""
    if len(line) > LONGEST_LINE:
        raise csv.Error(f"a line of more than {LONGEST_LINE / 1e6:.0f} million characters")
    return next(csv.reader([line]), [])


def _parse(name: str, slide_id: str) -> _Place:
    """Numbers of a patch's name, which must match completely. Raises ValueError for a name of another form."""
    text = _PICTURE.sub("", name.strip().replace("\\", "/").rpartition("/")[2]).strip()
    if (level := _LEVEL.search(text)) and int(level[1]):
        raise ValueError(f"coordinates of level {int(level[1])}, expected those of level 0")
    text = _LEVEL.sub("", text)
    prefix = bool(slide_id) and re.match(re.escape(slide_id) + "[_ ]+", text)
    if prefix and (place := _numbers(text[prefix.end() :])):
        return place._replace(has_slide_id=True)
    if place := _numbers(text):
        return place
    raise ValueError(EXPECTED)


def _numbers(text: str) -> _Place | None:
    named = {key.lower(): float(number) for key, number in _LABELLED.findall(text)}
    if "x" in named and "y" in named:
        width, height = named.get("w", 0.0), named.get("h", 0.0)
        if width != height:
            raise ValueError(f"a patch of {width:g} x {height:g}, expected a square")
        return _Place((named["x"], named["y"]), width)
    if after := _LABELLED_AFTER.search(text):
        return _Place((float(after[1]), float(after[2])))
    run = _UNLABELLED.search(text)
    return _Place(tuple(float(number) for number in run[0].strip("_").split("_"))) if run else None


def _coords_and_size(places: Sequence[_Place]) -> tuple[np.ndarray, int]:
    """Coordinates [N, 2], and the patch size if the names hold it, else 0. Raises ValueError for ambiguous names."""
    if not places:
        return np.zeros((0, 2)), 0
    counts = {len(place.numbers) for place in places}
    if len(counts) > 1:
        raise ValueError(f"names with {sorted(counts)} numbers in one table")
    numbers = np.array([place.numbers for place in places], np.float64).reshape(len(places), -1)
    sizes = {place.size for place in places}
    if numbers.shape[1] > 2:
        numbers, sizes = _from_several(numbers, all(place.has_slide_id for place in places))
    if len(sizes) > 1:
        raise ValueError(f"patches of {len(sizes)} sizes, expected one")
    return numbers[:, :2].reshape(-1, 2), round(next(iter(sizes), 0.0))


def _from_several(numbers: np.ndarray, has_slide_id: bool) -> tuple[np.ndarray, set[float]]:
    """Coordinates [N, 2] and patch sizes from names with three or four numbers.

    Numbers that are constant over all rows are the patch size or part of the slide id.
    """
    count, several = numbers.shape[1], len(numbers) > 1
    alike = (numbers == numbers[0]).all(axis=0) & (has_slide_id or several)
    if count == 4:
        x, y, third, fourth = numbers.T
        if alike[2:].all() and (third == fourth).all() and (has_slide_id or not alike[:2].any()):
            return numbers[:, :2], {float(third[0])}
        edges = np.unique(np.stack([third - x, fourth - y]))
        if len(edges) == 1 and edges[0] > 0:
            return numbers[:, :2], {float(edges[0])}
    if count == 3 and alike[2] and (has_slide_id or not alike[0]):
        return numbers[:, :2], {float(numbers[0, 2])}
    if not has_slide_id and several and alike[:-2].all() and not alike[-1]:
        return numbers[:, -2:], {0.0}
    raise ValueError(f"it is not clear which of the {count} numbers are x and y")


def is_feature_table(path: Path) -> bool:
    """Whether a CSV header is SlideChat's: numbered columns and a patch name. Slide lists and logs have words.

    The placeholder of a file that was never fetched is accepted too: reading it reports the cause.
    """
    if describe_placeholder(path):
        return True
    with path.open("rb") as file:
        header = file.readline(1 << 20).decode("utf-8-sig", errors="replace").strip().split(",")
    return len(header) > 1 and all(re.search(r"\d$", cell) for cell in header[:-1])


FORMAT = FeatureFormat(
    name="CSV",
    extensions=(".csv",),
    tools=("SlideChat",),
    recognises=lambda start, path: is_text(start),
    read=read_csv,
    is_features=is_feature_table,
)

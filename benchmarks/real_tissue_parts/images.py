"""Collections of labelled tissue images with masks, and their split by case.

Two layouts are read: that of EBHI-Seg as published, `<Class>/image/*.png` beside `<Class>/label/*.png`, and a folder
with `images/`, `masks/` and `labels.csv` (image, mask, class, case, and optionally split).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.tables import read_rows

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
TEST_SHARE, VAL_SHARE = 0.22, 0.2  # of a class's cases, and of its remaining cases
LEAST_CASES = {"train": 2, "val": 1, "test": 1}  # of each class
MULTIPLE = 32  # a patch is half of an image's edge, and outlines are drawn on a grid of 8 px
_CASE = re.compile(r"[A-Za-z]*(\d+)")


class TissueImage(NamedTuple):
    """One image of one class and case with its mask; `split` is "" where the collection names none."""

    image: Path
    mask: Path
    label: str
    case: str
    split: str = ""


class Collection(NamedTuple):
    """The images of a folder, and the edge in pixels that all of them share."""

    images: list[TissueImage]
    edge: int


def read_collection(folder: Path, classes: Sequence[str]) -> Collection:
    """Read the images of a folder; `classes` are the known classes.

    Raises FileNotFoundError or ValueError, naming the file, for missing images and masks, unknown classes, images of
    several sizes or of a size that patches do not divide, and a case on two sides of a given split.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder of EBHI-Seg, or one with labels.csv")
    table = folder / "labels.csv"
    images = _listed(table, classes) if table.exists() else _published(folder, classes)
    _check_sides(images, table)
    return Collection(images, _common_edge(images))


def class_name(given: str, classes: Sequence[str], where: object) -> str:
    """The known class that a folder or cell names, whatever its case, hyphens and abbreviation."""
    by_key = {_key(name): name for name in classes}
    key = _key(given)
    if key not in by_key:
        raise ValueError(
            f"{where}: the class {given!r} is unknown; expected {', '.join(classes)}; rename it, or take it away"
        )
    return by_key[key]


def _key(name: str) -> str:
    words = re.sub(r"[\W_]+", " ", name.casefold()).split()
    return " ".join({"in": "intraepithelial neoplasia"}.get(word, word) for word in words)


def case_of(name: str, where: object) -> str:
    """The case of an image by the first number in its name: prefixes of letters do not tell cases apart."""
    found = _CASE.match(name)
    if found is None:
        raise ValueError(
            f"{where}: no case number at the start of {name!r}; expected a name such as GT2001837-1-400-002"
        )
    return found.group(1)


def _listed(table: Path, classes: Sequence[str]) -> list[TissueImage]:
    images = []
    for row in read_rows(table):
        cells = row.values
        missing = [name for name in ("image", "mask", "class", "case") if not str(cells.get(name, "")).strip()]
        if missing:
            raise ValueError(f"{row.place}: no {', '.join(missing)}; expected the columns image, mask, class, case")
        image, mask = (table.parent / str(cells[name]) for name in ("image", "mask"))
        for path in (image, mask):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: missing, though {row.place} names it; copy it there, or drop the row")
        split = str(cells.get("split", "") or "").strip().lower()
        if split not in ("", "train", "val", "test"):
            raise ValueError(f"{row.place}: the split {split!r} is unknown; expected train, val, test or nothing")
        label = class_name(str(cells["class"]), classes, row.place)
        images.append(TissueImage(image, mask, label, case_of(str(cells["case"]), row.place), split))
    return images


def _published(folder: Path, classes: Sequence[str]) -> list[TissueImage]:
    images = []
    for inside in sorted(path for path in folder.iterdir() if (path / "image").is_dir()):
        label = class_name(inside.name, classes, inside)
        masks = inside / "label"
        if not masks.is_dir():
            raise FileNotFoundError(
                f"{masks}: no such folder, and {inside / 'image'} is there; masks are expected in it under the names "
                "of their images; extract the archive again"
            )
        by_stem = {path.stem: path for path in sorted(masks.iterdir()) if path.suffix.lower() in SUFFIXES}
        files = [path for path in sorted((inside / "image").iterdir()) if path.suffix.lower() in SUFFIXES]
        bare = [path.name for path in files if path.stem not in by_stem]
        if bare:
            raise FileNotFoundError(
                f"{masks}: no mask of {preview(bare)}; expected one of the same name for each of {len(files)} images; "
                "extract the archive again, or take the images away"
            )
        images += [TissueImage(path, by_stem[path.stem], label, case_of(path.stem, path)) for path in files]
    if not images:
        raise FileNotFoundError(
            f"{folder}: neither labels.csv nor folders <Class>/image in it; expected EBHI-Seg as published "
            "(Adenocarcinoma/image, Adenocarcinoma/label, ...), or images/, masks/ and labels.csv"
        )
    return images


def _check_sides(images: Sequence[TissueImage], table: Path) -> None:
    sides = defaultdict(set)
    for one in images:
        sides[one.case].add("test" if one.split == "test" else "train")
    both = sorted(case for case, found in sides.items() if len(found) > 1)
    if both:
        raise ValueError(
            f"{table}: the cases {preview(both)} are on both sides of the split, in test and in another; expected each "
            "case on one side (the digits of its name are the case, whatever their prefix); move its images to one "
            "split, or empty the column `split`"
        )


def _common_edge(images: Sequence[TissueImage]) -> int:
    sizes: dict[tuple[int, int], Path] = {}
    for one in images:
        found = {path: _size(path) for path in (one.image, one.mask)}
        if found[one.image] != found[one.mask]:
            raise ValueError(
                f"{one.mask}: {_by(found[one.mask])} px, its image {one.image} {_by(found[one.image])}; expected masks "
                "of the size of their images"
            )
        sizes.setdefault(found[one.image], one.image)
    if len(sizes) > 1:
        listed = preview(f"{path} ({_by(size)} px)" for size, path in sizes.items())
        raise ValueError(f"images of several sizes: {listed}; resize or crop them to one")
    (size, path), *_ = sizes.items()
    if size[0] != size[1] or size[0] % MULTIPLE or size[0] < 4 * MULTIPLE:
        raise ValueError(
            f"{path}: {_by(size)} px; expected squares whose edge is a multiple of {MULTIPLE} px, at least "
            f"{4 * MULTIPLE}; crop them"
        )
    return size[0]


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as opened:
            return opened.size
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image that Pillow reads; copy it again") from None


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def assign_splits(images: Sequence[TissueImage], seed: int) -> dict[str, str]:
    """The split of each case: "train", "val" or "test".

    Test cases are those that the collection names, else a fixed 22% of the cases of each class; a fifth of the others
    validate, by `seed`. A case with images of several classes counts for the rarest, so that every class is on every
    side. Raises ValueError for a class with too few cases.
    """
    classes_of = defaultdict(set)
    for one in images:
        classes_of[one.case].add(one.label)
    sizes = Counter(label for found in classes_of.values() for label in found)
    stratum = {case: min(found, key=lambda label: (sizes[label], label)) for case, found in classes_of.items()}
    named = {one.case for one in images if one.split == "test"}
    # The published collection has one test set, whatever the seed.
    test = named or _draw(stratum, classes_of, TEST_SHARE, np.random.default_rng(0))
    rest = {case: label for case, label in stratum.items() if case not in test}
    given = {one.case for one in images if one.split == "val"}
    val = given or _draw(rest, classes_of, VAL_SHARE, np.random.default_rng([seed, 1]))
    splits = {case: "test" if case in test else "val" if case in val else "train" for case in sorted(stratum)}
    for label in sorted(sizes):
        found = Counter(split for case, split in splits.items() if label in classes_of[case])
        few = [
            f"{found[split]} for {split} (at least {least})"
            for split, least in LEAST_CASES.items()
            if found[split] < least
        ]
        if few:
            raise ValueError(
                f"class {label!r}: {sizes[label]} cases are too few for a split by case: {', '.join(few)}; add cases "
                "of it, or take the class away"
            )
    return splits


def _draw(stratum: dict[str, str], classes_of: dict[str, set[str]], share: float, rng) -> set[str]:
    """Cases drawn class by class, rarest first, until a share of the cases that show the class is drawn."""
    drawn: set[str] = set()
    sizes = Counter(label for case in stratum for label in classes_of[case])
    for label in sorted(sizes, key=lambda label: (sizes[label], label)):
        showing = {case for case in stratum if label in classes_of[case]}
        wanted = max(1, round(share * len(showing))) - len(showing & drawn)
        free = sorted(case for case in showing - drawn if stratum[case] == label)
        drawn |= {free[i] for i in rng.permutation(len(free))[: max(0, wanted)]}
    return drawn


def cases_by_class(images: Sequence[TissueImage], cases: Iterable[str]) -> dict[str, dict[str, list[int]]]:
    """Class -> case -> numbers of its images, of the given cases."""
    kept, found = set(cases), defaultdict(lambda: defaultdict(list))
    for number, one in enumerate(images):
        if one.case in kept:
            found[one.label][one.case].append(number)
    return {label: dict(sorted(own.items())) for label, own in sorted(found.items())}

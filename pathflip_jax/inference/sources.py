"""Slides below any path: slide files, DICOM series, feature files, records, and folders of them."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.slide_files import SLIDE_SUFFIXES, find_slides
from pathflip_jax.data.readers import guarded
from pathflip_jax.data.readers.feature_files import find_feature_files
from pathflip_jax.data.readers.feature_format import slide_id_of
from pathflip_jax.data.readers.features import SlideFeatures, read_features
from pathflip_jax.data.readers.formats import format_by_extension
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.recipe import read_recipe
from pathflip_jax.data.records.records import Records, is_shard
from pathflip_jax.data.storage.failures import Failure, preview
from pathflip_jax.data.storage.files import Place, as_path, exists
from pathflip_jax.data.storage.urls import is_url

CACHE_MARK = ".pathflip-slides"  # file in a cache of encoded slides, which is searched by nobody else


class SlideSource(NamedTuple):
    """Slide to read: its id, its slide file and the reader of its features, each None where missing.

    A source without features is a slide file that must be encoded first. `place` is the feature file, or the shard of
    records, that `features` reads.
    """

    slide_id: str
    image: Path | None
    features: Callable[[], SlideFeatures] | None
    place: Place | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether the features are in records."""
        return self.place is not None and is_shard(self.place.name)


class Sources(NamedTuple):
    """Slides found below a path in order of id, those that cannot be read, and notes on other files."""

    slides: list[SlideSource]
    failed: list[Failure]
    notes: list[str]


def find_sources(place: Place | str, known: Mapping[str, Any] | None = None, slide_id: str = "") -> Sources:
    """Find the slides of a file or folder; features take precedence over a slide file of the same id.

    `known` are the facts that feature files may lack, as `read_features` takes them; records state their own, and
    refuse them. `slide_id` names the slide of a feature file that is given alone. Raises FileNotFoundError for a
    missing path and for a folder without slides, ValueError for a file that is none of these.
    """
    place, known = as_path(place), known or {}
    if not exists(place):
        raise FileNotFoundError(f"{place}: no such file or folder")
    if is_url(place):
        if place.suffix == ".tfrecord" or place.is_dir():
            return Sources(_of_records(_open_records(place), known), [], [])
        raise ValueError(f"{place}: slides and feature files are read from a local disk only; copy it, or import it")
    if place.is_dir() and not format_by_extension(place):
        return _of_folder(place, known)
    if is_shard(place.name):
        return Sources(_of_records(_open_records(place), known), [], [])
    if is_slide_file(place):
        files, failed = find_slides([place])
        return Sources([SlideSource(name, path, None) for name, path in files.items()], failed, [])
    return Sources([_of_feature_file(place, known, slide_id)], [], [])


def is_records(place: Place) -> bool:
    """Whether a path is a folder of records, or is to be read as one: every folder at a URL."""
    return is_url(place) or (place.is_dir() and _has_shards(place))


def is_slide_file(path: Path) -> bool:
    """Whether a file is a slide, by its extension, else by its content where no feature file has its extension."""
    if path.suffix.lower() in SLIDE_SUFFIXES:
        return True
    if format_by_extension(path):
        return False
    try:
        return guarded.parse("pathflip_jax.data.readers.slide_pixels:detect", path)[0]["format"] is not None
    except (ValueError, OSError):
        return False


def choose(sources: Sources, slide_ids: Sequence[str] | None, place: Place | str) -> Sources:
    """Sources of these ids, in their order; all of them for None. Raises ValueError for an id that is not there."""
    if not slide_ids:
        return sources
    found = {source.slide_id: source for source in sources.slides}
    faults = {failure.slide: failure for failure in sources.failed}
    for name in slide_ids:
        if name in faults and name not in found:
            raise ValueError(faults[name].error)
        if name not in found:
            raise ValueError(
                f"{place}: no slide {name!r} among its {len(found)} slides, such as {preview(list(found)[:3])}"
            )
    return sources._replace(slides=[found[name] for name in dict.fromkeys(slide_ids)], failed=[])


def choose_one(sources: Sources, place: Place | str) -> SlideSource:
    """The only source. Raises ValueError where there are several, or where the only slide cannot be read."""
    if not sources.slides and sources.failed:
        raise ValueError(sources.failed[0].error)
    if len(sources.slides) != 1:
        names = ", ".join(source.slide_id for source in sources.slides[:3])
        raise ValueError(f"{place}: holds {len(sources.slides)} slides ({names}, ...); choose one by slide_id")
    return sources.slides[0]


def _open_records(place: Place) -> Records:
    if place.is_dir():
        return Records(place)
    records = Records([place])
    records.recipe = read_recipe(place.parent)
    return records


def _of_records(records: Records, known: Mapping[str, Any]) -> list[SlideSource]:
    if known:
        raise ValueError(
            f"{records.where}: records state {' and '.join(sorted(known))} themselves; leave it out here, and import "
            "the features again if what they state is wrong"
        )
    return [
        SlideSource(info.slide_id, None, partial(open_slide, records, number), info.shard)
        for number, info in enumerate(records.slides)
    ]


def _of_feature_file(path: Path, known: Mapping[str, Any], slide_id: str = "") -> SlideSource:
    name = slide_id or slide_id_of(path)
    return SlideSource(name, None, partial(read_features, path, slide_id=name, **known), path)


def _of_folder(folder: Path, known: Mapping[str, Any]) -> Sources:
    """Slides of a folder: records alone where it is a folder of records, else everything that lies below it."""
    if _has_shards(folder):
        return Sources(_of_records(Records(folder), known), [], [])
    failed, notes, faults = [], [], []
    images: dict[str, Path] = {}
    features: dict[str, SlideSource] = {}
    try:
        images, failed = find_slides(folder)
    except FileNotFoundError as error:
        faults.append(error)
    try:
        files = find_feature_files(folder)
    except FileNotFoundError as error:
        faults.append(error)
    else:
        failed, notes = [*failed, *files.unreachable], files.notes
        features = {slide_id_of(path): _of_feature_file(path, known) for path in files.files}
    for below in _records_folders(folder):
        for source in _of_records(Records(below), {}):
            if (other := features.get(source.slide_id)) and other.is_recorded:
                raise ValueError(
                    f"{folder}: slide {source.slide_id} is in two folders of records, {other.place.parent} and "
                    f"{below}; pass one of them"
                )
            features[source.slide_id] = source
    if not images and not features and not failed:
        detail = "; ".join(str(error).partition(": ")[2] for error in faults)
        raise FileNotFoundError(f"{folder}: neither slides, feature files nor records in it ({detail})")
    slides = [
        features[name]._replace(image=images.get(name)) if name in features else SlideSource(name, images[name], None)
        for name in sorted(images.keys() | features.keys())
    ]
    return Sources(slides, [failure for failure in failed if failure.slide not in features], notes)


def _has_shards(folder: Path) -> bool:
    return any(map(is_shard, os.listdir(folder)))


def _records_folders(folder: Path) -> list[Path]:
    """Folders of records below a folder, without hidden ones, such as unfinished slides, and caches."""
    found = []
    for here, below, files in os.walk(folder):
        if CACHE_MARK in files:
            below.clear()
            continue
        below[:] = [name for name in below if not name.startswith(".")]
        if any(map(is_shard, files)):
            found.append(Path(here))
            below.clear()
    return sorted(found)

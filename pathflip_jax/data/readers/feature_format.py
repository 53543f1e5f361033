"""Interface between `read_features` and the readers of single file formats."""

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Required, TypedDict

import numpy as np


class FeatureFields(TypedDict, total=False):
    """Fields of `SlideFeatures` read from a file; unknown ones are absent.

    `step` is the distance between patches in level-0 pixels. `centres`: `coords` are the centres of patches, not their
    corners. `spots`: the gaps between patches are not their size. `edge`: `coords` are in pixels of an unstated level,
    at which a patch has this edge.
    """

    features: Required[np.ndarray]
    coords: np.ndarray
    patch_size: int
    mpp: float
    width: int
    height: int
    encoder: str
    step: float
    centres: bool
    spots: bool
    edge: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class FeatureFormat:
    """Feature file format: declared by its reader module, which `formats.py:FILES` lists.

    `name`, `extensions` (lower case, with the dot) and `tools`, the programs that write it, appear in help and errors.
    `recognises` takes a file's first 40 bytes and its path: the content decides, as extensions are often wrong.
    `read` takes the path, and the caller's mpp and encoder, None if unknown; it raises OSError or ValueError with the
    file, what was found, what was expected and the cure. `is_features` tells feature files from others of the same
    extensions when a folder is searched. `has_coords` is False if files of the format usually lack coordinates: the
    slide's file of another format is read instead, if there is one; `finds_coords` then tells a file that has them, in
    it or beside it. `is_folder`: a file of the format is a folder, of which `recognises` gets no bytes.
    """

    name: str
    extensions: tuple[str, ...]
    tools: tuple[str, ...]
    recognises: Callable[[bytes, Path], bool]
    read: Callable[[Path, float | None, str | None], FeatureFields]
    is_features: Callable[[Path], bool] | None = None
    has_coords: bool = True
    finds_coords: Callable[[Path], bool] | None = None
    is_folder: bool = False


def is_text(start: bytes) -> bool:
    """Whether the first bytes of a file are text in UTF-8, without control characters."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(start)  # allows a character cut off at the end
    except UnicodeDecodeError:
        return False
    return all(letter >= " " or letter in "\t\r\n" for letter in text)


def slide_id_of(path: Path | str) -> str:
    """Slide id from a feature file's name: no extension, no trailing `_features`, `_feats`, `_patches`, `.features.0`.

    Text after a dot is kept: it is the UUID of a TCGA id.
    """
    return re.sub(r"([_.-](features|feats|patches)|\.features\.\d+)$", "", Path(path).stem, flags=re.IGNORECASE)

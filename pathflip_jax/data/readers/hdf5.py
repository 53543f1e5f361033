"""Contents of an HDF5 feature file as plain numbers and texts; runs only in the worker of `guarded.py`.

libhdf5 crashes and hangs on corrupted files, so no other file reads with h5py, and no other process imports this one.
"""

import os
from itertools import islice
from typing import Any

import h5py
import numpy as np

from pathflip_jax.data.readers.guarded import Parsed, Refused, check_size, shared_empty
from pathflip_jax.data.storage import blocks

# Names of STAMP, of all others, and of Prov-GigaPath's dictionaries; AtlasPatch has a group with an array per encoder.
FEATURES = ("feats", "features", "tile_embeds")
EMBEDDINGS, BARCODES = "embeddings", "barcodes"  # of HEST-bench; the former alone may be anything
UNFINISHED = "__tmp_"  # AtlasPatch's prefix of interrupted runs
MOST_NAMES, MOST_NUMBERS, LONGEST_TEXT = 100, 16, 1000


def read(path: str, with_arrays: bool, encoder: str) -> Parsed:
    """Arrays `features` or `feats`, and `coords`; the facts are their attributes, and the file's ("/").

    `names` lists the top-level objects. If `features` is a group, the fact `encoders` lists its arrays, `encoder`
    selects from them, and the fact `encoder` is the name of the selection. Contiguous arrays are not read: `places`
    gives their offset, shape and dtype. Without `with_arrays` only the attributes are read. Raises OSError for anything
    but a complete HDF5 file, Refused for an array that is non-numeric, in another file, or too large for this one.
    """
    facts, arrays = {"places": {}}, {}
    try:
        with h5py.File(path, "r") as file:
            facts["names"] = sorted(islice(file, MOST_NAMES))
            facts["/"] = _attributes(file)
            features = next((name for name in FEATURES if name in file), "")
            if not features and EMBEDDINGS in file and BARCODES in file:
                features = EMBEDDINGS
            key = features if features == "feats" else "features"
            places = {key: features, "coords": "coords"}
            if features and isinstance(group := _own_object(file, features), h5py.Group):
                found = [own for own in islice(group, MOST_NAMES) if not own.startswith(UNFINISHED)]
                facts["encoders"] = sorted(found)
                places[key] = _choose(found, features, encoder) if with_arrays else ""
                facts["encoder"] = places[key].rpartition("/")[2]
            for name, place in places.items():
                if not place or place not in file or not isinstance(dataset := _own_object(file, place), h5py.Dataset):
                    continue
                facts[name] = _attributes(dataset)
                if with_arrays:
                    piece = _contiguous_extent(dataset, name, os.path.getsize(path))
                    if piece is None:
                        arrays[name] = _array(dataset, name, os.path.getsize(path))
                    else:
                        facts["places"][name] = piece
    except (Refused, MemoryError):
        raise
    except Exception as error:  # h5py raises errors of libhdf5 as any of eight types
        raise OSError(f"not a valid HDF5 file ({error}); copy or extract it again") from None
    return facts, arrays


def _choose(found: list[str], name: str, encoder: str) -> str:
    """Path of one encoder's features among those `found` in a group; "" if there is none."""
    chosen = [own for own in found if not encoder or own.casefold() == encoder.casefold()]
    if len(found) > 1 and len(chosen) != 1:
        asked = f"none is {encoder!r}" if encoder else "one has to be chosen"
        raise Refused(
            f"features of {len(found)} encoders ({', '.join(sorted(found))}), {asked}; pass encoder (--encoder)"
        )
    return f"{name}/{(chosen or found)[0]}" if found else ""


def _own_object(file: h5py.File, name: str) -> h5py.Dataset | h5py.Group:
    """Object under a name in the file, without following links to other files."""
    if isinstance(file.get(name, getlink=True), h5py.ExternalLink):
        raise Refused(f"{name!r} is a link to another file; copy the array itself into this one")
    found = file[name]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise Refused(f"{name!r} is stored in another file; copy the array itself into this one")
    return found


def _contiguous_extent(dataset: h5py.Dataset, name: str, file_size: int) -> tuple[int, tuple[int, ...], str] | None:
    """Offset, shape and dtype of an array stored contiguously in NumPy's memory layout."""
    if dataset.shape is None or dataset.dtype.kind not in "fiu":
        raise Refused(f"{name!r} has type {dataset.dtype}, expected numbers; extract it again")
    check_size(dataset.shape, dataset.dtype, file_size, repr(name))
    offset = dataset.id.get_offset()  # None for chunked and never written datasets
    if offset is None or dataset.file.userblock_size or dataset.id.get_type() != h5py.h5t.py_create(dataset.dtype):
        return None
    return (offset, dataset.shape, dataset.dtype.str) if offset + dataset.nbytes <= file_size else None


def _array(dataset: h5py.Dataset, name: str, file_size: int) -> np.ndarray:
    array = shared_empty(dataset.shape, dataset.dtype.newbyteorder("="), file_size, repr(name))
    if array.ndim and array.size:
        for rows, _ in blocks.row_blocks(array):
            dataset.read_direct(array, rows, rows)
    elif not array.ndim:
        array[...] = dataset[()]
    return array


def _attributes(place: h5py.Dataset | h5py.Group) -> dict[str, Any]:
    """Attributes that are strings, numbers or short lists of them, as Python values; others are ignored."""
    found = {}
    for name in islice(place.attrs, MOST_NAMES):
        try:
            value = place.attrs[name]
        except TypeError:  # a type without a NumPy equivalent
            continue
        if isinstance(value, bytes | str):
            found[name] = (value.decode(errors="replace") if isinstance(value, bytes) else value)[:LONGEST_TEXT]
        elif np.size(value) <= MOST_NUMBERS and np.asarray(value).dtype.kind in "fiub":
            found[name] = np.asarray(value).tolist()
    return found

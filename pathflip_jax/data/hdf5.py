"""What an HDF5 file of features holds, as plain numbers and texts; runs in the worker of `guarded.py` only.

libhdf5 crashes and stalls on mutated files, so no other file reads by h5py, and no other process imports this one.
"""

import os
from itertools import islice
from typing import Any

import h5py
import numpy as np

from pathflip_jax.data.guarded import Parsed, Refused, check_size, shared_empty

FEATURES = ("feats", "features")  # STAMP's name, everybody else's
MOST_NAMES, MOST_NUMBERS, LONGEST_TEXT = 100, 16, 1000


def read(path: str, with_arrays: bool) -> Parsed:
    """The arrays `features` or `feats`, and `coords`; the facts are the attributes of each, and the file's ("/").

    `names` lists what there is at the top. An array that lies in the file in one piece is not read: `places` says its
    offset, shape and dtype. Without `with_arrays` only the attributes are read. Raises OSError for what is no whole
    HDF5 file, Refused for an array of no numbers, in another file, or too large for this one.
    """
    facts, arrays = {"places": {}}, {}
    try:
        with h5py.File(path, "r") as file:
            facts["names"] = sorted(islice(file, MOST_NAMES))
            facts["/"] = _attributes(file)
            for name in (next((name for name in FEATURES if name in file), ""), "coords"):
                if not name or name not in file or not isinstance(dataset := _here(file, name), h5py.Dataset):
                    continue
                facts[name] = _attributes(dataset)
                if with_arrays:
                    place = _place(dataset, name, os.path.getsize(path))
                    if place is None:
                        arrays[name] = _array(dataset, name, os.path.getsize(path))
                    else:
                        facts["places"][name] = place
    except (Refused, MemoryError):
        raise
    except Exception as error:  # h5py passes on what libhdf5 finds as any of eight types
        raise OSError(f"not a whole HDF5 file ({error}); copy or extract it again") from None
    return facts, arrays


def _here(file: h5py.File, name: str) -> h5py.Dataset | h5py.Group:
    """What the file holds under a name: followed to no other file."""
    if isinstance(file.get(name, getlink=True), h5py.ExternalLink):
        raise Refused(f"{name!r} is a link to another file; copy the array itself into this one")
    found = file[name]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise Refused(f"{name!r} lies in another file; copy the array itself into this one")
    return found


def _place(dataset: h5py.Dataset, name: str, file_size: int) -> tuple[int, tuple[int, ...], str] | None:
    """Offset, shape and dtype of an array that lies in the file in one piece, as NumPy has it in memory."""
    if dataset.shape is None or dataset.dtype.kind not in "fiu":
        raise Refused(f"{name!r} is of type {dataset.dtype}, expected numbers; extract it again")
    check_size(dataset.shape, dataset.dtype, file_size, repr(name))
    offset = dataset.id.get_offset()  # none for chunks, and for what was never written
    if offset is None or dataset.file.userblock_size or dataset.id.get_type() != h5py.h5t.py_create(dataset.dtype):
        return None
    return (offset, dataset.shape, dataset.dtype.str) if offset + dataset.nbytes <= file_size else None


def _array(dataset: h5py.Dataset, name: str, file_size: int) -> np.ndarray:
    array = shared_empty(dataset.shape, dataset.dtype.newbyteorder("="), file_size, repr(name))
    if array.ndim and array.size:
        dataset.read_direct(array)
    elif not array.ndim:
        array[...] = dataset[()]
    return array


def _attributes(place: h5py.Dataset | h5py.Group) -> dict[str, Any]:
    """Attributes that are a text, a number or a few of them, as Python's own; of others there is no use here."""
    found = {}
    for name in islice(place.attrs, MOST_NAMES):
        try:
            value = place.attrs[name]
        except TypeError:  # a type that NumPy does not have
            continue
        if isinstance(value, bytes | str):
            found[name] = (value.decode(errors="replace") if isinstance(value, bytes) else value)[:LONGEST_TEXT]
        elif np.size(value) <= MOST_NUMBERS and np.asarray(value).dtype.kind in "fiub":
            found[name] = np.asarray(value).tolist()
    return found

"""Tensors of a PyTorch file (.bin, .pt, .pth), read without PyTorch and without running anything in it.

Since PyTorch 1.6 a file is an uncompressed ZIP archive: one pickle that describes the content, and the bytes of each
storage as a file. The pickle is interpreted with a closed list of names, all of which build inert objects of this
module; any other name ends the reading. Tensors are mapped from the disk, so that a file larger than memory opens.
"""

import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a file in a ZIP archive


def read_archive(path: Path) -> Any:
    """Content of a PyTorch file: usually a dictionary of arrays by name, or one that holds such dictionaries.

    Raises ValueError for a file that is damaged, of PyTorch before 1.6, or holds objects other than tensors, numbers,
    texts and containers of them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
            name = next(name for name in members if name.endswith("/data.pkl"))
            order = members.get(name.replace("data.pkl", "byteorder"))
            if order is not None and archive.read(order) != b"little":
                raise ValueError(f"{path}: stored with the most significant byte first; save it on a usual machine")
            with archive.open(name) as pickled:
                return _Interpreter(pickled, path, members, name.removesuffix("data.pkl")).load()
    except (zipfile.BadZipFile, StopIteration) as error:
        raise ValueError(
            f"{path}: not a PyTorch file of version 1.6 or later, or cut short; download it again, or save it anew: "
            'torch.save(torch.load("FILE", weights_only=True), "NEW")'
        ) from error
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else _damaged(path, error) from error
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: incomplete or damaged PyTorch file ({error!r:.200}); download it again")


class _Storage(NamedTuple):
    """Bytes of one or more tensors, mapped from the file."""

    array: np.ndarray


class _StorageType(NamedTuple):
    dtype: np.dtype


def _tensor(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    array = storage.array
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"a tensor of shape {shape} and strides {strides}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > array.size or (math.prod(shape) and last >= array.size):
        raise ValueError(f"a tensor of shape {shape}, larger than its {array.size} stored numbers")
    strides = tuple(stride * array.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(array[offset:], shape, strides, writeable=False)


def _parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


class _Namespace:
    """Stand-in for argparse.Namespace, in which training scripts keep their options."""


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("argparse", "Namespace"): _Namespace,
    **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
}


class _Interpreter(pickle.Unpickler):
    """Interpreter of the pickle that knows the names in `_NAMES` and no others."""

    def __init__(self, pickled: Any, path: Path, members: dict[str, zipfile.ZipInfo], folder: str) -> None:
        super().__init__(pickled)
        self._path, self._members, self._folder = path, members, folder
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Inert counterpart of a name."""
        if (module, name) not in _NAMES:
            raise ValueError(
                f"{self._path}: holds objects other than tensors ({module}.{name}); only tensors are read, since "
                'loading anything else can run code. Save the weights alone: torch.save(model.state_dict(), "NEW")'
            )
        return _NAMES[module, name]

    def persistent_load(self, description: Any) -> _Storage:
        """Storage that a tensor refers to."""
        kind, storage_type, key, _, count = description
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise ValueError(f"a reference to {kind!r:.50}")
        if key not in self._storages:
            self._storages[key] = _Storage(self._mapped(f"{self._folder}data/{key}", storage_type.dtype, count))
        return self._storages[key]

    def _mapped(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED or member.file_size < count * dtype.itemsize:
            raise ValueError(f"{name} has {member.file_size} bytes, expected {count * dtype.itemsize}")
        with self._path.open("rb") as file:
            file.seek(member.header_offset)
            header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        start = member.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
        return np.memmap(self._path, dtype, "r", start, (count,)) if count else np.empty(0, dtype)

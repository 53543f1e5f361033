"""Tensors and arrays of a PyTorch file (.bin, .pt, .pth), read without PyTorch and without running anything in it.

Since PyTorch 1.6 a file is an uncompressed ZIP archive: one pickle that describes the content, and the bytes of each
storage as a file. The pickle is interpreted with closed lists of instructions and of names, all of which build inert
objects of this module; any other ends the reading. Tensors are mapped from the disk, so that a file larger than memory
opens.
"""

import io
import math
import pickle
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
# NumPy's arrays in a pickle, as torch.save writes those that are not tensors.
_ARRAY_DTYPES = {code: np.dtype(code) for code in "f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1".split()}
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a file in a ZIP archive
# What the modules of ZIP and pickle raise for damaged bytes.
_DAMAGE = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, OSError, RuntimeError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip


def read_archive(path: Path, numpy_arrays: bool = False) -> Any:
    """Content of a PyTorch file: usually a dictionary of arrays by name, or one that holds such dictionaries.

    `numpy_arrays`: NumPy's arrays are read too, which feature files hold, but no file of weights. Raises ValueError for
    a file that is damaged, of PyTorch before 1.6, or holds objects other than tensors, numbers, texts and containers of
    them.
    """
    with path.open("rb") as file:
        try:
            return _content(path, file, numpy_arrays)
        except (zipfile.BadZipFile, StopIteration) as error:
            raise ValueError(
                f"{path}: not a PyTorch file of version 1.6 or later, or cut short; download it again, or save it "
                'anew: torch.save(torch.load("FILE", weights_only=True), "NEW")'
            ) from error
        except _DAMAGE as error:
            if str(error).startswith(f"{path}: "):
                raise
            reason = f"{type(error).__name__}: {error}"[:200]
            raise ValueError(f"{path}: incomplete or damaged PyTorch file ({reason}); download it again") from error


def _content(path: Path, file: BinaryIO, numpy_arrays: bool) -> Any:
    with zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        members = _Members(path, archive.infolist(), name.removesuffix("data.pkl"))
    if "byteorder" in members and bytes(members["byteorder"]) != b"little":
        raise ValueError(f"{path}: stored with the most significant byte first; save it on a usual machine")
    return _Interpreter(path, members, _NAMES | (_ARRAY_NAMES if numpy_arrays else {})).load()


class _Members:
    """Bytes of the files in an archive, mapped from the disk."""

    def __init__(self, path: Path, members: list[zipfile.ZipInfo], folder: str) -> None:
        self._members = {member.filename.removeprefix(folder): member for member in members}
        self._file = np.memmap(path, np.uint8, "r")

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> np.ndarray:
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        header = self._file[member.header_offset : member.header_offset + _LOCAL_HEADER.size]
        start = member.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)[-2:])
        found = self._file[start : start + member.file_size]
        if len(found) < member.file_size:
            raise ValueError(f"{name} has {len(found)} bytes, expected {member.file_size}")
        return found


class _StorageType(NamedTuple):
    dtype: np.dtype


def _tensor(storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> np.ndarray:
    numbers = [offset, *shape, *strides]
    if len(shape) != len(strides) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"a tensor of shape {shape} and strides {strides}")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if count else 0
    if count > len(storage) or last >= max(1, len(storage)):
        raise ValueError(f"a tensor of shape {shape}, larger than its {len(storage)} stored numbers")
    if not count:
        return np.empty(shape, storage.dtype)
    strides = tuple(stride * storage.itemsize for stride in strides)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False)


def _parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


class _ArrayDtype:
    """dtype of a pickled NumPy array, whose byte order is set by BUILD."""

    def __init__(self, code: str, *_: Any) -> None:
        if code not in _ARRAY_DTYPES:
            raise ValueError(f"an array of objects or of an unknown type ({code!r:.20})")
        self.dtype = _ARRAY_DTYPES[code]


class _ArrayClass:
    """Stands for `numpy.ndarray`, of which a pickle only holds the name."""


def _empty_array(*_: Any) -> np.ndarray:
    """Array that BUILD fills."""
    return np.empty(0, np.uint8)


def _fill_array(array: np.ndarray, state: tuple) -> None:
    _, shape, kind, by_columns, stored = state
    if type(kind) is not _ArrayDtype or type(stored) is not bytes or type(by_columns) is not bool:
        raise ValueError("an array of objects")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"an array of shape {shape}")
    if math.prod(shape) * kind.dtype.itemsize != len(stored):
        raise ValueError(f"an array of shape {shape} with {len(stored)} bytes")
    array.__setstate__((1, shape, kind.dtype, by_columns, stored))


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in {encoding!r:.20}")
    return text.encode(encoding)


# The names that torch.save writes for tensors, and that of the options which scripts keep beside them.
_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("argparse", "Namespace"): Namespace,
    **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
}
_ARRAY_NAMES: dict[tuple[str, str], Any] = {
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,  # NumPy 1
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _ArrayDtype,
    ("_codecs", "encode"): _encoded,
}
# The instructions that torch.save writes: none of them allocates more than it is long.
_INSTRUCTIONS = tuple(
    getattr(pickle, name)[0]
    for name in (
        "PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE EMPTY_TUPLE TUPLE "
        "TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS BINPUT "
        "LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID REDUCE NEWOBJ BUILD"
    ).split()
)


class _Interpreter(pickle._Unpickler):
    """Interpreter of the pickle that knows `_INSTRUCTIONS` and the given names, and no others.

    That in Python, since the one in C allocates as many entries as a damaged number says.
    """

    def __init__(self, path: Path, members: _Members, names: dict[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(members["data.pkl"]))
        self._path, self._members, self._names = path, members, names

    def find_class(self, module: str, name: str) -> Any:
        """Inert counterpart of a name."""
        if (module, name) not in self._names:
            raise ValueError(
                f"{self._path}: holds objects other than tensors ({module}.{name}); only tensors are read, since "
                'loading anything else can run code. Save the weights alone: torch.save(model.state_dict(), "NEW")'
            )
        return self._names[module, name]

    def persistent_load(self, description: Any) -> np.ndarray:
        """Storage that a tensor refers to."""
        kind, storage_type, key, _, count = description
        if kind != "storage" or type(storage_type) is not _StorageType or type(count) is not int or count < 0:
            raise ValueError(f"a reference to {count!r:.50} numbers of {kind!r:.50}")
        stored, dtype = self._members[f"data/{key}"], storage_type.dtype
        if len(stored) < count * dtype.itemsize:
            raise ValueError(f"data/{key} has {len(stored)} bytes, expected {count * dtype.itemsize}")
        return stored[: count * dtype.itemsize].view(dtype)

    def load_build(self) -> None:
        """Set the options of a namespace; the notes that a state_dict has beside its tensors are dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Namespace:
            vars(target).update(state)
        elif type(target) is _ArrayDtype:
            target.dtype = target.dtype.newbyteorder(state[1])
        elif type(target) is np.ndarray and not target.size and target.dtype == np.uint8:
            _fill_array(target, state)
        elif type(target) is not OrderedDict:
            raise ValueError(f"state of a {type(target).__name__}")

    dispatch = {code: pickle._Unpickler.dispatch[code] for code in _INSTRUCTIONS}
    dispatch[pickle.BUILD[0]] = load_build

"""Files on local disks and in buckets at URLs (gs://, s3://, any protocol of fsspec).

A local file is read directly into the target arrays. A bucket has high latency, but serves many requests concurrently:
all ranges of a read are requested together, nearby ones merged, and transient failures are retried.
"""

import io
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np

from pathflip_jax.data.storage.retry import REPLACE, UnavailableError, retry
from pathflip_jax.data.storage.urls import URL, is_url

if TYPE_CHECKING:  # importing it takes 0.1 s, spent only for URLs
    from upath import UPath

Place = Union[Path, "UPath"]  # a local path or a URL, with the methods of pathlib
Extent = tuple[int, Sequence[np.ndarray]]  # offset, and the contiguous arrays to fill in turn
Range = tuple["UPath", int | None, int | None]  # a file, its first byte and the end (exclusive)

STREAM = 4 << 20  # bytes: contiguous runs from this length on are left to the system's read-ahead
MOST_BUFFERS = 1024  # per call of preadv (IOV_MAX on Linux and macOS)
GAP = 1 << 16  # bytes: ranges this close are merged, which costs less than another request
PIECE = 8 << 20  # bytes: longer ranges are fetched in concurrent pieces, as a single stream is slower than the network
STREAM_BUFFER = 8 * PIECE  # bytes in memory of a file that is streamed to its end
AT_ONCE = 256  # small files requested together
EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}


def as_path(place: "str | os.PathLike | UPath") -> Place:
    """Path object of a local path (`Path`) or of a URL (`UPath`).

    Listings are not cached, as another process may have written since. Raises ValueError for an unknown protocol,
    ImportError naming the extra if its package is missing.
    """
    text = str(place)
    if not is_url(text):
        mangled = URL.match(text)
        if isinstance(place, Path) and mangled and mangled.group(1) in EXTRAS:
            raise ValueError(f"{text}: a URL that lost a slash in pathlib.Path; pass it as a string")
        return place if isinstance(place, Path) else Path(text.removeprefix("file://"))
    from upath import UPath

    if isinstance(place, UPath):
        return place
    protocol = text.partition("://")[0]
    try:
        path = UPath(text, use_listings_cache=False)
        path.fs  # noqa: B018 - created here, so that a missing package is reported here
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        cure = f"run `pip install pathflip-jax[{extra}]`" if extra else "install the missing package"
        raise ImportError(f"{text}: {protocol}:// is not supported by this installation ({error}); {cure}") from None
    except ValueError as error:
        raise ValueError(f"{text}: {error}; expected a local path, gs://, s3:// or another URL of fsspec") from None
    return path


class LocalFile:
    """An open file on a local disk, closed with its last reference."""

    def __init__(self, path: Path) -> None:
        self.path, self.fd = path, -1
        self.fd = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # otherwise read-ahead fetches most of a record for one region
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self, close: Callable = os.close) -> None:  # at interpreter exit, `os` may be gone before the file
        if self.fd >= 0:
            close(self.fd)

    def read(self, extents: Sequence[Extent]) -> Iterator[None]:
        """Fill the arrays of extents, none of them empty, yielding after each. Raises OSError at the end of the file.

        Scattered extents are requested together. For long runs the system reads ahead while the caller processes the
        last extent: in large pages, whereas requesting all of it in advance fills the cache with single ones.
        """
        for streamed, run in groupby(_neighbours(extents), lambda run: sum(_size(a) for _, a in run) >= STREAM):
            own = [extent for extents in run for extent in extents]
            yield from self._stream(own) if streamed else self._scattered(own)

    def _scattered(self, extents: Sequence[Extent]) -> Iterator[None]:
        if hasattr(os, "posix_fadvise"):  # all requests are issued before waiting for the first
            for offset, arrays in extents:
                os.posix_fadvise(self.fd, offset, _size(arrays), os.POSIX_FADV_WILLNEED)
        for offset, arrays in extents:
            self._fill(self.fd, arrays, offset)
            yield

    def _stream(self, extents: Sequence[Extent]) -> Iterator[None]:
        fd = self._reopened()
        try:
            # One byte of each of two pages: after that Linux reads ahead with a growing window.
            for page in (0, mmap.PAGESIZE):
                os.pread(fd, 1, extents[0][0] + page)
            for offset, arrays in extents:
                self._fill(fd, arrays, offset)
                yield
        finally:
            if fd != self.fd:
                os.close(fd)

    def _reopened(self) -> int:
        """Reopened descriptor of the same file, as read-ahead is per descriptor; not a new file of that name."""
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except OSError:
            return self.fd
        if os.path.samestat(os.fstat(fd), os.fstat(self.fd)):
            return fd
        os.close(fd)
        return self.fd

    def _fill(self, fd: int, arrays: Sequence[np.ndarray], offset: int) -> None:
        left = [array.reshape(-1).view(np.uint8) for array in arrays if array.size]
        full = 0
        while full < len(left):
            count = os.preadv(fd, left[full : full + MOST_BUFFERS], offset)
            if not count:
                raise _too_short(self.path, offset, sum(map(len, left[full:])))
            offset += count
            while full < len(left) and count >= len(left[full]):
                count -= len(left[full])
                full += 1
            if count:
                left[full] = left[full][count:]


class RemoteFile:
    """A file at a URL, read by ranges without an open connection."""

    def __init__(self, path: "UPath") -> None:
        self.path = path

    def read(self, extents: Sequence[Extent]) -> Iterator[None]:
        """Fill extents as `LocalFile.read`; all are fetched before the first is yielded."""
        spans = sorted({(offset, offset + _size(arrays)) for offset, arrays in extents})
        blocks: dict[int, bytearray] = {}  # by offset in the file
        pieces = []
        for start, stop in _merged(spans):
            blocks[start] = bytearray()
            pieces += [(start, at, min(at + PIECE, stop)) for at in range(start, stop, PIECE)]
        found = _fetch([(self.path, at, end) for _, at, end in pieces])
        for (start, at, end), data in zip(pieces, found, strict=True):
            if len(data) < end - at:
                raise _too_short(self.path, at + len(data), end - at - len(data))
            if len(data) > end - at:
                raise OSError(
                    f"{self.path}: {len(data)} bytes received for a range of {end - at}: the storage does not support "
                    "ranges; use another"
                )
            blocks[start] += data
        starts = np.array(list(blocks))
        for offset, arrays in extents:
            start = int(starts[np.searchsorted(starts, offset, side="right") - 1])
            block, at = np.frombuffer(blocks[start], np.uint8), offset - start
            for array in arrays:
                array.reshape(-1).view(np.uint8)[:] = block[at : at + array.nbytes]
                at += array.nbytes
            yield


def open_file(path: Place) -> LocalFile | RemoteFile:
    """File for reading ranges."""
    return LocalFile(path) if isinstance(path, Path) else RemoteFile(path)


def read_at(file: LocalFile | RemoteFile, size: int, offset: int) -> np.ndarray:
    """`size` bytes from `offset` on. Raises OSError if the file is shorter."""
    data = np.empty(size, np.uint8)
    for _ in file.read([(offset, [data])]):
        pass
    return data


def open_stream(path: Place, size: int) -> io.BufferedIOBase:
    """Sequential binary stream of a file of that many bytes."""
    if isinstance(path, Path):
        return path.open("rb")
    return io.BufferedReader(_Stream(path, size), STREAM_BUFFER)


class _Stream(io.RawIOBase):
    """Python file object for a URL; failed reads are retried from their position."""

    def __init__(self, path: "UPath", size: int) -> None:
        self._file, self._size, self._at = RemoteFile(path), size, 0

    def readable(self) -> bool:
        """True: the stream is readable."""
        return True

    def readinto(self, buffer) -> int:
        """Fill a buffer up to the end of the file."""
        array = np.frombuffer(buffer, np.uint8)[: self._size - self._at]
        if len(array):
            for _ in self._file.read([(self._at, [array])]):
                self._at += len(array)
        return len(array)


def read_bytes(path: Place) -> bytes:
    """Content of a small file. Raises FileNotFoundError if it is missing."""
    if isinstance(path, Path):
        return path.read_bytes()
    return _fetch([(path, None, None)])[0]


def read_many(paths: Sequence[Place]) -> list[bytes | None]:
    """Contents of many small files, None for missing ones; those at URLs are fetched concurrently."""
    found: list[bytes | None] = [_read_local(path) if isinstance(path, Path) else None for path in paths]
    remote = [i for i, path in enumerate(paths) if not isinstance(path, Path)]
    for i, data in zip(remote, _fetch([(paths[i], None, None) for i in remote], missing_ok=True), strict=True):
        found[i] = data
    return found


def _read_local(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def read_in_turn(paths: Sequence[Place]) -> Iterator[bytes | None]:
    """Contents of files as from `read_many`, one after the other, with few in memory at a time."""
    for first in range(0, len(paths), AT_ONCE):
        yield from read_many(paths[first : first + AT_ONCE])


def list_files(folder: Place) -> dict[str, int]:
    """Sizes of the files of a folder, by name. Raises FileNotFoundError if there is no such folder."""
    if isinstance(folder, Path):
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    found = retry(folder, lambda: folder.fs.ls(folder.path, detail=True))
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}


def file_sizes(paths: Sequence[Place]) -> list[int | None]:
    """Size of each file, None for missing ones. At URLs each folder is listed once for all of its files."""
    listed: dict[UPath, dict[str, int]] = {}
    sizes: list[int | None] = []
    for path in paths:
        if isinstance(path, Path):
            sizes.append(path.stat().st_size if path.is_file() else None)
            continue
        folder = path.parent
        if folder not in listed:
            try:
                listed[folder] = list_files(folder)
            except FileNotFoundError:
                listed[folder] = {}
        sizes.append(listed[folder].get(path.name))
    return sizes


def exists(path: Place) -> bool:
    """Whether a file or folder exists."""
    return path.exists() if isinstance(path, Path) else retry(path, path.exists)


def make_folder(path: Place) -> None:
    """Create a local folder and its parents; buckets have none, only objects with slashes in their names."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Place) -> None:
    """Delete a file if it exists."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
    else:
        retry(path, lambda: path.unlink(missing_ok=True))


def upload(source: Path, path: "UPath") -> None:
    """Upload a local file to a URL atomically. Raises OSError naming the URL."""

    def attempt() -> None:
        path.fs.put_file(str(source), path.path)
        stored, size = path.fs.info(path.path)["size"], source.stat().st_size
        if stored != size:
            raise OSError(f"{stored} of {size} bytes arrived")

    retry(path, attempt)


def _fetch(ranges: Sequence[Range], missing_ok: bool = False) -> list[bytes | None]:
    """Bytes of ranges (path, start, stop), fetched concurrently; None is an open end. Only failures are retried."""
    found: dict[int, bytes | None] = {}

    def attempt() -> None:
        systems: dict[object, list[int]] = {}
        for i, (path, _, _) in enumerate(ranges):
            if i not in found:
                systems.setdefault(path.fs, []).append(i)
        missed = []
        for system, numbers in systems.items():
            paths, starts, stops = zip(*(ranges[i] for i in numbers), strict=True)
            answers = system.cat_ranges([path.path for path in paths], list(starts), list(stops), on_error="return")
            for i, answer in zip(numbers, answers, strict=True):
                if isinstance(answer, FileNotFoundError) and missing_ok:
                    found[i] = None
                elif isinstance(answer, BaseException):
                    missed.append((ranges[i][0], answer))
                else:
                    found[i] = answer
        if missed:
            path, error = missed[0]
            raise UnavailableError(path) from error

    if ranges:
        retry(ranges[0][0], attempt)
    return [found[i] for i in range(len(ranges))]


def _merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted spans, with adjacent and nearly adjacent ones merged."""
    merged: list[tuple[int, int]] = []
    for start, stop in spans:
        if merged and start <= merged[-1][1] + GAP:
            merged[-1] = merged[-1][0], max(merged[-1][1], stop)
        else:
            merged.append((start, stop))
    return merged


def _neighbours(extents: Sequence[Extent]) -> Iterator[list[Extent]]:
    """Runs of extents that are contiguous in a file, except for small gaps."""
    ends = [offset + _size(arrays) for offset, arrays in extents]
    cuts = [i for i in range(1, len(ends)) if not ends[i - 1] <= extents[i][0] <= ends[i - 1] + GAP]
    return (extents[a:b] for a, b in pairwise([0, *cuts, len(ends)]))


def _size(arrays: Sequence[np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays)


def _too_short(path: Place, end: int, missing: int) -> OSError:
    return OSError(f"{path}: the file ends at byte {end}, {missing} bytes too early; {REPLACE}")

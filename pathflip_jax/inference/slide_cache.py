"""Cache of encoded slides on disk: one folder of records for each slide and recipe, shared by processes.

An entry is found by what determines its features: the slide's files, the recipe of the encoder and the settings of
tissue and patches. It appears whole, is locked while it is made, and the least recently used entries go first when the
cache exceeds its capacity.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pathflip_jax.data.pixels.dicom_series import is_dicom, series_of
from pathflip_jax.data.records.manifest import MANIFEST
from pathflip_jax.data.storage.json_files import read_json, write_json
from pathflip_jax.inference.sources import CACHE_MARK

log = logging.getLogger(__name__)

CAPACITY = 50e9  # bytes
SOURCE = "source.json"  # facts of an entry, by which it is found
_ENDS = 1 << 20  # bytes hashed at the head and at the tail of a file
_MOST_HASHED = 16  # files of one slide whose content is hashed; of further ones only sizes and times count
_ABANDONED = 24 * 3600.0  # seconds after which an unfinished entry without an owner is removed
_VERSION = 1


def default_folder() -> Path:
    """Folder of the cache: `$PATHFLIP_CACHE`, else `pathflip_jax/slides` in the user's cache folder."""
    if named := os.environ.get("PATHFLIP_CACHE"):
        return Path(named).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise ValueError("no folder for the cache of encoded slides, as HOME is not set; pass --cache DIR")
    return Path(home) / "pathflip_jax" / "slides"


class SlideCache:
    """Folder of encoded slides, of at most `capacity` bytes; `whole` lets the hash of a slide cover all of its bytes.

    Without it, a slide's files are told apart by size, time of change, and a hash of their head and tail.
    Raises OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path | str | None = None, capacity: float = CAPACITY, whole: bool = False) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self.capacity, self.whole = capacity, whole
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._claim()
        except OSError as error:
            raise OSError(
                f"{self.folder}: the cache of encoded slides cannot be written ({error.strerror or error}); pass "
                "--cache with a folder that can"
            ) from None

    def _claim(self) -> None:
        """Mark the folder as a cache, so that no other folder is ever trimmed."""
        mark = self.folder / CACHE_MARK
        if not mark.exists():
            if others := [path.name for path in self.folder.iterdir() if not path.name.startswith(".")]:
                raise ValueError(
                    f"{self.folder}: not a cache of encoded slides, it holds {others[0]!r}; pass --cache with an empty "
                    "or a new folder"
                )
            mark.touch()

    def entry(self, slide_id: str, file: Path, facts: Mapping[str, Any]) -> "Entry":
        """Entry of a slide file encoded as `facts` say (JSON values). Raises OSError for a file that cannot be read."""
        source = {"version": _VERSION, "slide_id": slide_id, "files": fingerprint(file, self.whole), **facts}
        key = hashlib.sha256(json.dumps(source, sort_keys=True).encode()).hexdigest()
        name = re.sub(r"[^\w.+-]", "_", slide_id)[:80].lstrip(".") or "slide"
        return Entry(self.folder / f"{name}-{key[:20]}", source)

    def trim(self, keep: Collection[Path] = ()) -> None:
        """Remove entries, the least recently used first, until the cache is within its capacity; never those to `keep`.

        Entries in the making by any process stay, and what an ended process left unfinished goes.
        """
        with FileLock(self.folder / ".trim.lock"):
            sizes = {}
            for path in sorted(self.folder.iterdir()):
                if path.name.endswith(".part"):
                    self._remove_abandoned(path)
                elif path.is_dir():
                    sizes[path] = _bytes_of(path)
            total = sum(sizes.values())
            for path in sorted(sizes, key=_last_use):
                if total <= self.capacity:
                    return
                if path not in keep and Entry(path, {}).remove(timeout=0):
                    total -= sizes[path]
                    log.info("%s: removed from the cache of encoded slides, which was full", path.name)
        if total > self.capacity:
            log.warning(
                "%s: %.1f GB, above its capacity of %.1f GB; the slides in use need it: raise --cache-size",
                self.folder, total / 1e9, self.capacity / 1e9,
            )  # fmt: skip

    def _remove_abandoned(self, path: Path) -> None:
        with suppress(Timeout), Entry(path.with_suffix(""), {}).locked(timeout=0):
            if time.time() - _last_use(path) > _ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


class Entry:
    """Entry of a cache: the `folder` of records of one encoded slide, and the facts of its `source`."""

    def __init__(self, folder: Path, source: Mapping[str, Any]) -> None:
        self.folder, self.source = folder, source
        self.part = folder.with_name(f"{folder.name}.part")  # until the entry is finished

    @property
    def is_ready(self) -> bool:
        """Whether the slide is in the cache; its use is recorded."""
        try:
            os.utime(self.folder)
        except FileNotFoundError:
            return False
        return (self.folder / MANIFEST).exists()

    @contextmanager
    def locked(self, timeout: float = -1) -> Iterator[None]:
        """Hold the entry against other processes. Raises Timeout where another one holds it for `timeout` seconds."""
        with FileLock(self.folder.with_name(f".{self.folder.name}.lock"), timeout=timeout):
            yield

    def begin(self) -> Path:
        """Empty folder in which to make the entry, while it is locked."""
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir()
        return self.part

    def publish(self) -> None:
        """Finish the entry, whole: its folder takes its final name."""
        write_json(self.part / SOURCE, dict(self.source))
        self._discard()
        self.part.replace(self.folder)

    def abandon(self) -> None:
        """Remove what is there of an unfinished entry, while it is locked."""
        shutil.rmtree(self.part, ignore_errors=True)

    def remove(self, timeout: float = -1) -> bool:
        """Remove the entry; False where another process holds it for `timeout` seconds."""
        try:
            with self.locked(timeout):
                self._discard()
        except Timeout:
            return False
        return True

    def check(self) -> None:
        """Raise ValueError for an entry whose facts are not those by which it was found."""
        if read_json(self.folder / SOURCE) != json.loads(json.dumps(self.source)):
            raise ValueError(f"{self.folder / SOURCE}: the facts of another slide or recipe")

    def _discard(self) -> None:
        if self.folder.exists():
            old = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.old")
            self.folder.replace(old)  # at once, so that no process opens half of it
            shutil.rmtree(old, ignore_errors=True)


def fingerprint(file: Path, whole: bool = False) -> list[list[Any]]:
    """Names, sizes, times of change and hashes of the files of a slide: the pixels of some formats are in others.

    The hash covers head and tail of a file, with `whole` all of it.
    """
    found = []
    for number, path in enumerate(_files_of(file)):
        state = path.stat()
        sha = _sha256(path, state.st_size, whole) if whole or number < _MOST_HASHED else ""
        found.append([path.name, state.st_size, state.st_mtime_ns, sha])
    return found


def _files_of(file: Path) -> list[Path]:
    """Files of a slide, itself first: those of a MIRAX folder, a DICOM series, a store, or beside a Hamamatsu index."""
    if file.is_dir():
        return _below(file)
    suffix = file.suffix.lower()
    if suffix == ".mrxs":
        return [file, *_below(file.with_suffix(""))]
    if suffix in (".vms", ".vmu"):
        return [file, *(path for path in _below(file.parent) if path.name.startswith(file.stem) and path != file)]
    return [file, *(one.path for one in series_of(file) if one.path != file)] if is_dicom(file) else [file]


def _below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path, size: int, whole: bool) -> str:
    with path.open("rb") as file:
        if whole:
            return hashlib.file_digest(file, "sha256").hexdigest()
        sha = hashlib.sha256(file.read(_ENDS))
        if size > _ENDS:
            file.seek(max(_ENDS, size - _ENDS))
            sha.update(file.read(_ENDS))
    return sha.hexdigest()


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in _below(folder))


def _last_use(folder: Path) -> float:
    return folder.stat().st_mtime

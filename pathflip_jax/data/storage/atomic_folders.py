"""Atomic creation of folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pathflip_jax.data.storage.urls import is_url


@contextmanager
def atomic_folder(place: Path | str) -> Iterator[Path]:
    """Temporary folder to fill, renamed to its final name only once complete.

    Raises FileExistsError if a non-empty folder exists, ValueError for a URL.
    """
    if is_url(place):
        raise ValueError(f"{place}: folders are only written to local disks; write to one, then copy the folder")
    folder = Path(place)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty; write to another folder, or remove it")
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)

"""Traversal of slide and feature folders, with symbolic links, hidden copies and unfetched files.

Linked folders and files are treated as if they were in place. Broken links are reported, not skipped: an unmounted
share must not silently shrink a cohort.
"""

import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

FOLDERS_AS_FILES = (".zarr",)  # formats that are a folder of thousands of small files
STORE_FILES = ("zarr.json", ".zgroup", ".zarray")  # of which one is in the folder of a store
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_ANNEX = re.compile(rb"^(\.\./|/)*(\.git/)?annex/objects/")


class Walked(NamedTuple):
    """Files below a folder, sorted by path, and the faults of unreachable paths."""

    files: list[Path]
    broken: dict[Path, str]


def walk_files(folder: Path | str) -> Walked:
    """Files below a folder, including linked folders, each visited once, so that link cycles end.

    Hidden files and folders are skipped: macOS keeps `._S1.h5` next to `S1.h5`, notebooks keep copies in
    `.ipynb_checkpoints`. A `.zarr` folder counts as a file. `broken` holds dangling links and unreadable folders.
    Raises FileNotFoundError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files: list[Path] = []
    broken: dict[Path, str] = {}
    seen: set[tuple[int, int]] = set()

    def visit(place: Path) -> None:
        try:
            state = place.stat()
            entries = sorted(os.scandir(place), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError as error:
            broken[place] = f"a folder that cannot be read ({error.strerror}); ask for permission to read it"
            return
        if (state.st_dev, state.st_ino) in seen:
            return
        seen.add((state.st_dev, state.st_ino))
        for entry in entries:
            path = place / entry.name
            if entry.name.startswith("."):
                continue
            try:
                mode = path.stat().st_mode
            except OSError as error:
                broken[path] = _fault(path, error)
                continue
            if stat.S_ISDIR(mode) and path.suffix.lower() not in FOLDERS_AS_FILES:
                visit(path)
            elif stat.S_ISREG(mode) or stat.S_ISDIR(mode):
                files.append(path)

    visit(folder)
    return Walked(sorted(files), dict(sorted(broken.items())))


def is_store(path: Path | str) -> bool:
    """Whether a folder counts as one file, by its name or by a file in it (Zarr)."""
    path = Path(path)
    return path.is_dir() and (
        path.suffix.lower() in FOLDERS_AS_FILES or any((path / name).is_file() for name in STORE_FILES)
    )


def _fault(path: Path, error: OSError) -> str:
    """Fault of an unreachable file or link, with the cure."""
    if not path.is_symlink():
        return f"cannot be read ({error.strerror}); ask for permission to read it"
    target = os.readlink(path)
    if _ANNEX.match(target.encode(errors="replace")):
        return "a git-annex file whose content is not on this machine; run `git annex get` on it"
    if isinstance(error, PermissionError):
        return f"a link to {target}, which you may not read; ask for permission to read it"
    return f"a link to {target}, which is not there; mount its disk or correct the link"


def describe_placeholder(path: Path | str) -> str:
    """Description of a placeholder for an unfetched file (Git LFS or git-annex pointer, web page), with the cure.

    Empty for any other file.
    """
    with Path(path).open("rb") as file:
        start = file.read(1024)
    if start.startswith(LFS_POINTER):
        size = Path(path).stat().st_size
        return f"a Git LFS pointer of {size} bytes, not the file itself; run `git lfs pull` in its repository"
    if _ANNEX.match(start):
        return "a git-annex pointer, not the file itself; run `git annex get` on it"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml version", b"<error>")) and b"ome-xml" not in text:
        return (
            "a web page or an error message of a server, not the file itself; download it again, logged in if necessary"
        )
    return ""

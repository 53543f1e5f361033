"""Manifest of a records folder (manifest.json), and the check of the folder against it.

An interrupted copy, a leftover shard of an older cohort or a renamed file would silently change the slides of a
training run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.storage.json_values import parse_json

MANIFEST = "manifest.json"
VERSION = 1
CUT = ("cut", "edge_um", "edge_px")  # facts about the region cut that a run records
REBUILD_MANIFEST = "delete it and run the command that writes it again"
_RESTORE = "copy it again, or run the command that writes the records (`pathflip prepare` or `import`) to completion"


class Listed(NamedTuple):
    """Manifest entry of a shard; `crc32c` is of the whole file, in eight hexadecimal digits."""

    bytes: int
    crc32c: str
    slides: int


class Manifest(NamedTuple):
    """Content of manifest.json: `facts` of the cohort, such as the region cut, and its shards by file name."""

    path: Place
    facts: dict[str, Any]
    shards: dict[str, Listed]


def parse_manifest(path: Place, data: bytes) -> Manifest:
    """Parsed manifest. Raises ValueError naming the file for anything else."""
    try:
        facts = parse_json(data.decode())
        shards = {str(shard["name"]): _listed(shard) for shard in facts.pop("shards")}
        version, *_ = (facts[name] for name in ("version", *CUT))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a manifest ({error!s:.200}); {REBUILD_MANIFEST}") from None
    if version != VERSION:
        cure = "read it with the version of pathflip that wrote it, or run the command that writes the records again"
        raise ValueError(f"{path}: version {version!r:.40}, expected {VERSION}; {cure}")
    return Manifest(path, facts, shards)


def _listed(shard: dict[str, Any]) -> Listed:
    if type(shard["bytes"]) is not int or not isinstance(shard["slides"], list):
        raise TypeError(f"a shard of {shard['bytes']!r:.40} bytes and slides {shard['slides']!r:.40}")
    return Listed(shard["bytes"], str(shard["crc32c"]), len(shard["slides"]))


def folder_faults(manifest: Manifest, sizes: Mapping[str, int]) -> list[str]:
    """Faults of a folder's shards, given their sizes by name, as far as names and sizes show."""
    folder, listed = manifest.path.parent, manifest.shards
    missing = [name for name in listed if name not in sizes]
    extra = [name for name in sizes if name not in listed]
    faults = []
    for name in missing:
        twins = [other for other in extra if sizes[other] == listed[name].bytes]
        renamed = f"if {preview(twins)}, of the same size, is this shard, rename it; else " if twins else ""
        found = f"listed in {MANIFEST} but missing: {len(sizes)} shards found, {len(listed)} listed"
        faults.append(f"{folder / name}: {found}; {renamed}{_RESTORE}")
    for name in extra:
        found = f"not in {MANIFEST}, which lists {len(listed)} shards ({preview(listed)})"
        cure = "if it belongs to another cohort, remove it and its .idx; if it belongs to this one"
        faults.append(f"{folder / name}: {found}; {cure}, run the command that writes the records to completion")
    for name, (size, _, _) in listed.items():
        if name in sizes and sizes[name] != size:
            short = ", or cut short" if sizes[name] < size else ""
            found = f"not the shard that {MANIFEST} describes{short}: {sizes[name]} bytes, expected {size}"
            faults.append(f"{folder / name}: {found}; {_RESTORE}")
    return faults


def shard_faults(manifest: Manifest, name: str, slides: int, crc: int) -> list[str]:
    """Faults of a shard of the listed size, by its number of slides and its CRC32C."""
    listed = manifest.shards[name]
    if slides == listed.slides and f"{crc:08x}" == listed.crc32c:
        return []
    found = f"not the shard that {MANIFEST} describes: {slides} slides and CRC32C {crc:08x}"
    return [f"{manifest.path.parent / name}: {found}, expected {listed.slides} slides and {listed.crc32c}; {_RESTORE}"]


def checksums_hash(sums: Sequence[tuple[str, int, int]]) -> str:
    """SHA-256 of the name, size and CRC32C of each shard: it changes with any byte of the data."""
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def refuse(faults: list[str]) -> None:
    """Raise ValueError with the first of these faults and the number of others, if there are any."""
    if faults:
        more = f" ({len(faults) - 1} more of its shards differ from the list: `pathflip doctor --records` names them)"
        raise ValueError(faults[0] + (more if faults[1:] else ""))

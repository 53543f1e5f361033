"""Full verification of a records folder, byte for byte, one shard at a time."""

from collections.abc import Iterator

from pathflip_jax.data.readers.coordinates import coordinate_fault, duplicate_coordinates_fault, patch_size_fault
from pathflip_jax.data.records.cohort import check_cohort
from pathflip_jax.data.records.columns import SlideInfo, Slides
from pathflip_jax.data.records.index import COORDS, REBUILD, build_index, index_path, read_index
from pathflip_jax.data.records.index_file import Index, encode_index
from pathflip_jax.data.records.manifest import (
    MANIFEST,
    REBUILD_MANIFEST,
    checksums_hash,
    folder_faults,
    parse_manifest,
    shard_faults,
)
from pathflip_jax.data.records.records import list_folder, shard_sizes
from pathflip_jax.data.storage.files import Place, as_path, open_file, read_at, read_bytes


def verify(folder: Place | str) -> list[str]:
    """Faults of a records folder, each naming its file; empty for an intact one. Reads every byte.

    Checks the CRCs of records and regions, each index against its shard, that the slides form one cohort, that patch
    coordinates are plausible, and that manifest.json matches the content. Beyond ids and a few numbers per slide, only
    one shard at a time is in memory.
    """
    return list(_faults(as_path(folder)))


def _faults(folder: Place) -> Iterator[str]:
    files = list_folder(folder)
    sizes = shard_sizes(folder, files)
    manifest = None
    try:
        if MANIFEST in files:
            manifest = parse_manifest(folder / MANIFEST, read_bytes(folder / MANIFEST))
    except ValueError as error:
        yield str(error)
    parts, sums = [], []
    for name in sizes:
        try:
            built = build_index(folder / name)
            yield from (f"{folder / name}: {fault}" for fault in map(_place_fault, built.slides) if fault)
            yield from _index_faults(folder / name, built, f"{name}.idx" in files)
            if manifest and sizes[name] == getattr(manifest.shards.get(name), "bytes", None):
                yield from shard_faults(manifest, name, len(built.slides), built.shard_crc32c)
        except (OSError, ValueError) as error:
            yield str(error)
            continue
        sums.append((name, built.shard_bytes, built.shard_crc32c))
        parts.append(built.slides.without_regions())
    try:
        check_cohort(Slides.joined(parts))
    except ValueError as error:
        yield str(error)
    for name in sorted(files):
        if name.endswith(".tmp"):
            yield f"{folder / name}: left by a writer that was killed; delete it"
    if manifest:
        faults = folder_faults(manifest, sizes)
        if not faults and len(sums) == len(sizes) and manifest.facts.get("sha256") != checksums_hash(sums):
            faults.append(f"{manifest.path}: its sha256 does not match its shards; {REBUILD_MANIFEST}")
        yield from faults
    elif MANIFEST not in files:
        yield f"{folder / MANIFEST}: missing: the folder is incomplete; run the command that writes it to completion"


def _index_faults(shard: Place, built: Index, there: bool) -> Iterator[str]:
    """Faults of the stored index of a shard, compared with the rebuilt one. ValueError if it cannot be read."""
    if there and encode_index(read_index(shard)) != encode_index(built):
        yield f"{index_path(shard)}: belongs to another shard than {shard.name}; {REBUILD}"


def _place_fault(info: SlideInfo) -> str:
    """Objection to the coordinates of a slide's patches, else ""."""
    size = (info.width, info.height)
    fault = patch_size_fault(info.patch_size, info.mpp, *size)
    if info.coords_bytes and not fault:
        data = read_at(open_file(info.shard), info.coords_bytes, info.coords_offset)
        coords = data.view(COORDS).reshape(-1, 2)
        fault = duplicate_coordinates_fault(coords) or coordinate_fault(coords, info.patch_size, *size)
    return f"slide {info.slide_id}: {fault}" if fault else ""

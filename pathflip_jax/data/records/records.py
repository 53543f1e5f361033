"""Slides as TFRecords: writer, random access by region, and completion of the folder (DESIGN section 5).

One standard `tf.train.Example` per slide, with patches stored region by region. `<shard>.idx` next to a shard locates
its payloads, so a training step reads only the regions that it samples. The folder is also a TFDS dataset.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import islice

import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.cohort import check_cohort
from pathflip_jax.data.records.columns import DTYPES, SlideInfo, Slides
from pathflip_jax.data.records.index import (
    COORDS,
    REWRITE,
    build_index,
    encode_slide,
    index_bytes,
    index_path,
    read_indexes,
    save_index,
)
from pathflip_jax.data.records.index_file import Index
from pathflip_jax.data.records.manifest import (
    MANIFEST,
    VERSION,
    Manifest,
    checksums_hash,
    folder_faults,
    parse_manifest,
    refuse,
    shard_faults,
)
from pathflip_jax.data.records.reading import read_parts, read_slide
from pathflip_jax.data.records.recipe import RECIPE, read_recipe
from pathflip_jax.data.records.regions import EDGE_UM, region_edge
from pathflip_jax.data.records.tfds import dataset_info, feature_schema
from pathflip_jax.data.records.tfrecord import read_frames
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.files import (
    LocalFile,
    Place,
    RemoteFile,
    as_path,
    file_sizes,
    list_files,
    open_file,
    read_at,
    remove,
)
from pathflip_jax.data.storage.framing import crc32c
from pathflip_jax.data.storage.json_files import write_json

SHARDS = ("*.tfrecord", "*.tfrecord-*-of-*[0-9]")  # naming schemes of this library and of TensorFlow
_log = logging.getLogger(__name__)


def shard_name(number: int) -> str:
    """File name of a shard, without the total: job array tasks name theirs independently, and TFDS gets the pattern."""
    return f"pathflip-{number:05d}.tfrecord"


def write_shard(
    path: Place | str,
    slides: Iterable[SlideFeatures],
    *,
    cut: str = "grid",
    edge_um: float = EDGE_UM,
    edge_px: int | None = None,
    dtype: str = "float16",
) -> list[SlideInfo]:
    """Write slides as one shard and its index, both atomically. Returns the index entries.

    `slides` may be a generator: one slide at a time is in memory; its exceptions leave no file behind. Without slides
    the shard is empty, so that the numbers of a job array have no gap. Raises ValueError for slides that do not belong
    to one cohort, OSError on a full disk.
    """
    path = as_path(path)
    infos: dict[str, SlideInfo] = {}
    with atomic_file(path, sync_folder=False) as out:  # the index, written next, does
        for slide in slides:
            parts, info = encode_slide(slide, cut=cut, edge_um=edge_um, edge_px=edge_px, dtype=dtype)
            info = replace(info, shard=path)
            if infos:  # stop at the first mismatch
                check_cohort([infos.get(info.slide_id, next(iter(infos.values()))), info])
            start = out.write_record(*parts)
            offsets = {"features_offset": start + info.features_offset, "coords_offset": start + info.coords_offset}
            info = replace(info, **offsets)
            infos[info.slide_id] = info
        check_cohort(list(infos.values()))
        remove(index_path(path))  # that of an earlier shard of this name
    save_index(path, Index(out.bytes, out.crc32c, Slides.of(path, list(infos.values()))))
    return list(infos.values())


def write_index(shard: Place | str) -> Index:
    """Rebuild the index of a shard of any writer, from the shard alone; raises as `build_index`."""
    index = build_index(shard)
    save_index(as_path(shard), index)
    return index


def is_shard(name: str) -> bool:
    """Whether a file name is that of a shard; hidden files, such as macOS' `._` copies, are not."""
    return not name.startswith(".") and any(fnmatchcase(name, pattern) for pattern in SHARDS)


def find_shards(folder: Place | str) -> list[Place]:
    """Shards in a folder, sorted by name. Raises FileNotFoundError if there is none."""
    folder = as_path(folder)
    return [folder / name for name in shard_sizes(folder, list_folder(folder))]


def list_folder(folder: Place) -> dict[str, int]:
    """Sizes of the files of a records folder, by name. Raises FileNotFoundError if there is no such folder."""
    try:
        return list_files(folder)
    except (FileNotFoundError, NotADirectoryError):
        found = f"{folder}: no such folder; write records with `pathflip prepare` or `import`"
        raise FileNotFoundError(found) from None


def shard_sizes(folder: Place, files: Mapping[str, int]) -> dict[str, int]:
    """Sizes of the shards among the files of a folder, by name and in order."""
    sizes = {name: files[name] for name in sorted(files) if is_shard(name)}
    if not sizes:
        raise FileNotFoundError(f"{folder}: no *.tfrecord in it; write records with `pathflip prepare` or `import`")
    return sizes


class Records:
    """A cohort of slides in shards: opened from the indexes alone, read by region, from any number of threads.

    Takes a folder or a list of shards, local or at URLs. A folder is checked against its manifest.json, with a warning
    if it has none, as it is then unfinished or written by another program; a list is not checked. `recipe` is how a
    folder's features were made, None if unknown. Raises ValueError for a folder whose shards do not match its manifest,
    for slides that do not form one cohort, and for duplicates.
    """

    def __init__(self, folder: Place | str | Sequence[Place | str], *, open_files: int = 64) -> None:
        self.manifest: Manifest | None = None
        self.recipe: FeatureRecipe | None = None
        if isinstance(folder, (list, tuple)):
            self.shards = [as_path(shard) for shard in folder]
            self.where, sizes = ", ".join(map(str, self.shards[:3])), file_sizes(self.shards)
            contents = index_bytes(self.shards)
        else:
            self.where, folder = str(folder), as_path(folder)
            files = list_folder(folder)
            listed = shard_sizes(folder, files)
            self.shards, sizes = [folder / name for name in listed], list(listed.values())
            contents = index_bytes(self.shards, *([folder / MANIFEST] if MANIFEST in files else []))
            self.manifest = _check_folder(folder, listed, next(contents) if MANIFEST in files else None)
            self.recipe = read_recipe(folder) if RECIPE in files else None
        parts: list[Slides] = []
        self.sums: list[tuple[str, int, int]] = []  # name, bytes and CRC32C of each shard
        for shard, index in zip(self.shards, read_indexes(self.shards, sizes, contents), strict=True):
            self.sums.append((shard.name, index.shard_bytes, index.shard_crc32c))
            if self.manifest:
                refuse(shard_faults(self.manifest, shard.name, len(index.slides), index.shard_crc32c))
            parts.append(index.slides)
        self.slides = Slides.joined(parts)
        if not self.slides:
            raise ValueError(f"{self.where}: no slides in the records; see failures.json there for the reasons")
        check_cohort(self.slides)
        self._position = {slide_id: i for i, slide_id in enumerate(self.slides.column("slide_id"))}
        self._open: OrderedDict[Place, LocalFile | RemoteFile] = OrderedDict()
        self._open_files, self._lock = open_files, threading.Lock()

    @property
    def feature_dim(self) -> int:
        """Width F of a patch feature."""
        return self.slides[0].feature_dim

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the features."""
        return DTYPES[self.slides[0].feature_dtype]

    @property
    def encoder(self) -> str:
        """Name of the patch encoder; empty if no feature file named it."""
        return next(filter(None, self.slides.column("encoder")), "")

    @property
    def cut(self) -> str:
        """Region cut, `grid` or `scan`."""
        return self.slides[0].cut

    @property
    def patch_slots(self) -> int:
        """Number S of patches in the fullest region of the cohort."""
        return self.slides.largest_region

    def __len__(self) -> int:
        return len(self.slides)

    def position(self, slide_id: str) -> int:
        """Index of a slide. Raises ValueError for a missing one."""
        if slide_id not in self._position:
            have = ", ".join(list(self._position)[:3])
            raise ValueError(f"{self.where}: no slide {slide_id!r} among its {len(self)} slides, such as {have}")
        return self._position[slide_id]

    def read(self, position: int) -> SlideFeatures:
        """Whole slide with patches in region order and every region's CRC checked."""
        info = self.slides[position]
        return read_slide(self._file(info.shard), info, self.dtype, self.recipe)

    def read_regions(
        self, position: int, regions: Sequence[int], out: Sequence[np.ndarray | None] | None = None
    ) -> list[Float[np.ndarray, "n F"]]:
        """Features of selected regions of a slide, one array each in the order given, with CRCs checked.

        Reads these regions only: adjacent ones together, and directly into the arrays of `out` where provided. Raises
        ValueError for a flipped byte, naming shard, slide and region, and for an array of the wrong size; OSError for a
        truncated shard; IndexError for a region out of range.
        """
        info, regions = self.slides[position], np.asarray(regions, np.int64)
        if len(regions) == 0:
            return []
        wanted, first, which = np.unique(regions, return_index=True, return_inverse=True)
        if wanted[0] < 0 or wanted[-1] >= info.num_regions:
            found = f"regions {wanted[0]} to {wanted[-1]} requested, the slide has {info.num_regions}"
            raise IndexError(f"{info.shard}: slide {info.slide_id}: {found}")
        width, dtype = info.feature_dim, self.dtype
        shapes = [(n, width) for n in np.diff(info.region_rows)[regions].tolist()]
        parts = [None] * len(regions) if out is None else list(out)
        for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            if part is None:
                parts[i] = np.empty(shape, dtype)
            elif part.shape != shape or part.dtype != dtype or not part.flags.c_contiguous:
                found = f"an array {part.shape} of {part.dtype}, expected {shape} of {dtype}, contiguous"
                raise ValueError(f"slide {info.slide_id}, region {regions[i]}: {found}")
        read_parts(self._file(info.shard), info, wanted, [parts[i] for i in first])
        for i, source in enumerate(first[which]):
            if i != source:  # requested twice
                parts[i][...] = parts[source]
        return parts

    def coords(self, position: int) -> Int[np.ndarray, "N 2"] | None:
        """Top-left corners of a slide's patches in stored order, with CRCs checked; None if it has none."""
        info = self.slides[position]
        if not info.coords_bytes:
            return None
        data = read_at(self._file(info.shard), info.coords_bytes, info.coords_offset)
        if crc32c(data) != info.coords_crc32c:
            raise ValueError(f"{info.shard}: slide {info.slide_id}: a byte flipped in its coordinates; {REWRITE}")
        return data.view(COORDS).reshape(-1, 2)

    def _file(self, shard: Place) -> LocalFile | RemoteFile:
        with self._lock:
            file = self._open.pop(shard, None) or open_file(shard)
            self._open[shard] = file
            if len(self._open) > self._open_files:
                self._open.popitem(last=False)
            return file


def iter_examples(shard: Place | str) -> Iterator:
    """Records of a shard as `tf.train.Example` messages, in order and with CRCs checked."""
    from tensorflow_datasets.proto import tf_example_pb2

    for _, data in read_frames(as_path(shard)):
        yield tf_example_pb2.Example.FromString(data)


def _check_folder(folder: Place, sizes: Mapping[str, int], data: bytes | None) -> Manifest | None:
    """Manifest of a folder with shards of these sizes, from its bytes. ValueError if they disagree."""
    if data is None:
        _log.warning(
            "%s: no %s, so missing shards cannot be detected; if `pathflip prepare` or `import` writes these records, "
            "run it to completion",
            folder, MANIFEST,
        )  # fmt: skip
        return None
    manifest = parse_manifest(folder / MANIFEST, data)
    refuse(folder_faults(manifest, sizes))
    return manifest


def manifest_hash(records: Records | Place | str) -> str:
    """SHA-256 of the content of a folder's shards, from their indexes; it changes with any byte of the data.

    For open records nothing is read again.
    """
    if isinstance(records, Records):
        sums = records.sums
    else:
        shards = find_shards(records)
        indexes = zip(shards, read_indexes(shards, file_sizes(shards), index_bytes(shards)), strict=True)
        sums = [(shard.name, index.shard_bytes, index.shard_crc32c) for shard, index in indexes]
    return checksums_hash(sums)


def finish_folder(folder: Place | str, *, edge_um: float = EDGE_UM, edge_px: int | None = None) -> dict:
    """Complete a folder of shards as a dataset: features.json and dataset_info.json for TFDS, and manifest.json.

    `edge_um` and `edge_px` are the parameters of the region cut; slides cut otherwise are refused. Idempotent; each
    file is replaced atomically, manifest.json last: it marks the folder as complete. Returns the manifest. Raises
    ValueError for slides that do not form one cohort and for a missing shard, FileNotFoundError for no shards.
    """
    folder = as_path(folder)
    records = Records(find_shards(folder))
    expected = [shard_name(number) for number in range(len(records.shards))]
    names = [shard.name for shard in records.shards]
    if names != expected:
        missing = [name for name in expected if name not in names]
        raise ValueError(f"{folder}: {missing[0]} is missing, {names[-1]} exists; run the task that writes it first")
    for position, info in enumerate(records.slides):
        _check_edge(info, records.coords(position), edge_um, edge_px)
    return write_manifest(folder, records, edge_um, edge_px)


def write_manifest(folder: Place, records: Records, edge_um: float, edge_px: int | None) -> dict:
    """Write features.json, dataset_info.json and manifest.json of a folder with these records; returns the last."""
    ids = iter(records.slides.column("slide_id"))
    sizes = np.bincount(records.slides.column("shard_number"), minlength=len(records.shards)).tolist()
    shards = [
        {"name": name, "bytes": size, "crc32c": f"{crc:08x}", "slides": list(islice(ids, count))}
        for (name, size, crc), count in zip(records.sums, sizes, strict=True)
    ]
    dtype = records.slides[0].feature_dtype
    manifest = {
        "version": VERSION,
        "sha256": manifest_hash(records),
        "encoder": records.encoder,
        "feature_dim": records.feature_dim,
        "feature_dtype": dtype,
        "cut": records.cut,
        "edge_um": edge_um,
        "edge_px": edge_px,
        "num_slides": len(records),
        "num_patches": int(records.slides.column("num_patches").sum()),
        "shards": shards,
    }
    info = dataset_info(sizes, sum(size for _, size, _ in records.sums))
    schema = feature_schema(records.feature_dim, dtype)
    for name, content in (("features.json", schema), ("dataset_info.json", info), (MANIFEST, manifest)):
        write_json(folder / name, content, indent=1)
    return manifest


def _check_edge(info: SlideInfo, coords: np.ndarray | None, edge_um: float, edge_px: int | None) -> None:
    if info.cut == "scan":
        return
    edge = region_edge(info.patch_size, info.mpp, edge_um, edge_px)
    cells = np.repeat(info.region_grid, np.diff(info.region_rows), axis=0)
    if coords is None or (np.maximum(coords, 0) // edge != cells).any():
        expected = f"squares of {edge} px at level 0 (edge_um {edge_um:g}, edge_px {edge_px})"
        raise ValueError(
            f"{info.shard}: slide {info.slide_id} was not cut into {expected}; all slides of a cohort share one region "
            "cut: pass the edge that it was written with, or write the slide again"
        )

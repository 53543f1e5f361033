"""Slides as TFRecords: the writer, random access by region, and the folder as a whole (DESIGN section 5).

One standard `tf.train.Example` per slide, patches stored region by region. `<shard>.idx` beside a shard says where its
payloads lie, so a training step reads only the regions that it samples. The folder is a TFDS dataset too.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.data.cohort import check_cohort
from pathflip_jax.data.coordinates import patch_size_fault, place_fault, repeated_fault
from pathflip_jax.data.features import SlideFeatures
from pathflip_jax.data.index import (
    COORDS,
    DTYPES,
    REBUILD,
    REWRITE,
    Index,
    SlideInfo,
    build_index,
    check_region,
    encode_index,
    encode_slide,
    index_path,
    read_index,
    read_indexes,
    save_index,
)
from pathflip_jax.data.regions import EDGE_UM, region_edge
from pathflip_jax.data.storage import (
    LocalFile,
    Place,
    RemoteFile,
    as_path,
    list_files,
    open_file,
    read_at,
    read_bytes,
    remove,
)
from pathflip_jax.data.tables import parse_json
from pathflip_jax.data.tfds import dataset_info, feature_schema
from pathflip_jax.data.tfrecord import crc32c, read_frames, whole_file

SHARDS = ("*.tfrecord", "*.tfrecord-*-of-*[0-9]")  # as this library and as TensorFlow name them


def shard_name(number: int) -> str:
    """The file name of a shard. No total in it: tasks of a job array name theirs alone, TFDS is told the pattern."""
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
    """Write slides as one shard and its index; both appear whole or not at all. Returns what the index knows of them.

    `slides` may be a generator: one slide at a time is in memory; what it raises leaves no file behind. No slides make
    an empty shard, so that the numbers of a job array have no gap. Raises ValueError for slides that do not belong in
    one cohort, OSError on a full disk.
    """
    path = as_path(path)
    infos: dict[str, SlideInfo] = {}
    with whole_file(path) as out:
        for slide in slides:
            parts, info = encode_slide(slide, cut=cut, edge_um=edge_um, edge_px=edge_px, dtype=dtype)
            info = replace(info, shard=path)
            if infos:  # the first misfit ends it
                check_cohort([infos.get(info.slide_id, next(iter(infos.values()))), info])
            start = out.write_record(*parts)
            offsets = {"features_offset": start + info.features_offset, "coords_offset": start + info.coords_offset}
            info = replace(info, **offsets)
            infos[info.slide_id] = info
        check_cohort(list(infos.values()))
        remove(index_path(path))  # of an earlier shard of this name
    save_index(path, Index(out.bytes, out.crc32c, tuple(infos.values())))
    return list(infos.values())


def write_index(shard: Place | str) -> Index:
    """Write the index of a shard anew, from the shard alone; whoever wrote it (`build_index` says what it raises)."""
    index = build_index(shard)
    save_index(as_path(shard), index)
    return index


def find_shards(folder: Place | str) -> list[Place]:
    """The shards in a folder, in order of their names. Raises FileNotFoundError where there is none."""
    folder = as_path(folder)
    try:
        names = list_files(folder)
    except (FileNotFoundError, NotADirectoryError):
        found = f"{folder}: no such folder; `pathflip prepare` or `import` writes records"
        raise FileNotFoundError(found) from None
    shards = [folder / name for name in sorted(names) if any(fnmatchcase(name, pattern) for pattern in SHARDS)]
    if not shards:
        raise FileNotFoundError(f"{folder}: no *.tfrecord in it; `pathflip prepare` or `import` writes records")
    return shards


class Records:
    """A cohort of slides in shards: opened from the indexes alone, read by region, from any number of threads.

    Takes a folder or a list of shards, local or behind URLs. Raises ValueError for slides that are no one cohort or
    are there twice.
    """

    def __init__(self, folder: Place | str | Sequence[Place | str], *, open_files: int = 64) -> None:
        one = not isinstance(folder, (list, tuple))
        self.shards = find_shards(folder) if one else [as_path(shard) for shard in folder]
        self.indexes = read_indexes(self.shards)
        self.slides = [info for index in self.indexes for info in index.slides]
        self.where = str(folder) if one else ", ".join(map(str, self.shards[:3]))
        if not self.slides:
            raise ValueError(f"{self.where}: records of no slides; see failures.json there for why")
        check_cohort(self.slides)
        self._position = {info.slide_id: i for i, info in enumerate(self.slides)}
        self._open: OrderedDict[Place, LocalFile | RemoteFile] = OrderedDict()
        self._open_files, self._lock = open_files, threading.Lock()

    @property
    def feature_dim(self) -> int:
        """The width F of a patch feature."""
        return self.slides[0].feature_dim

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the features."""
        return DTYPES[self.slides[0].feature_dtype]

    @property
    def encoder(self) -> str:
        """The patch encoder; empty when no feature file named it."""
        return next((info.encoder for info in self.slides if info.encoder), "")

    @property
    def cut(self) -> str:
        """How the regions were cut: `grid` or `scan`."""
        return self.slides[0].cut

    @property
    def patch_slots(self) -> int:
        """The number S of patches in the fullest region of the cohort."""
        return max(int(np.diff(info.region_rows).max()) for info in self.slides)

    def __len__(self) -> int:
        return len(self.slides)

    def position(self, slide_id: str) -> int:
        """The number of a slide. Raises ValueError for one that is not there."""
        if slide_id not in self._position:
            have = ", ".join(list(self._position)[:3])
            raise ValueError(f"{self.where}: no slide {slide_id!r} among the {len(self)} there, such as {have}")
        return self._position[slide_id]

    def read(self, position: int) -> SlideFeatures:
        """A whole slide, patches in the order of their regions, every region's CRC checked."""
        info = self.slides[position]
        features = np.empty((info.num_patches, info.feature_dim), self.dtype)
        parts = [features[a:b] for a, b in pairwise(info.region_rows)]
        coords = self._read(info, np.arange(info.num_regions), parts)
        place = (info.patch_size, info.mpp, info.width, info.height)
        try:
            return SlideFeatures(info.slide_id, info.case_id, features, coords, *place, info.encoder)
        except ValueError as error:
            raise ValueError(f"{info.shard}: {error}") from None

    def read_regions(
        self, position: int, regions: Sequence[int], out: Sequence[np.ndarray | None] | None = None
    ) -> list[Float[np.ndarray, "n F"]]:
        """The features of some regions of a slide, one array each in the order asked for, their CRCs checked.

        Reads these regions only: neighbours in one go, and straight into the arrays of `out` where it has one for a
        region. Raises ValueError for a flipped byte, naming shard, slide and region, and for an array that does not
        fit; OSError for a shard cut short; IndexError for a region that the slide does not have.
        """
        info, regions = self.slides[position], np.asarray(regions, np.int64)
        if len(regions) == 0:
            return []
        wanted, first, which = np.unique(regions, return_index=True, return_inverse=True)
        if wanted[0] < 0 or wanted[-1] >= info.num_regions:
            found = f"regions {wanted[0]} to {wanted[-1]} were asked for, it has {info.num_regions}"
            raise IndexError(f"{info.shard}: slide {info.slide_id}: {found}")
        shapes = [(int(n), info.feature_dim) for n in np.diff(info.region_rows)[regions]]
        parts = [None] * len(regions) if out is None else list(out)
        for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
            if part is None:
                parts[i] = np.empty(shape, self.dtype)
            elif part.shape != shape or part.dtype != self.dtype or not part.flags.c_contiguous:
                found = f"an array {part.shape} of {part.dtype}, expected {shape} of {self.dtype}, contiguous"
                raise ValueError(f"slide {info.slide_id}, region {regions[i]}: {found}")
        self._read(info, wanted, [parts[i] for i in first])
        for i, source in enumerate(first[which]):
            if i != source:  # asked for twice
                parts[i][...] = parts[source]
        return parts

    def coords(self, position: int) -> Int[np.ndarray, "N 2"] | None:
        """The top-left corners of a slide's patches in stored order, their CRC checked; None where it has none."""
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

    def _read(self, info: SlideInfo, wanted: np.ndarray, parts: Sequence[np.ndarray]) -> np.ndarray | None:
        """Read the features of regions into `parts`; returns the coordinates of all patches that they span.

        `wanted` is sorted and names each region once.
        """
        rows, width = info.region_rows, info.row_bytes
        first, last = int(rows[wanted[0]]), int(rows[wanted[-1] + 1])
        runs = np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(wanted) != 1) + 1)  # of neighbours
        starts = [info.features_offset + int(rows[wanted[run[0]]]) * width for run in runs]
        extents = [(start, [parts[i] for i in run]) for start, run in zip(starts, runs, strict=True)]
        coords = np.zeros(8 * (last - first) if info.coords_bytes else 0, np.uint8)
        if info.coords_bytes:
            extents.insert(0, (info.coords_offset + 8 * first, [coords]))
        read = self._file(info.shard).read(extents)
        if info.coords_bytes:
            next(read)  # every region's CRC needs them
        for run, _ in zip(runs, read, strict=True):  # a region is summed up while the next ones are on their way
            for i in run:
                a, b = rows[wanted[i]] - first, rows[wanted[i] + 1] - first
                check_region(info, wanted[i], crc32c(parts[i].view(np.uint8), coords[8 * a : 8 * b]))
        return coords.view(COORDS).reshape(-1, 2) if info.coords_bytes else None


def iter_examples(shard: Place | str) -> Iterator:
    """The records of a shard as `tf.train.Example` messages, their CRCs checked, in order."""
    from tensorflow_datasets.proto import tf_example_pb2

    for _, data in read_frames(as_path(shard)):
        yield tf_example_pb2.Example.FromString(data)


def manifest_hash(folder: Place | str) -> str:
    """A SHA-256 of what the shards of a folder hold, from their indexes; it changes with any byte of the data."""
    shards = find_shards(folder)
    indexes = zip(shards, read_indexes(shards), strict=True)
    shards = [(shard.name, index.shard_bytes, index.shard_crc32c) for shard, index in indexes]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def finish_folder(folder: Place | str, *, edge_um: float = EDGE_UM, edge_px: int | None = None) -> dict:
    """Make a folder of whole shards a data set: features.json and dataset_info.json for TFDS, manifest.json for us.

    `edge_um` and `edge_px` are what the regions were cut with; a slide cut otherwise is refused. Safe to repeat; each
    file is replaced whole, manifest.json last: it says that the folder is complete. Returns the manifest. Raises
    ValueError for slides that are no one cohort and for a shard that is missing, FileNotFoundError for no shards.
    """
    folder = as_path(folder)
    records = Records(folder)
    expected = [shard_name(number) for number in range(len(records.shards))]
    names = [shard.name for shard in records.shards]
    if names != expected:
        missing = [name for name in expected if name not in names]
        raise ValueError(f"{folder}: {missing[0]} is missing beside {names[-1]}; run the task that writes it first")
    for position, info in enumerate(records.slides):
        _check_edge(info, records.coords(position), edge_um, edge_px)
    shards = [
        {
            "name": shard.name,
            "bytes": index.shard_bytes,
            "crc32c": f"{index.shard_crc32c:08x}",
            "slides": [info.slide_id for info in index.slides],
        }
        for shard, index in zip(records.shards, records.indexes, strict=True)
    ]
    first = records.slides[0]
    manifest = {
        "version": 1,
        "sha256": manifest_hash(folder),
        "encoder": records.encoder,
        "feature_dim": records.feature_dim,
        "feature_dtype": first.feature_dtype,
        "cut": records.cut,
        "edge_um": edge_um,
        "edge_px": edge_px,
        "num_slides": len(records),
        "num_patches": sum(info.num_patches for info in records.slides),
        "shards": shards,
    }
    info = dataset_info([len(shard["slides"]) for shard in shards], sum(shard["bytes"] for shard in shards))
    schema = feature_schema(records.feature_dim, first.feature_dtype)
    for name, content in (("features.json", schema), ("dataset_info.json", info), ("manifest.json", manifest)):
        with whole_file(folder / name) as out:
            out.write((json.dumps(content, indent=1) + "\n").encode())
    return manifest


def _check_edge(info: SlideInfo, coords: np.ndarray | None, edge_um: float, edge_px: int | None) -> None:
    if info.cut == "scan":
        return
    edge = region_edge(info.patch_size, info.mpp, edge_um, edge_px)
    cells = np.repeat(info.region_grid, np.diff(info.region_rows), axis=0)
    if coords is None or (np.maximum(coords, 0) // edge != cells).any():
        expected = f"squares of {edge} px at level 0 (edge_um {edge_um:g}, edge_px {edge_px})"
        raise ValueError(
            f"{info.shard}: slide {info.slide_id} was not cut into {expected}; one cohort has one region cut: "
            "pass the edge that it was written with, or write the slide again"
        )


def _place_fault(info: SlideInfo) -> str:
    """What is wrong with where a slide's patches lie, else ""."""
    size = (info.width, info.height)
    fault = patch_size_fault(info.patch_size, info.mpp, *size)
    if info.coords_bytes and not fault:
        data = read_at(open_file(info.shard), info.coords_bytes, info.coords_offset)
        coords = data.view(COORDS).reshape(-1, 2)
        fault = repeated_fault(coords) or place_fault(coords, info.patch_size, *size)
    return f"slide {info.slide_id}: {fault}" if fault else ""


def verify(folder: Place | str) -> list[str]:
    """Every fault of a folder of records, each naming its file; none for a sound one. Reads every byte.

    Checks the CRCs of records and regions, each index against its shard, that the slides are one cohort, that patches
    lie where they can, and that manifest.json describes what is there.
    """
    folder, faults, indexes = as_path(folder), [], {}
    shards = find_shards(folder)
    names = list_files(folder)
    for shard in shards:
        try:
            indexes[shard.name] = built = build_index(shard)
            faults += [f"{shard}: {fault}" for fault in map(_place_fault, built.slides) if fault]
            if index_path(shard).name in names and encode_index(read_index(shard)) != encode_index(built):
                faults.append(f"{index_path(shard)}: is of another shard than {shard.name}; {REBUILD}")
        except (OSError, ValueError) as error:
            faults.append(str(error))
    try:
        check_cohort([info for index in indexes.values() for info in index.slides])
    except ValueError as error:
        faults.append(str(error))
    left = [name for name in sorted(names) if name.endswith(".tmp")]
    faults += [f"{folder / name}: left by a writer that was killed; delete it" for name in left]
    path = folder / "manifest.json"
    if path.name not in names:
        return [*faults, f"{path}: missing: the folder was not finished; run the command that writes it to its end"]
    try:
        listed = {shard["name"]: shard for shard in parse_json(read_bytes(path).decode())["shards"]}
        crcs = {str(name): str(shard["crc32c"]) for name, shard in listed.items()}
    except (ValueError, KeyError, TypeError) as error:
        return [*faults, f"{path}: not a manifest ({error}); delete it and run the command that writes it again"]
    for name in sorted({*crcs, *(shard.name for shard in shards)}):
        if name not in crcs:
            faults.append(f"{folder / name}: not in manifest.json; finish the folder again, or take the shard away")
        elif name not in names:
            faults.append(f"{folder / name}: listed in manifest.json and not there; restore it, or write it again")
        elif name in indexes and crcs[name] != f"{indexes[name].shard_crc32c:08x}":
            faults.append(f"{folder / name}: another shard than manifest.json describes; finish the folder again")
    return faults

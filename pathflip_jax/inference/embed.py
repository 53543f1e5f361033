"""A whole archive of records as one Parquet file of slide embeddings, for search, clustering and probes elsewhere.

What is done stands in parts in `OUT.partial/`, each whole or absent; the last step joins them and renames the result
into place. Every part says which weights and which records it is of, so that a run continues its own work only.
"""

import functools
import hashlib
import importlib.metadata
import json
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pathflip_jax.convert.versions import as_before
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.records import Records, manifest_hash
from pathflip_jax.data.records.splits import no_such_split
from pathflip_jax.data.storage.failures import Failure, list_failures, some
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.storage.whole_files import whole_file
from pathflip_jax.data.texts.text import read_slide_table, rename_rows
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import HELD, Embedding, Predictor
from pathflip_jax.model.parameters import flatten
from pathflip_jax.runs.checkpoints import checksums

FORMAT = 1
METADATA = b"pathflip"  # key of the Parquet metadata under which a JSON object says what the file is
IDENTITY = {  # what two runs must share to write one file
    "format": "format", "checkpoint_hash": "checkpoint", "records_hash": "records",
    "slides_hash": "selection of slides", "regions": "choice of --regions",
}  # fmt: skip
PARTS = "part-*.parquet"
PART_SLIDES = 64  # what a kill costs at most
READERS = 2  # threads; CRCs are computed without the GIL
ROW_GROUP_BYTES = 16 << 20


@dataclass(frozen=True)
class Report:
    """What a run did: slides `done` now, `skipped` because they were embedded before, `failed`; `finished` when the
    file holds every slide that can be embedded. `seconds` is what reading and encoding took, compilation included."""

    out: Path
    done: list[str]
    skipped: list[str]
    failed: list[Failure]
    finished: bool
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def slides_per_second(self) -> float:
        """Slides embedded in a second; 0 where nothing was left to do."""
        return len(self.done) / self.seconds if self.done else 0.0

    def summary(self) -> str:
        """What to tell the user at the end, failures by name."""
        counts = f"slides embedded {len(self.done)}, there before {len(self.skipped)}, failed {len(self.failed)}"
        lines = [f"{self.out}: {counts}; {self.slides_per_second:.2f} slides/s", *self.notes]
        if self.failed:
            lines.append(f"without an embedding (all are listed in {failures_path(self.out).name}):")
            lines += list_failures(self.failed)
        return "\n".join(lines)


def failures_path(out: Path) -> Path:
    """The list of slides that failed, beside the file of those that did not."""
    return out.with_name(out.name + ".failures.json")


def partial_path(out: Path) -> Path:
    """The folder of finished parts, until the file is whole."""
    return out.with_name(out.name + ".partial")


def checkpoint_hash(predictor: Predictor) -> str:
    """A SHA-256 of all that makes an embedding: weights, the model's shape and how slides are cut into regions."""
    sums = {name: int(value) for name, value in jax.device_get(checksums(flatten(predictor.model))).items()}
    cut = [predictor.cut, predictor.edge_um, predictor.edge_px]
    return _sha256([sums, as_before("model", predictor.model.config.to_dict()), cut])


def embed(
    run: Path | str,
    records: Place | str,
    out: Path | str,
    *,
    slides_table: Place | str | None = None,
    split: str | None = None,
    regions: bool = False,
    batch_size: int = 8,
    strict: bool = False,
) -> Report:
    """Embed the slides of a folder of records with a trained run, into one Parquet file in the order of the records.

    Columns: slide_id, case_id, embedding (float32 [D], as the model gives it: not normalised), num_patches,
    num_regions; with `regions` also regions [R, D] and region_grid [R, 2]. `slides_table` and `split` choose slides.
    Slides are read ahead while others are encoded; memory holds eight batches of slides, however many there are, and of
    one of millions of patches some regions at a time. A second run does only what is missing, failed slides included.
    A bad slide is reported, in `OUT.failures.json` too, and the rest goes on; `strict` stops at the first and keeps
    what is done for the next run. Raises ValueError for records of another encoder than the run's, and for an `out`
    that was begun with other weights, records or slides; FileNotFoundError for no run or records; OSError on a full
    disk.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: expected at least 1")
    out, archive, predictor = Path(out), Records(records), load(run)
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file, such as {out / 'embeddings.parquet'}")
    predictor.check_features(archive.where, archive.feature_dim, archive.encoder)
    ids, failed, notes = _select(archive, slides_table, split)
    claim = {
        "format": FORMAT, "checkpoint_hash": checkpoint_hash(predictor), "records_hash": manifest_hash(archive),
        "slides_hash": _sha256(ids), "regions": regions, "checkpoint": str(run), "records": str(records),
        "split": split or "", "encoder": archive.encoder or predictor.encoder, "normalised": False,
        "embed_dim": predictor.model.config.embed_dim, "cut": predictor.cut, "edge_um": predictor.edge_um,
        "edge_px": predictor.edge_px,
        "versions": {name: importlib.metadata.version(name) for name in ("pathflip-jax", "jax", "flax", "pyarrow")},
    }  # fmt: skip
    partial = partial_path(out)
    there = _find_rows(_files(out), claim)
    skipped = [slide_id for slide_id in ids if slide_id in there]
    missing = [slide_id for slide_id in ids if slide_id not in there]
    if missing:
        partial.mkdir(parents=True, exist_ok=True)
    started, done = time.monotonic(), []
    with tqdm(total=len(ids), initial=len(skipped), unit="slide", desc="slides to embeddings") as bar:
        for rows in _embed_parts(predictor, archive, missing, batch_size, regions, strict, failed, bar):
            place = partial / f"part-{archive.position(rows[0].slide_id):08d}.parquet"
            _write(place, [_table(rows, archive, claim)])
            done += [row.slide_id for row in rows]
    seconds = time.monotonic() - started
    finished = not (strict and failed)
    if not finished:
        notes.append(f"stopped at the first bad slide (--strict); what is done waits in {partial.name}")
    else:
        if list(partial.glob(PARTS)):
            places = _find_rows(_files(out), claim)
            _write(out, _in_order(ids, places, claim | {"failed": [failure.slide for failure in failed]}))
        shutil.rmtree(partial, ignore_errors=True)
    _write_failures(out, failed)
    return Report(out, done, skipped, failed, finished and out.exists(), seconds, notes)


def _select(
    archive: Records, table: Place | str | None, split: str | None
) -> tuple[list[str], list[Failure], list[str]]:
    """The slides to embed, in the order of the records, those of the table that these do not have, and notes on ids."""
    ids = [info.slide_id for info in archive.slides]
    if table is None:
        if split:
            raise ValueError("--split needs the slide table that names the splits: add --slides slides.csv")
        return ids, [], []
    rows, notes = rename_rows(read_slide_table(table), ids, table)
    wanted = {row["slide_id"] for row in rows if split in (None, row["split"])}
    if not wanted:
        raise ValueError(no_such_split(table, split or "", rows))
    absent = sorted(wanted - set(ids))
    if len(absent) == len(wanted):
        raise ValueError(
            f"{table}: none of its {len(wanted)} slides ({some(absent)}) is among the {len(ids)} slides of "
            f"{archive.where} ({some(ids)})"
        )
    error = "not among the slides of the records; prepare it, or take it out of the slide table"
    return [name for name in ids if name in wanted], [Failure(name, archive.where, error) for name in absent], notes


def _embed_parts(
    predictor: Predictor,
    archive: Records,
    ids: Sequence[str],
    batch_size: int,
    regions: bool,
    strict: bool,
    failed: list[Failure],
    bar: tqdm,
) -> Iterator[list[Embedding]]:
    """Embeddings in the order of `ids`, some at a time; slides that cannot be embedded go to `failed`."""

    def fail(slide_id: str, error: str) -> None:
        failed.append(Failure(slide_id, str(archive.slides[archive.position(slide_id)].shard), error))
        bar.update()

    def sound() -> Iterator[SlideFeatures]:
        ahead = 4 * batch_size  # as many as `encode_slides` takes at once: the next ones are there when it is done
        for slide_id, slide in _read_ahead(predictor, archive, ids, ahead):
            if not isinstance(slide, SlideFeatures):
                fail(slide_id, slide)
                if strict:
                    return
                continue
            yield slide

    rows: list[Embedding] = []
    if strict and failed:
        return
    for embedding in predictor.encode_slides(sound(), batch_size):
        if not (np.isfinite(embedding.slide).all() and np.isfinite(embedding.regions).all()):
            fail(embedding.slide_id, "its embedding is not finite: its features are too large for the model")
            if strict:
                break
            continue
        if not regions:  # their number is all that is kept
            embedding = embedding._replace(regions=np.empty((len(embedding.regions), 0), np.float32))
        rows.append(embedding)
        bar.update()
        if len(rows) == PART_SLIDES:
            yield rows
            rows = []
    if rows:
        yield rows


def _read_ahead(
    predictor: Predictor, archive: Records, ids: Sequence[str], ahead: int
) -> Iterator[tuple[str, SlideFeatures | str]]:
    """Slides in the order of `ids`, or what was wrong with them; `ahead` of them are read while others are encoded,
    fewer where their features come to HELD bytes."""

    def read(slide_id: str) -> SlideFeatures | str:
        try:
            slide = open_slide(archive, archive.position(slide_id))
            predictor.bag(slide)  # refuses what cannot be cut here, where it costs this slide only
            return slide
        except (ValueError, OSError) as error:
            return str(error)

    def size(slide_id: str) -> int:
        info = archive.slides[archive.position(slide_id)]
        return info.num_patches * info.row_bytes

    pool, waiting, held = ThreadPoolExecutor(READERS), deque(), 0
    try:
        for slide_id in ids:
            waiting.append((slide_id, pool.submit(read, slide_id)))
            held += size(slide_id)
            while len(waiting) > ahead or (held > HELD and len(waiting) > 1):
                first, slide = waiting.popleft()
                held -= size(first)
                yield first, slide.result()
        while waiting:
            first, slide = waiting.popleft()
            yield first, slide.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _schema(claim: dict) -> pa.Schema:
    vector = pa.list_(pa.float32(), claim["embed_dim"])
    fields = [("slide_id", pa.string()), ("case_id", pa.string()), ("embedding", vector)]
    fields += [("num_patches", pa.int32()), ("num_regions", pa.int32())]
    if claim["regions"]:
        fields += [("regions", pa.list_(vector)), ("region_grid", pa.list_(pa.list_(pa.int32(), 2)))]
    return pa.schema(fields, metadata={METADATA: json.dumps(claim).encode()})


def _table(rows: Sequence[Embedding], archive: Records, claim: dict) -> pa.Table:
    """Embeddings as Arrow columns."""
    infos = [archive.slides[archive.position(row.slide_id)] for row in rows]
    columns = [
        pa.array([info.slide_id for info in infos]),
        pa.array([info.case_id for info in infos]),
        _vectors(np.stack([row.slide for row in rows]), np.float32),
        pa.array([info.num_patches for info in infos], pa.int32()),
        pa.array([len(row.regions) for row in rows], pa.int32()),
    ]
    if claim["regions"]:
        starts = pa.array(np.cumsum([0, *(len(row.regions) for row in rows)]), pa.int32())
        for parts, dtype in (([r.regions for r in rows], np.float32), ([r.grid for r in rows], np.int32)):
            columns.append(pa.ListArray.from_arrays(starts, _vectors(np.concatenate(parts), dtype)))
    return pa.table(columns, schema=_schema(claim))


def _vectors(values: np.ndarray, dtype: type) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(dtype).ravel()), values.shape[1])


def _write(path: Path, tables: Iterator[pa.Table] | list[pa.Table]) -> None:
    """Write a Parquet file whole or not at all, a row group to each table."""
    tables = iter(tables)
    first = next(tables)
    options = {"use_dictionary": False, "write_page_checksum": True}
    with whole_file(path) as out, pq.ParquetWriter(_Sink(out), first.schema, **options) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


class _Sink:
    """The part of a Python file that Arrow writes to."""

    closed = False

    def __init__(self, out) -> None:
        self.write = out.write

    def flush(self) -> None:
        """Nothing is held back."""


def open_embeddings(path: str | Path) -> tuple[pa.Table, dict]:
    """The table of a file that `embed` wrote, and what it is: hashes, settings, versions. ValueError for another."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `pathflip embed` writes it")
    return pq.read_table(path), _read_claim(path)


def _read_claim(path: Path) -> dict:
    try:
        metadata = pq.read_schema(path).metadata or {}
        return json.loads(metadata[METADATA])
    except (KeyError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(
            f"{path}: not a sound file of embeddings that this command wrote ({str(error).splitlines()[0]}); choose "
            "another --out, or delete it"
        ) from None


def _files(out: Path) -> list[Path]:
    return [*sorted(partial_path(out).glob(PARTS)), *([out] if out.exists() else [])]


def _read_group(path: Path, group: int, columns: list[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read_row_group(group, columns=columns)
    except (ValueError, OSError) as error:
        cure = "delete it and run the same command again: its slides are embedded anew"
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]}); {cure}") from None


def _find_rows(paths: Sequence[Path], claim: dict) -> dict[str, tuple[Path, int, int]]:
    """Slide id to file, row group and row, of files that are of this claim. Raises ValueError for others."""
    places = {}
    for path in paths:
        found = _read_claim(path)
        changed = [
            f"{what} {_show(found, name)}, now {_show(claim, name)}"
            for name, what in IDENTITY.items()
            if found.get(name) != claim[name]
        ]
        if changed:
            raise ValueError(
                f"{path} was written with another {'; '.join(changed)}. Give what it was begun with, choose another "
                "--out, or delete it to start anew"
            )
        for group in range(pq.read_metadata(path).num_row_groups):
            names = _read_group(path, group, ["slide_id"])["slide_id"].to_pylist()
            places |= {name: (path, group, row) for row, name in enumerate(names)}
    return places


def _show(claim: dict, name: str) -> str:
    value = str(claim.get(name))
    place = {"checkpoint_hash": "checkpoint", "records_hash": "records", "slides_hash": "split"}.get(name)
    return f"{value[:12]} ({claim.get(place) or 'all'})" if place else value


def _in_order(ids: Sequence[str], places: dict[str, tuple[Path, int, int]], claim: dict) -> Iterator[pa.Table]:
    """The rows of all files in the order of `ids`, as tables of about ROW_GROUP_BYTES."""

    read = functools.lru_cache(maxsize=2)(_read_group)  # a part, and the file that it fills a gap of
    schema, held, size = _schema(claim), [], 0
    for slide_id in ids:
        if slide_id not in places:
            continue
        path, group, row = places[slide_id]
        held.append(read(path, group).slice(row, 1).cast(schema))
        size += held[-1].nbytes
        if size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(held).combine_chunks()
            held, size = [], 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _write_failures(out: Path, failed: Sequence[Failure]) -> None:
    if not failed:
        failures_path(out).unlink(missing_ok=True)
        return
    with whole_file(failures_path(out)) as file:
        file.write((json.dumps([failure._asdict() for failure in failed], indent=1) + "\n").encode())


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

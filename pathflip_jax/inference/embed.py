"""Embedding of an entire archive of records into one Parquet file, for search, clustering and probes elsewhere.

Finished slides are kept as parts in `OUT.partial/`, each written atomically; the last step joins them and renames the
result to its final name. Every part records its weights and records, so that a run resumes only from its own work.
"""

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
from tqdm import tqdm

from pathflip_jax.convert.versions import drop_legacy_values
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.records import Records, manifest_hash
from pathflip_jax.data.records.splits import unknown_split_message
from pathflip_jax.data.storage.failures import Failure, list_failures, preview
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.data.texts.split_files import SlideTableFile
from pathflip_jax.data.texts.text import read_slide_table, rename_rows
from pathflip_jax.inference.embedding_files import FORMAT, find_rows, in_order, make_table, write_table
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import QUEUE_BYTES, Embedding, Predictor
from pathflip_jax.model.parameters import flatten
from pathflip_jax.runs.checksums import checksums

PARTS = "part-*.parquet"
OTHER_FORMATS = (".h5", ".hdf5", ".npz", ".npy", ".pt", ".csv", ".json")
PART_SLIDES = 64  # slides per part: the most that an interrupted run loses
READERS = 2  # threads; CRCs are computed without the GIL


@dataclass(frozen=True)
class Report:
    """Outcome of a run: slides `done` now, `skipped` because they were embedded before, `failed`; `finished` when the
    file holds every slide that can be embedded. `seconds` is the time of reading and encoding, compilation included."""

    out: Path
    done: list[str]
    skipped: list[str]
    failed: list[Failure]
    finished: bool
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def slides_per_second(self) -> float:
        """Slides embedded per second; 0 where nothing was left to do."""
        return len(self.done) / self.seconds if self.done else 0.0

    def summary(self) -> str:
        """Final message, with failures by name."""
        counts = f"slides embedded {len(self.done)}, embedded before {len(self.skipped)}, failed {len(self.failed)}"
        lines = [f"{self.out}: {counts}; {self.slides_per_second:.2f} slides/s", *self.notes]
        if self.failed:
            lines.append(f"slides without an embedding (full list in {failures_path(self.out).name}):")
            lines += list_failures(self.failed)
        return "\n".join(lines)


def failures_path(out: Path) -> Path:
    """Path of the list of failed slides, next to the output file."""
    return out.with_name(out.name + ".failures.json")


def partial_path(out: Path) -> Path:
    """Folder of finished parts, until the file is complete."""
    return out.with_name(out.name + ".partial")


def checkpoint_hash(predictor: Predictor) -> str:
    """SHA-256 of everything that determines an embedding: weights, model shape and the cutting into regions."""
    sums = {name: int(value) for name, value in jax.device_get(checksums(flatten(predictor.model))).items()}
    cut = [predictor.cut, predictor.edge_um, predictor.edge_px]
    return _sha256([sums, drop_legacy_values("model", predictor.model.config.to_dict()), cut])


def _check_name(out: Path) -> None:
    """Raise ValueError for a folder, and for a name that a reader would not open as Parquet."""
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; name a file, such as {out / 'embeddings.parquet'}")
    if out.suffix.lower() in OTHER_FORMATS:
        raise ValueError(f"{out}: embeddings are written as Parquet; name the file {out.with_suffix('.parquet').name}")


def embed(
    run: Predictor | Path | str,
    records: Records | Place | str,
    out: Path | str,
    *,
    slides_table: SlideTableFile | None = None,
    split: str | None = None,
    regions: bool = False,
    batch_size: int = 8,
    strict: bool = False,
) -> Report:
    """Embed the slides of a folder of records with a trained run, into one Parquet file in the order of the records.

    Run and records may be loaded already; those of slides and feature files are made by `reading.SlideReader.records`.

    Columns: slide_id, case_id, embedding (float32 [D], as the model outputs it: not normalised), num_patches,
    num_regions; with `regions` also regions [R, D] and region_grid [R, 2]. `slides_table` and `split` choose slides.
    Slides are prefetched while others are encoded; memory holds eight batches of slides, however many there are, and a
    slide of millions of patches is processed a block of regions at a time. A second run embeds only what is missing,
    failed slides included. A bad slide is reported, in `OUT.failures.json` too, and the others continue; `strict` stops
    at the first and keeps finished work for the next run. Raises ValueError for records of another encoder or recipe
    than the run's, and for an `out` that was begun with other weights, records or slides or is named like another
    format; FileNotFoundError for a missing run or records; OSError on a full disk.
    """
    if batch_size < 1:
        raise ValueError(f"batch size {batch_size}: expected at least 1")
    out, archive = Path(out), records if isinstance(records, Records) else Records(records)
    predictor = run if isinstance(run, Predictor) else load(run)
    _check_name(out)
    predictor.check_records(archive)
    ids, failed, notes = select_slides(archive, slides_table, split)
    claim = _claim(predictor, archive, ids, regions, split)
    partial = partial_path(out)
    there = find_rows(_files(out), claim)
    skipped = [slide_id for slide_id in ids if slide_id in there]
    missing = [slide_id for slide_id in ids if slide_id not in there]
    if missing:
        partial.mkdir(parents=True, exist_ok=True)
    started, done = time.monotonic(), []
    with tqdm(total=len(ids), initial=len(skipped), unit="slide", desc="embedding slides") as bar:
        for rows in _embed_parts(predictor, archive, missing, batch_size, regions, strict, failed, bar):
            place = partial / f"part-{archive.position(rows[0].slide_id):08d}.parquet"
            write_table(place, [make_table(rows, archive, claim)])
            done += [row.slide_id for row in rows]
    seconds = time.monotonic() - started
    finished = not (strict and failed)
    if not finished:
        notes.append(f"stopped at the first bad slide (--strict); finished slides are kept in {partial.name}")
    else:
        if list(partial.glob(PARTS)):
            places = find_rows(_files(out), claim)
            write_table(out, in_order(ids, places, claim | {"failed": [failure.slide for failure in failed]}))
        shutil.rmtree(partial, ignore_errors=True)
    write_failures(out, failed)
    return Report(out, done, skipped, failed, finished and out.exists(), seconds, notes)


def _claim(
    predictor: Predictor, archive: Records, ids: Sequence[str], regions: bool, split: str | None
) -> dict[str, object]:
    """Facts of a file, by which a run resumes only from its own work."""
    return {
        "format": FORMAT, "checkpoint_hash": checkpoint_hash(predictor), "records_hash": manifest_hash(archive),
        "slides_hash": _sha256(ids), "regions": regions, "checkpoint": predictor.name, "records": archive.where,
        "split": split or "", "encoder": archive.encoder or predictor.encoder, "normalised": False,
        "embed_dim": predictor.model.config.embed_dim, "cut": predictor.cut, "edge_um": predictor.edge_um,
        "edge_px": predictor.edge_px,
        "versions": {name: importlib.metadata.version(name) for name in ("pathflip-jax", "jax", "flax", "pyarrow")},
    }  # fmt: skip


def select_slides(
    archive: Records, table: SlideTableFile | None, split: str | None
) -> tuple[list[str], list[Failure], list[str]]:
    """Slides to embed in the order of the records, slides of the table missing from the records, and notes on ids."""
    ids = [info.slide_id for info in archive.slides]
    if table is None:
        if split:
            raise ValueError("--split needs the slide table that names the splits: add --slides slides.csv")
        return ids, [], []
    rows, notes = rename_rows(read_slide_table(table), ids, table)
    wanted = {row["slide_id"] for row in rows if split in (None, row["split"])}
    if not wanted:
        raise ValueError(unknown_split_message(table, split or "", rows))
    absent = sorted(wanted - set(ids))
    if len(absent) == len(wanted):
        raise ValueError(
            f"{table}: none of its {len(wanted)} slides ({preview(absent)}) is among the {len(ids)} slides of "
            f"{archive.where} ({preview(ids)}); pass the slide table of these records"
        )
    error = "not among the slides of the records; prepare the slide, or remove it from the slide table"
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
    """Embed slides in the order of `ids`, in blocks; slides that cannot be embedded go to `failed`."""

    def fail(slide_id: str, error: str) -> None:
        failed.append(Failure(slide_id, str(archive.slides[archive.position(slide_id)].shard), error))
        bar.update()

    def readable() -> Iterator[SlideFeatures]:
        ahead = 4 * batch_size  # as many as `encode_slides` takes per call: the next ones are ready when it returns
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
    for embedding in predictor.encode_slides(readable(), batch_size):
        if not (np.isfinite(embedding.slide).all() and np.isfinite(embedding.regions).all()):
            fail(embedding.slide_id, "its embedding is not finite: its features are too large for the model")
            if strict:
                break
            continue
        if not regions:  # only their number is kept
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
    """Slides in the order of `ids`, or the error of each; `ahead` of them are prefetched while others are encoded,
    fewer where their features reach QUEUE_BYTES."""

    def read(slide_id: str) -> SlideFeatures | str:
        try:
            slide = open_slide(archive, archive.position(slide_id))
            predictor.bag(slide)  # raises here if the slide cannot be cut, so that only this slide fails
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
            while len(waiting) > ahead or (held > QUEUE_BYTES and len(waiting) > 1):
                first, slide = waiting.popleft()
                held -= size(first)
                yield first, slide.result()
        while waiting:
            first, slide = waiting.popleft()
            yield first, slide.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _files(out: Path) -> list[Path]:
    return [*sorted(partial_path(out).glob(PARTS)), *([out] if out.exists() else [])]


def write_failures(out: Path, failed: Sequence[Failure]) -> None:
    """Write the list of failed slides next to the output file, or remove that of an earlier run."""
    if not failed:
        failures_path(out).unlink(missing_ok=True)
        return
    write_json(failures_path(out), [failure._asdict() for failure in failed], indent=1)


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""AnnData files (.h5ad) of embeddings, for scanpy, squidpy and LazySlide: one observation per slide, region or patch.

`obsm["spatial"]` holds centres in pixels at level 0. Matrices are written a slide at a time, so memory holds the table
of observations and one slide.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float

from pathflip_jax.data.records.columns import SlideInfo
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.records import Records, manifest_hash
from pathflip_jax.data.records.regions import PATCHES_PER_SCAN, region_edge
from pathflip_jax.data.storage.atomic_files import atomic_path
from pathflip_jax.data.storage.blocks import row_blocks
from pathflip_jax.data.storage.failures import Failure
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.texts.identity import is_missing
from pathflip_jax.data.texts.split_files import SlideTableFile
from pathflip_jax.data.texts.text import match_rows, read_slide_table
from pathflip_jax.inference.embed import Report, embed, select_slides, write_failures
from pathflip_jax.inference.embedding_files import read_provenance
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import Predictor

LEVELS = ("slide", "region", "patch")
EXTENSION = ".h5ad"
KEY = "pathflip"  # of the provenance in `uns`
_IDS = {"slide_id", "case_id", "patient_id", "label", "split"}  # columns that stay texts
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?", re.IGNORECASE)  # 0045 is an id
_ROWS_PER_CHUNK = 256


class Observations(NamedTuple):
    """Observations of one slide: row blocks of their values, their number, their own columns, and their centres."""

    info: SlideInfo
    count: int
    values: Iterator[Float[np.ndarray, "n D"]]
    columns: dict[str, np.ndarray]
    spatial: Float[np.ndarray, "count 2"] | None


def embed_anndata(
    run: Predictor | Path | str,
    records: Records | Place | str,
    out: Path | str,
    *,
    level: str = "slide",
    slides_table: SlideTableFile | None = None,
    split: str | None = None,
    batch_size: int = 8,
    strict: bool = False,
) -> Report:
    """Embed the slides of a folder of records with a trained run, into one AnnData file.

    `X` holds the embeddings of slides, regions or patches (float32), `obs` the slide, its case and the columns of the
    slide table, `uns["pathflip"]` the run, the records and the recipe of their features. Embeddings are also kept in a
    Parquet file of the same name, which `embed` writes and continues. A run that does not embed patches (PathFLIP)
    gives the features of the records at level "patch", and a note says so. Raises ImportError without anndata,
    ValueError for a level that the run lacks, and errors as `embed`.
    """
    require_anndata()
    out, archive = Path(out), records if isinstance(records, Records) else Records(records)
    predictor = run if isinstance(run, Predictor) else load(run)
    _check(out, level, predictor)
    chosen = {"slides_table": slides_table, "split": split, "strict": strict}
    if level == "patch" and not predictor.patchwise:
        predictor.check_records(archive)
        return _write_features(predictor, archive, out, **chosen)
    parquet = out.with_suffix(".parquet")
    report = embed(predictor, archive, parquet, regions=level != "slide", batch_size=batch_size, **chosen)
    if not report.finished:
        return report
    facts = read_provenance(parquet) | {"level": level, "values": "embeddings"}
    observations = _embeddings(parquet, archive, level, facts)
    written, _ = _write(out, archive, observations, slides_table, facts, strict=True)
    return replace(report, out=out, notes=[*report.notes, f"{written}; also kept in {parquet.name}"])


def require_anndata() -> None:
    """Raise ImportError, naming the extra, if anndata is not installed."""
    try:
        import anndata  # noqa: F401
    except ImportError as error:
        raise ImportError(f".h5ad files need anndata: pip install 'pathflip-jax[anndata]' ({error})") from None


def _check(out: Path, level: str, predictor: Predictor) -> None:
    if level not in LEVELS:
        raise ValueError(f"level {level!r}: expected one of {', '.join(LEVELS)}")
    if out.suffix.lower() != EXTENSION or out.is_dir():
        raise ValueError(f"{out}: name a file with the extension {EXTENSION}, such as embeddings{EXTENSION}")
    if level == "region" and predictor.patchwise:
        raise ValueError(f"{predictor.name}: a model that embeds slides and patches, not regions; choose level patch")


def _write_features(predictor: Predictor, archive: Records, out: Path, slides_table, split, strict: bool) -> Report:
    """Write the features of the records at level "patch". Raises ValueError for the first bad slide if `strict`."""
    started = time.monotonic()
    ids, failed, notes = select_slides(archive, slides_table, split)
    if strict and failed:
        raise ValueError(f"{failed[0].file}: slide {failed[0].slide} is {failed[0].error}")
    encoder = archive.encoder or predictor.encoder or "an unnamed encoder"
    facts = {"level": "patch", "values": "features", "checkpoint": predictor.name, "records": str(archive.where)}
    facts |= {"records_hash": manifest_hash(archive), "split": split or "", "encoder": encoder}
    written, bad = _write(out, archive, _features(archive, ids), slides_table, facts, strict)
    notes += [written, f"{predictor.name} embeds slides and regions, not patches: X holds the features of {encoder}"]
    failed += bad
    write_failures(out, failed)
    lost = {failure.slide for failure in failed}
    done = [slide_id for slide_id in ids if slide_id not in lost]
    return Report(out, done, [], failed, True, time.monotonic() - started, notes)


def _embeddings(parquet: Path, archive: Records, level: str, facts: Mapping[str, Any]) -> Iterator[Observations]:
    """Observations from a file of `embed`, row group by row group."""
    with pq.ParquetFile(parquet, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group).to_batches(max_chunksize=1):
                yield _embedded_slide(row, archive, level, facts)


def _embedded_slide(row, archive: Records, level: str, facts: Mapping[str, Any]) -> Observations:
    position = archive.position(row["slide_id"][0].as_py())
    info = archive.slides[position]
    if level == "slide":
        counts = {name: row[name].to_numpy() for name in ("num_patches", "num_regions")}
        return Observations(info, 1, iter([_vectors(row["embedding"])]), counts, None)
    values = _vectors(row["regions"].flatten())
    numbers = np.arange(len(values))
    if level == "patch":
        spatial = _patch_centres(archive, position)
        return Observations(info, len(values), iter([values]), {"patch": numbers}, spatial)
    grid = row["region_grid"].flatten().flatten().to_numpy().reshape(-1, 2)
    columns = {"region": numbers}
    if facts["cut"] == "grid":
        columns |= {"region_column": grid[:, 0], "region_row": grid[:, 1]}
        edge = region_edge(info.patch_size, info.mpp, facts["edge_um"], facts["edge_px"])
        spatial = (grid + 0.5) * edge
    else:
        spatial = _scan_centres(archive, position, len(values))
    return Observations(info, len(values), iter([values]), columns, spatial)


def _vectors(column) -> Float[np.ndarray, "n D"]:
    return column.flatten().to_numpy().reshape(len(column), -1)


def _features(archive: Records, ids: Sequence[str]) -> Iterator[Observations]:
    """Patches of slides with their features, which are read and verified when they are taken."""

    def read(position: int) -> Iterator[np.ndarray]:
        yield from (block for _, block in row_blocks(open_slide(archive, position).features))

    def fail(error: Exception) -> Iterator[np.ndarray]:
        raise error
        yield

    for slide_id in ids:
        position = archive.position(slide_id)
        info, centres = archive.slides[position], None
        try:
            centres, values = _patch_centres(archive, position), read(position)
        except (ValueError, OSError) as error:
            values = fail(error)
        yield Observations(info, info.num_patches, values, {"patch": np.arange(info.num_patches)}, centres)


def _patch_centres(archive: Records, position: int) -> Float[np.ndarray, "N 2"] | None:
    coords = archive.coords(position)
    return None if coords is None else coords + archive.slides[position].patch_size / 2


def _scan_centres(archive: Records, position: int, regions: int) -> Float[np.ndarray, "R 2"] | None:
    """Centres of the bounding boxes of regions that are runs of consecutive patches."""
    centres = _patch_centres(archive, position)
    if centres is None:
        return None
    parts = [centres[first * PATCHES_PER_SCAN :][:PATCHES_PER_SCAN] for first in range(regions)]
    return np.array([(part.min(0) + part.max(0)) / 2 for part in parts])


def _write(
    out: Path,
    archive: Records,
    observations: Iterator[Observations],
    slides_table: SlideTableFile | None,
    facts: Mapping[str, Any],
    strict: bool,
) -> tuple[str, list[Failure]]:
    """Write a file; returns a line about it, and the slides whose values could not be read unless `strict`."""
    kept: list[Observations] = []
    failed: list[Failure] = []
    with atomic_path(out) as temporary, h5py.File(temporary, "w") as file:
        for one in observations:
            try:
                _append(file, one)
            except (ValueError, OSError) as error:
                if strict:
                    raise
                failed.append(Failure(one.info.slide_id, str(one.info.shard), str(error)))
                continue
            kept.append(one)
        if not kept:
            raise ValueError(f"{out}: no slide could be read: {failed[0].error if failed else archive.where}")
        _write_tables(file, archive, kept, slides_table, facts)
    rows, width = sum(one.count for one in kept), facts["level"]
    return f"{out.name}: {rows} observations ({width}) of {len(kept)} slides", failed


def _append(file: h5py.File, one: Observations) -> None:
    """Append a slide's rows to `X`; a slide that fails leaves none."""
    start = len(file["X"]) if "X" in file else 0
    row = start
    try:
        for block in one.values:
            block = np.asarray(block, np.float32)
            if "X" not in file:
                chunks, most = (_ROWS_PER_CHUNK, block.shape[1]), (None, block.shape[1])
                matrix = file.create_dataset("X", (0, block.shape[1]), np.float32, chunks=chunks, maxshape=most)
                matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
            file["X"].resize(row + len(block), axis=0)
            file["X"][row:] = block
            row += len(block)
    except (ValueError, OSError):
        if "X" in file:
            file["X"].resize(start, axis=0)
        raise


def _write_tables(file: h5py.File, archive: Records, kept: Sequence[Observations], slides_table, facts) -> None:
    """Write everything but `X`, with anndata's own writer."""
    import anndata
    import pandas as pd

    infos = [one.info for one in kept]
    counts = [one.count for one in kept]
    columns = _slide_columns(archive, infos, slides_table)
    table = {name: _repeated(pd, values, counts) for name, values in columns.items()}
    table |= {name: np.concatenate([one.columns[name] for one in kept]) for name in kept[0].columns}
    names = [
        info.slide_id if facts["level"] == "slide" else f"{info.slide_id}:{number}"
        for info, count in zip(infos, counts, strict=True)
        for number in range(count)
    ]
    spatial = {}
    if any(one.spatial is not None for one in kept):
        unknown = [one.spatial if one.spatial is not None else np.full((one.count, 2), np.nan) for one in kept]
        spatial = {"spatial": np.concatenate(unknown).astype(np.float64)}
    provenance = _known(dict(facts) | ({"recipe": archive.recipe.to_dict()} if archive.recipe else {}))
    parts = {
        "obs": pd.DataFrame(table, index=pd.Index(names, name=None)),
        "var": pd.DataFrame(index=[str(number) for number in range(file["X"].shape[1])]),
        "obsm": spatial,
        "uns": {KEY: provenance},
    }
    for name, value in parts.items():
        anndata.io.write_elem(file, name, value)
    for name in ("layers", "obsp", "varm", "varp"):
        anndata.io.write_elem(file, name, {})
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


def _slide_columns(archive: Records, infos: Sequence[SlideInfo], slides_table) -> dict[str, list]:
    """Columns of `obs` that are the same for all observations of a slide, those of the slide table included."""
    columns: dict[str, list] = {name: [getattr(info, name) for info in infos] for name in ("slide_id", "case_id")}
    columns |= {name: [float(getattr(info, name)) or np.nan for info in infos] for name in ("mpp", "patch_size")}
    if slides_table is None:
        return columns
    ids = [info.slide_id for info in archive.slides]
    rows, _ = match_rows(read_slide_table(slides_table), ids, slides_table)
    own = [rows.get(info.slide_id, {}) for info in infos]
    for name in dict.fromkeys(name for row in own for name in row if name):
        values = [row.get(name, "") for row in own]
        if name not in columns and not all(is_missing(value) for value in values):
            columns[name.replace("/", "_")] = values if name in _IDS else _numbers(values)
    return columns


def _numbers(values: Sequence[str]) -> list:
    """Texts as numbers if all that are not missing are numbers."""
    if all(is_missing(value) or _NUMBER.fullmatch(value) for value in values):
        return [np.nan if is_missing(value) else float(value) for value in values]
    return list(values)


def _repeated(pd, values: Sequence, counts: Sequence[int]):
    """Column of all observations from one value per slide: categories for texts, NaN for missing ones."""
    if isinstance(values[0], float):
        return np.repeat(np.array(values, np.float64), counts)
    found = pd.Categorical([None if is_missing(value) else value for value in values])
    return found.take(np.repeat(np.arange(len(values)), counts))


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts without those that are None, which have no place in HDF5."""
    return {
        name: _known(value) if isinstance(value, Mapping) else value
        for name, value in facts.items()
        if value is not None
    }

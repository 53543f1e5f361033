"""Reading of regions from a shard, with each CRC checked while its bytes are still in the CPU cache."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np
from jaxtyping import Int

from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.readers.features import SlideFeatures, all_finite
from pathflip_jax.data.records.columns import SlideInfo
from pathflip_jax.data.records.index import COORDS, check_region
from pathflip_jax.data.storage.files import Extent, LocalFile, RemoteFile
from pathflip_jax.data.storage.framing import crc32c

COORDS_AT_ONCE = 1 << 20  # bytes
PIECE = 1 << 19  # bytes read and checked at a time for a whole slide


def read_slide(
    file: LocalFile | RemoteFile, info: SlideInfo, dtype: np.dtype, recipe: FeatureRecipe | None = None
) -> SlideFeatures:
    """Whole slide with patches in region order and every region's CRC checked; `recipe` is that of its folder.

    Raises ValueError for a flipped byte, naming shard, slide and region, and for what `SlideFeatures` refuses; OSError
    for a truncated shard.
    """
    features, rows = np.empty((info.num_patches, info.feature_dim), dtype), info.region_rows
    regions = np.arange(info.num_regions)
    coords, at, places = coords_of(info, regions, [regions])
    corners = coords.view(COORDS).reshape(-1, 2) if info.coords_bytes else None
    parts, pieces = [features[a:b] for a, b in pairwise(rows.tolist())], _pieces(rows, info.row_bytes)
    extents = [(info.features_offset + int(rows[a]) * info.row_bytes, [features[rows[a] : rows[b]]]) for a, b in pieces]
    read = file.read([*places, *extents])
    for _ in places:
        next(read)  # every region's CRC covers its coordinates
    slide, finite = None, True
    for number, ((a, b), (_, (own,)), _) in enumerate(zip(pieces, extents, read, strict=True)):
        _check(info, regions[a:b], parts[a:b], coords, at[a:b])
        finite = finite and all_finite(own)
        if number == len(pieces) // 2 and info.coords_bytes:  # while the rest is being read
            with suppress(ValueError):  # it may depend on features not read yet
                slide = _slide(info, features, corners, recipe, True)
    return slide if slide is not None and finite else _slide(info, features, corners, recipe, finite)


def _slide(
    info: SlideInfo, features: np.ndarray, coords: np.ndarray | None, recipe: FeatureRecipe | None, finite: bool
) -> SlideFeatures:
    place = (info.patch_size, info.mpp, info.width, info.height)
    more = {"recipe": recipe, "finite": finite}
    try:
        return SlideFeatures(info.slide_id, info.case_id, features, coords, *place, info.encoder, **more)
    except ValueError as error:
        raise ValueError(f"{info.shard}: {error}") from None


def _pieces(rows: Int[np.ndarray, "R+1"], width: int) -> list[tuple[int, int]]:
    """Half-open ranges of regions of about PIECE bytes each."""
    piece = rows[:-1] * width // PIECE
    return list(pairwise([0, *(np.flatnonzero(np.diff(piece)) + 1).tolist(), len(rows) - 1]))


def read_parts(file: LocalFile | RemoteFile, info: SlideInfo, wanted: np.ndarray, parts: Sequence[np.ndarray]) -> None:
    """Read the features of regions into contiguous arrays; `wanted` is sorted, without duplicates.

    Raises ValueError for a flipped byte, naming shard, slide and region; OSError for a truncated shard.
    """
    rows, width = info.region_rows, info.row_bytes
    runs = np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(wanted) != 1) + 1)  # runs of adjacent regions
    starts = (info.features_offset + rows[wanted[[run[0] for run in runs]]] * width).tolist()
    extents = [(start, [parts[i] for i in run]) for start, run in zip(starts, runs, strict=True)]
    coords, at, places = coords_of(info, wanted, runs)
    read = file.read([*places, *extents])
    for _ in places:
        next(read)
    for run, _ in zip(runs, read, strict=True):  # checksums overlap with the next reads
        _check(info, wanted[run], [parts[i] for i in run], coords, at[run])


def coords_of(
    info: SlideInfo, wanted: np.ndarray, runs: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[Extent]]:
    """Array for the coordinates of regions, the start of each region in it, and the extents to read into it.

    Read in one piece including the gaps between regions, unless these are large, as in slides of millions of patches.
    """
    if not info.coords_bytes:
        return np.zeros(0, np.uint8), np.zeros(len(wanted), np.int64), []
    rows = info.region_rows
    starts, stops = rows[wanted], rows[wanted + 1]
    if 8 * (stops[-1] - starts[0]) <= COORDS_AT_ONCE:
        at, spans = starts - starts[0], [(starts[0], stops[-1])]
    else:
        at, spans = np.cumsum(stops - starts) - (stops - starts), [(starts[run[0]], stops[run[-1]]) for run in runs]
    coords = np.zeros(8 * (at[-1] + stops[-1] - starts[-1]), np.uint8)
    ends = np.cumsum([0, *(8 * (stop - start) for start, stop in spans)])
    pieces = zip(spans, ends, ends[1:], strict=False)
    return coords, at, [(info.coords_offset + 8 * int(start), [coords[a:b]]) for (start, _), a, b in pieces]


def _check(
    info: SlideInfo, regions: np.ndarray, parts: Sequence[np.ndarray], coords: np.ndarray, at: np.ndarray
) -> None:
    """Check the CRCs of regions; the coordinates of each start in `coords` at patch `at`."""
    expected = info.region_crc32c[regions].tolist()
    for number, (part, start, crc) in enumerate(zip(parts, (8 * at).tolist(), expected, strict=True)):
        found = crc32c(part.view(np.uint8), coords[start : start + 8 * len(part)])
        if found != crc:
            check_region(info, regions[number], found)

"""Patch features of a slide, and readers of existing feature files.

Files of all formats (`formats.py`) are read as `SlideFeatures`. The format is detected from a file's first bytes and
content, never from its extension alone.
"""

import math
import re
from dataclasses import InitVar, dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.data.readers.coordinates import (
    FEWEST_GAPS,
    Gap,
    coordinate_fault,
    duplicate_coordinates_fault,
    integer_coords,
    most_frequent_gap,
    patch_size_fault,
    repetition_fault,
    step_fault,
)
from pathflip_jax.data.readers.feature_format import FeatureFields, slide_id_of
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.readers.formats import read_fields
from pathflip_jax.data.storage.blocks import row_blocks
from pathflip_jax.data.storage.folders import is_store
from pathflip_jax.data.texts.identity import barcode_patient

FEATURE_DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
_PLAIN_ID = re.compile(r"(?=.*[^.])[ -.0-\[\]-~]{1,200}")  # ASCII; other ids are checked in detail
LONGEST_ID = 200  # bytes; file systems allow names of 255, and suffixes are added
LARGEST_LOSS = 0.01  # relative error of a patch's features in a narrower dtype
SAME = 1e-3  # relative difference within which two sizes are the same


@dataclass(frozen=True, eq=False)
class SlideFeatures:
    """Patches of one slide, in any order: features [N, F] and coordinates.

    `coords` [N, 2] are x, y of a patch's top-left corner in pixels at level 0, None if the file has none; `patch_size`
    is a patch's edge in the same pixels, `mpp` micrometres per pixel at level 0, `width` and `height` the slide's at
    level 0; 0 means unknown. An empty `case_id` is set from the slide id (`case_of`). Raises ValueError, naming the
    slide, for inconsistent arrays, no patches, non-finite features, and implausible patch sizes or coordinates
    (`coordinates.py`).

    Set by a reader and not kept in records: `patch_size_source` is "file", "option" or "gaps" (inferred from consistent
    gaps between neighbours); `notes` are lines for the summary of a cohort, without the slide's name and identical for
    slides with the same finding. `recipe` is that of its folder of records (`records/recipe.py`), None if unknown.
    `finite`: the reader has already checked that the features are finite.
    """

    slide_id: str
    case_id: str
    features: Float[np.ndarray, "N F"] = field(repr=False)
    coords: Int[np.ndarray, "N 2"] | None = field(default=None, repr=False)
    patch_size: int = 0
    mpp: float = 0.0
    width: int = 0
    height: int = 0
    encoder: str = ""
    patch_size_source: str = ""
    notes: tuple[str, ...] = ()
    recipe: FeatureRecipe | None = None
    finite: InitVar[bool] = False

    def __post_init__(self, finite: bool) -> None:
        where, features = f"slide {self.slide_id}", self.features
        check_slide_id(self.slide_id)
        if features.ndim != 2 or (len(features) and not features.shape[1]):
            found = "one vector: a slide embedding, not patches" if features.ndim == 1 else f"of shape {features.shape}"
            raise ValueError(f"{where}: the features are {found}; expected [patches, feature width]")
        if not len(features):
            raise ValueError(f"{where}: no tissue: features of 0 patches; leave the slide out, or segment it again")
        if features.dtype not in FEATURE_DTYPES:
            raise ValueError(f"{where}: features are {features.dtype}, expected float16, bfloat16 or float32")
        if not (finite or all_finite(features)):
            with np.errstate(invalid="ignore"):
                kept = [np.isfinite(block).all(axis=1) for _, block in row_blocks(features)]
            rows = np.flatnonzero(~np.concatenate(kept))
            found = f"{len(rows)} of {len(features)} patches hold NaN or infinity (the first is patch {rows[0]})"
            raise ValueError(f"{where}: {found}; extract the features again, in float32 where they overflow float16")
        if self.coords is not None:
            object.__setattr__(self, "coords", integer_coords(self.coords, len(features), where))
        if min(self.patch_size, self.width, self.height) < 0 or not 0 <= self.mpp < 1e4:
            found = f"patch size {self.patch_size}, mpp {self.mpp}, slide {self.width} x {self.height}"
            raise ValueError(f"{where}: {found}; expected numbers above 0, or 0 for unknown")
        if fault := self._place_fault():
            raise ValueError(f"{where}: {fault}")
        object.__setattr__(self, "case_id", self.case_id or case_of(self.slide_id))

    def _place_fault(self) -> str:
        size = (self.width, self.height)
        fault = patch_size_fault(self.patch_size, self.mpp, *size)
        if fault or self.coords is None:
            return fault or repetition_fault(self.features)
        return duplicate_coordinates_fault(self.coords, self.features) or coordinate_fault(
            self.coords, self.patch_size, *size
        )


def all_finite(features: Float[np.ndarray, "N F"]) -> bool:
    """Whether no feature is NaN or infinite.

    Two-byte dtypes are checked by their bits, in cache-sized blocks: ten times faster than NumPy, which converts each.
    """
    beyond = 0x7C00 if features.dtype == np.float16 else 0x7F80  # all exponent bits set: infinity, above it NaN

    def sound(block: np.ndarray) -> bool:
        if block.dtype.itemsize != 2:
            return bool(np.isfinite(block).all())
        step = max(1, 2**17 // block.shape[1])
        parts = (block[i : i + step] for i in range(0, len(block), step))
        # Read as signed integers, positive floats are the largest; as unsigned integers, negative ones are.
        return all(p.view(np.int16).max() < beyond and p.view(np.uint16).max() < beyond | 0x8000 for p in parts)

    return all(sound(block) for _, block in row_blocks(features))


def rows_lost_to_rounding(before: Float[np.ndarray, "N F"], after: Float[np.ndarray, "N F"]) -> np.ndarray:
    """Rows whose features a narrower dtype changed by more than a hundredth of their norm.

    Rounding to float16 or bfloat16 changes them by less than that; numbers below the resolution of float16 become 0.
    """
    # The spacing of subnormal numbers is negligible in a row whose largest number is far above it.
    enough = 100 * float(ml_dtypes.finfo(after.dtype).smallest_subnormal) * math.sqrt(before.shape[1])
    rows = np.flatnonzero((before.max(axis=1) < enough) & (before.min(axis=1) > -enough))
    whole = before[rows].astype(np.float64)
    scale = np.maximum(np.abs(whole).max(axis=1, keepdims=True, initial=0), np.finfo(np.float64).tiny)
    error = (whole - after[rows].astype(np.float64)) / scale  # scaled, as the squares of such numbers underflow
    whole /= scale
    return rows[np.square(error).sum(axis=1) > LARGEST_LOSS**2 * np.square(whole).sum(axis=1)]


def check_slide_id(slide_id: str) -> None:
    """Raise ValueError for a slide id that is not a plain file name, as outputs are named after it.

    Ids come from third-party records and tables, and "../../x" must not become an output path.
    """
    if _PLAIN_ID.fullmatch(slide_id):  # fast path for nearly all ids: a million are checked whenever a cohort is opened
        return
    if not slide_id:
        raise ValueError("a slide has no id, but texts are matched to slides by id; give it one")
    try:
        size = len(slide_id.encode())
    except UnicodeEncodeError:  # a file name that is not UTF-8
        size = 0
    refused = any(letter in "/\\" or ord(letter) < 32 for letter in slide_id)
    if refused or not slide_id.strip(".") or not 0 < size <= LONGEST_ID:
        raise ValueError(
            f"slide id {slide_id!r:.80}: expected a plain file name of up to {LONGEST_ID} bytes, with no slash and no "
            "control character, as output files are named after it; give the slide another id"
        )


def case_of(slide_id: str) -> str:
    """Patient named by a slide id (TCGA, CPTAC), else the slide id itself."""
    return barcode_patient(slide_id) or slide_id


class UnknownPatchSize(ValueError):
    """The patch size is not in the file, and too few patches are adjacent to infer it from the coordinates."""


def read_features(
    path: Path | str,
    *,
    slide_id: str = "",
    case_id: str = "",
    patch_size: int | None = None,
    mpp: float | None = None,
    encoder: str | None = None,
    override_mpp: float | None = None,
) -> SlideFeatures:
    """Read a feature file of any format in `formats.py:FORMATS`.

    `patch_size` (level-0 pixels), `mpp` and `encoder` fill in values missing from the file; if it states others, the
    file takes precedence, with a line in the slide's `notes`. `override_mpp` takes precedence over the file. Without
    them, mpp is the nominal one of the magnification if TRIDENT recorded that, and the patch size the most frequent gap
    between neighbours if nothing else gives it. Raises UnknownPatchSize if the gaps are too few, OSError or ValueError
    with the file, what was found and the cure.
    """
    path = Path(path)
    if not (path.is_file() or is_store(path)):
        raise FileNotFoundError(
            f"{path}: {'a folder' if path.is_dir() else 'no such file'}; pass a slide's feature file"
        )
    for value in (mpp, override_mpp):
        if (patch_size is not None and patch_size <= 0) or (value is not None and not 0 < value < 1e4):
            found = f"patch_size={patch_size}, mpp={value}"
            raise ValueError(f"{path}: {found}: expected numbers above 0; omit values that are unknown")
    fields = read_fields(path, override_mpp or mpp, encoder)
    slide_id = slide_id or slide_id_of(path)
    try:
        _check_rows(fields["features"], fields.get("coords"))
        _fill(fields, patch_size, mpp, encoder, override_mpp)
        if fields.get("coords") is not None and len(fields["features"]):
            _rescale(fields, patch_size)
            fields["coords"] = integer_coords(fields["coords"], len(fields["features"]), f"slide {slide_id}")
            _settle_patch_size(fields, patch_size)
        for name in ("step", "centres", "edge", "spots"):
            fields.pop(name, None)
        if fields["features"].dtype == np.float64:
            fields["features"] = _as_float32(fields["features"])
        return SlideFeatures(slide_id, case_id, **fields)
    except UnknownPatchSize as error:
        raise UnknownPatchSize(f"{path}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _as_float32(features: Float[np.ndarray, "N F"]) -> Float[np.ndarray, "N F"]:
    """float64 features as float32 for `SlideFeatures`. Raises ValueError for numbers too small for it."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = features.astype(np.float32)
    if all_finite(narrow) and len(rows := rows_lost_to_rounding(features, narrow)):
        raise ValueError(f"features of {len(rows)} patches are too small for float32; scale them before saving")
    return narrow


def _check_rows(features: np.ndarray, coords: np.ndarray | None) -> None:
    """Raise ValueError for a slide embedding, a single vector next to the coordinates of the slide's patches."""
    places = 0 if coords is None or coords.ndim != 2 else len(coords)
    if features.ndim == 1 and features.size or (features.ndim == 2 and len(features) == 1 < places):
        raise ValueError(
            f"a slide embedding, one vector of {features.size} numbers for the whole slide, not patch features; pass "
            "the file of the patch features (TRIDENT: features_<encoder>, not slide_features_<encoder>)"
        )


def _fill(
    fields: FeatureFields, patch_size: int | None, mpp: float | None, encoder: str | None, override_mpp: float | None
) -> None:
    """Complete a file's fields with the caller's values, with notes where the two differ."""
    notes = list(fields.get("notes", ()))
    stated = fields.get("mpp", 0.0)
    if override_mpp:
        if stated and not math.isclose(stated, override_mpp, rel_tol=SAME):
            notes.append(f"the file says mpp {stated:g}: replaced by {override_mpp:g}")
        fields["mpp"] = override_mpp
    elif mpp and not stated:
        fields["mpp"] = mpp
    elif mpp and not math.isclose(stated, mpp, rel_tol=SAME):
        notes.append(f"the file says mpp {stated:g}: it was kept, {mpp:g} was not used")
    size = fields.get("patch_size", 0)
    fields["patch_size_source"] = "file" if size else ""
    if patch_size and size and patch_size_fault(size, 0, 0, 0):
        notes.append(f"the file says an impossible patch size of {size} px: {patch_size} was used")
        size = 0
    if patch_size and not size:
        fields |= {"patch_size": patch_size, "patch_size_source": "option"}
    elif patch_size and not math.isclose(size, patch_size, rel_tol=SAME):
        notes.append(f"the file says a patch size of {size} px: it was kept, {patch_size} was not used")
    named = fields.get("encoder", "")
    if encoder and named and encoder.casefold() != named.casefold():
        notes.append(f"the file names the encoder {named}: it was kept, {encoder} was not used")
    fields |= {"encoder": named or encoder or "", "notes": tuple(notes)}


def _rescale(fields: FeatureFields, given: int | None) -> None:
    """Scale coordinates of an unstated level to level 0 by the caller's patch size. Raises ValueError without it."""
    if not (edge := fields.get("edge")):
        return
    if not given:
        raise ValueError(
            f"coordinates are in pixels of the resolution at which patches of {edge:g} px were read, which the file "
            f"does not state; pass patch_size (--patch-size), the edge of a patch in pixels at level 0: {2 * edge:g} "
            "if patches were read at 0.5 um per px from a slide of 0.25"
        )
    fields["coords"] = np.round(fields["coords"] * (given / edge))


def _settle_patch_size(fields: FeatureFields, given: int | None) -> None:
    """Infer the patch size from the gaps between patches if nothing gives it, and check it against them otherwise.

    `given` is the caller's patch size. Raises ValueError for coordinates of another level.
    """
    coords, gap, notes = fields["coords"], most_frequent_gap(fields["coords"]), list(fields["notes"])
    if gap.size == 1 and given and fields["patch_size_source"] == "option":
        if (np.abs(coords.astype(np.int64)) * given >= 2**31).any():
            raise ValueError(f"coordinates counted in patches exceed 2^31 px at {given} px per patch")
        fields["coords"] = coords = coords * np.int32(given)
        notes.append(f"coordinates were counted in patches: multiplied by the patch size, {given} px")
        gap = gap._replace(size=given)
    if not fields.get("patch_size"):
        if fields.get("spots"):
            raise ValueError(
                "patches about the spots of an assay (HEST-bench), whose gaps are not the patch size; pass mpp (--mpp) "
                "or patch_size (--patch-size), the edge of a patch in pixels at level 0"
            )
        fields |= _inferred_size(len(coords), gap, fields.get("centres", False))
        notes.append(f"patch size of {gap.size} px inferred from the gaps between patches, as the file does not say it")
    size, step = fields["patch_size"], fields.get("step", 0.0)
    places = (fields.get("width", 0), fields.get("height", 0))
    if (step or not given) and (fault := step_fault(coords, size, step, *places)):
        raise ValueError(fault)
    if not (step or fields.get("spots")) and gap.support >= FEWEST_GAPS and gap.size != size:
        notes.append(f"patches of {size} px are {gap.size} px apart at level 0: check the patch size")
    if fields.get("centres"):
        fields["coords"] = coords - np.int32(size // 2)
    fields["notes"] = tuple(notes)


def _inferred_size(patches: int, gap: Gap, centres: bool) -> dict:
    """Patch size from the gaps. Raises UnknownPatchSize if they are too few; of `centres` ValueError, as the corners
    depend on it, so that the rest of a cohort cannot complete it later.
    """
    if gap.size == 1:
        raise ValueError(
            "coordinates in steps of 1: they are counted in patches, not pixels; pass patch_size (--patch-size), the "
            "edge of a patch in pixels at level 0, by which they are then multiplied"
        )
    if gap.support < FEWEST_GAPS:
        seen = f"{gap.support} gaps of {gap.size} px" if gap.support else "no two of them in one row or column"
        kind = ValueError if centres else UnknownPatchSize
        raise kind(
            f"the patch size is not in the file and cannot be inferred from {patches} patches ({seen}); pass "
            "patch_size (--patch-size): the edge of a patch in pixels at level 0"
        )
    return {"patch_size": gap.size, "patch_size_source": "gaps"}

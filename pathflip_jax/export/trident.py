"""Records as the HDF5 files of TRIDENT, which CLAM, Patho-Bench, MIL-Lab, LazySlide and others read.

    OUT/features_<encoder>/<slide>.h5    features [N, F] float32, coords [N, 2] int64: corners in pixels at level 0
    OUT/patches/<slide>_patches.h5       coords alone, as TRIDENT writes them before it extracts features

Both hold TRIDENT's attributes of `coords`. TRIDENT knows the resolution of a slide as its magnification alone;
`level0_mpp` states it exactly, so that `pathflip import` restores every number.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tqdm import tqdm

from pathflip_jax.data.readers.coordinates import FEWEST_GAPS, most_frequent_gap
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.readers.h5_features import LEVEL0_MPP, UM_TIMES_MAGNIFICATION
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage.atomic_files import atomic_path
from pathflip_jax.data.storage.blocks import row_blocks
from pathflip_jax.data.storage.failures import Failure, list_failures, preview
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.storage.json_files import write_json

# TRIDENT's magnification of a slide with fewer micrometres per pixel than this.
_MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))
_NOT_IN_NAMES = re.compile(r"[^\w.+-]+")
FAILURES = "failures.json"


@dataclass(frozen=True)
class Report:
    """Outcome of an export: the feature files' folder, slides `done` and `failed`, and notes."""

    folder: Path
    done: list[str]
    failed: list[Failure]
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Final message, with failures by name."""
        lines = [f"{self.folder}: {len(self.done)} slides as TRIDENT writes them, failed {len(self.failed)}"]
        lines += self.notes
        if self.failed:
            lines.append(f"slides without a file (full list in {FAILURES}):")
            lines += list_failures(self.failed)
        return "\n".join(lines)


def export_trident(records: Place | str, out: Path | str) -> Report:
    """Write every slide of a folder of records in TRIDENT's layout; a bad slide is reported, and the others go on.

    Existing files are replaced, each atomically. A slide without coordinates has no file in `patches/`. Raises
    ValueError and OSError for records that cannot be opened.
    """
    archive, out = Records(records), Path(out)
    encoder = archive.encoder
    features = out / (f"features_{_NOT_IN_NAMES.sub('_', encoder)}" if encoder else "features")
    patches = out / "patches"
    for folder in (features, patches):
        folder.mkdir(parents=True, exist_ok=True)
    done, failed, unplaced, unscaled = [], [], [], []
    for position, info in enumerate(tqdm(archive.slides, unit="slide", desc="writing slides")):
        try:
            slide = open_slide(archive, position)
            attributes = coords_attributes(slide, archive.recipe, str(out))
            if slide.coords is None:
                unplaced.append(slide.slide_id)
                (patches / f"{slide.slide_id}_patches.h5").unlink(missing_ok=True)
            else:
                unscaled += [] if slide.mpp else [slide.slide_id]
                _write_coords(patches / f"{slide.slide_id}_patches.h5", slide, attributes)
            _write_features(features / f"{slide.slide_id}.h5", slide, attributes, encoder)
        except (ValueError, OSError) as error:
            failed.append(Failure(info.slide_id, str(info.shard), str(error)))
            continue
        done.append(slide.slide_id)
    notes = [] if encoder else ["the encoder of the records is not known: no name in the folder or the files"]
    if unplaced:
        notes.append(f"{len(unplaced)} slides have no coordinates, hence no patches file ({preview(unplaced)})")
    if unscaled:
        notes.append(f"{len(unscaled)} slides have no mpp, hence no magnification ({preview(unscaled)})")
    _write_failures(out / FAILURES, failed)
    return Report(features, done, failed, notes)


def coords_attributes(slide: SlideFeatures, recipe: FeatureRecipe | None, folder: str) -> dict[str, Any]:
    """TRIDENT's attributes of `coords`; those that are unknown are absent.

    `patch_size` and `overlap` are in pixels at the target magnification, and `patch_size * level0_magnification /
    target_magnification` is `patch_size_level0`. The patch size is that of the recipe, else the one at level 0.
    """
    size = slide.patch_size
    seen = (recipe.patch_size if recipe else 0) or size
    found: dict[str, Any] = {"name": slide.slide_id, "savetodir": folder}
    if size:
        found |= {"patch_size": seen, "patch_size_level0": size}
    if slide.mpp:
        level0 = next(
            (power for most, power in _MAGNIFICATIONS if slide.mpp < most), UM_TIMES_MAGNIFICATION / slide.mpp
        )
        found |= {"level0_magnification": level0, LEVEL0_MPP: float(slide.mpp)}
        if size:
            found["target_magnification"] = _whole(level0 * seen / size)
    if size and slide.coords is not None and (overlap := _overlap(slide)) is not None:
        found["overlap"] = _whole(overlap * seen / size)
    return found | {f"level0_{name}": value for name in ("width", "height") if (value := getattr(slide, name))}


def _overlap(slide: SlideFeatures) -> int | None:
    """Overlap of neighbouring patches in pixels at level 0; None if too few are adjacent or they lie apart."""
    gap = most_frequent_gap(slide.coords)
    return slide.patch_size - gap.size if gap.support >= FEWEST_GAPS and gap.size <= slide.patch_size else None


def _whole(value: float) -> int | float:
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _write_coords(path: Path, slide: SlideFeatures, attributes: dict[str, Any]) -> None:
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        _add_coords(file, slide, attributes)


def _add_coords(file: h5py.File, slide: SlideFeatures, attributes: dict[str, Any]) -> None:
    file.create_dataset("coords", data=slide.coords.astype(np.int64)).attrs.update(attributes)


def _write_features(path: Path, slide: SlideFeatures, attributes: dict[str, Any], encoder: str) -> None:
    """Write features in float32, in which CLAM's and TRIDENT's networks take them, a block of rows at a time."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        matrix = file.create_dataset("features", slide.features.shape, np.float32)
        for rows, block in row_blocks(slide.features):
            matrix[rows] = np.asarray(block, np.float32)
        own = {"name": slide.slide_id, "savetodir": str(path.parent), "encoder": encoder or "None"}
        matrix.attrs.update(own)
        if slide.coords is not None:
            _add_coords(file, slide, attributes)


def _write_failures(path: Path, failed: list[Failure]) -> None:
    if not failed:
        path.unlink(missing_ok=True)
        return
    write_json(path, [failure._asdict() for failure in failed], indent=1)

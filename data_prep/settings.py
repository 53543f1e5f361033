"""Settings of preparation and import, validated on construction, shared by the command line and Python."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.detector_names import DETECTORS, EMBEDDED
from data_prep.slide_table import SANE_MPP
from pathflip_jax.data.pixels.reader_names import READERS
from pathflip_jax.data.records.columns import DTYPES
from pathflip_jax.data.records.regions import EDGE_UM
from pathflip_jax.data.storage.files import Place
from pathflip_jax.vision.recipes import find_recipe

SHEETS = (".png", ".pdf")


@dataclass(frozen=True, kw_only=True)
class RecordsSettings:
    """Layout of the records, and distribution of the work.

    `cut` and `edge_um` determine how slides are cut into regions. `override_mpp` replaces the files' level-0
    resolution. `shard` = (i, n) processes the i-th of n shares, for job arrays. `workers` processes share this machine
    (default: one for each core) and its GPUs. `slides_table` (columns slide_id and case_id or patient_id) names the
    cases; its columns mpp and magnification override the resolution of single slides. `prune` removes records of slides
    that no longer exist. `strict` stops at the first bad slide. `beam` distributes the work by Apache Beam, with these
    Beam options (`data_prep.beam`). Raises ValueError for settings that are out of range or exclude each other.
    """

    override_mpp: float | None = None
    dtype: str = "float16"
    cut: str = "grid"
    edge_um: float = EDGE_UM
    shard: tuple[int, int] = (0, 1)
    slides_per_shard: int = 32
    workers: int | None = None
    strict: bool = False
    slides_table: Place | str | None = None
    prune: bool = False
    beam: Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_mpp("override-mpp", self.override_mpp)
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype}: expected {' or '.join(DTYPES)}")
        if self.beam is not None and (self.strict or self.shard != (0, 1)):
            raise ValueError(
                "--beam works with neither --shard nor --strict: the runner distributes the slides, and no task knows "
                "the outcome of the others; leave these out (bad slides are listed, and the exit code is 1)"
            )


@dataclass(frozen=True, kw_only=True)
class PrepareSettings(RecordsSettings):
    """Settings of `prepare`: patches of `patch_size` pixels at `mpp`, and their encoder.

    `assume_mpp` is for slides without a stated level-0 resolution; `min_tissue` is the tissue fraction of a patch;
    `keep_ink` keeps pen as tissue, for stains that resemble it; `half` lets networks compute in half precision.
    `tissue` is one of `DETECTORS`, and `tissue_from` a folder of masks made elsewhere (`given_masks`), for slides
    without which a given detector is used; None for both is the built-in detector. `holes_um2` and `smallest_um2` are
    the largest hole filled and the smallest piece kept (`TissueSettings`). `sheet` is a PNG or PDF of all masks.
    `weights` are those of a registered encoder (None: from the Hugging Face hub), `batch_size` its number of patches
    per batch, over all local devices (None: its own). A registered encoder is named as in `RECIPES`, and determines
    `patch_size` and `mpp` where they are None; those of others are 256 and 0.5. `reader` decodes the pixels, which are
    the same by each of `READERS`. `icc` converts the colours of patches to sRGB by the slide's embedded profile.
    """

    encoder: str = "stain_texture"
    patch_size: int | None = None
    mpp: float | None = None
    assume_mpp: float | None = None
    min_tissue: float = 0.25
    keep_ink: bool = False
    tissue: str | None = None
    tissue_from: Path | None = None
    holes_um2: float | None = None
    smallest_um2: float | None = None
    sheet: Path | None = None
    half: bool = False
    batch_size: int | None = None
    weights: Path | None = None
    reader: str = READERS[0]
    icc: bool = False

    def __post_init__(self) -> None:
        recipe = find_recipe(self.encoder) if ":" not in self.encoder else None
        given = {"patch_size": self.patch_size, "mpp": self.mpp, "encoder": recipe and recipe.name}
        own = (recipe.patch_size, recipe.mpp) if recipe else (256, 0.5)
        for name, value in zip(given, (*own, self.encoder), strict=True):
            object.__setattr__(self, name, value if given[name] is None else given[name])
        if recipe is None and self.weights is not None:
            raise ValueError(
                f"--weights {self.weights}: encoder {self.encoder!r} is not registered, and brings its own weights; "
                "leave them out, or pass an --encoder that `pathflip encoders` lists"
            )
        if self.patch_size < 1 or not 0 < self.mpp < 1e3 or not 0 <= self.min_tissue <= 1:
            raise ValueError(
                f"patch_size={self.patch_size}, mpp={self.mpp}, min_tissue={self.min_tissue}: expected a "
                "patch_size of at least 1, an mpp above 0 and below 1000, and a min_tissue from 0 to 1"
            )
        if self.reader not in READERS:
            raise ValueError(f"--reader {self.reader}: expected one of {', '.join(READERS)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: expected at least 1")
        _check_mpp("assume-mpp", self.assume_mpp)
        self._check_tissue()
        super().__post_init__()

    def _check_tissue(self) -> None:
        if self.tissue is not None and self.tissue not in DETECTORS:
            raise ValueError(f"--tissue {self.tissue}: expected {', '.join(DETECTORS)}")
        if self.tissue_from is not None and not Path(self.tissue_from).is_dir():
            raise ValueError(
                f"--tissue-from {self.tissue_from}: no such folder; expected one with SLIDE.geojson or SLIDE.png for "
                "each slide"
            )
        if self.keep_ink and self._detector not in (None, EMBEDDED):
            raise ValueError(
                f"--keep-ink: has no effect with --tissue {self._detector}, which knows no pen; leave it out"
            )
        if self.keep_ink and self.tissue_from is not None and self.tissue is None:
            raise ValueError("--keep-ink: has no effect on masks of --tissue-from; leave it out")
        for name, value in (("holes", self.holes_um2), ("smallest", self.smallest_um2)):
            if value is not None and not 0 <= value < 1e12:
                raise ValueError(f"--{name} {value:g}: expected an area in um2, from 0")
        if self.sheet is not None and Path(self.sheet).suffix.lower() not in SHEETS:
            raise ValueError(f"--sheet {self.sheet}: expected a file that ends in {' or '.join(SHEETS)}")

    @property
    def _detector(self) -> str | None:
        """Detector by name; None for the built-in one, and where no slide is left to one."""
        return None if self.tissue == EMBEDDED and self.tissue_from is None else self.tissue

    def of_records(self) -> dict[str, Any]:
        """The settings that a folder of records is tied to; None for those that earlier versions do not know."""
        return {
            "command": "prepare", "encoder": self.encoder, "half": self.half, "patch_size": self.patch_size,
            "mpp": self.mpp, "assume_mpp": self.assume_mpp, "override_mpp": self.override_mpp,
            "min_tissue": self.min_tissue, "keep_ink": self.keep_ink or None, "icc": self.icc or None,
            "tissue": self._detector, "tissue_from": self.tissue_from is not None or None, "holes_um2": self.holes_um2,
            "smallest_um2": self.smallest_um2, "dtype": self.dtype, "cut": self.cut, "edge_um": self.edge_um,
        }  # fmt: skip


def check_together(settings: Sequence[PrepareSettings]) -> None:
    """Raise ValueError for settings that cannot share a pass over the slides, each with a folder of its own."""
    names = [one.encoder for one in settings]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"encoders {', '.join(names) or '(none)'}: expected each once")
    if unfit := [name for name in names if not name or set(name) & set("/\\:") or name.startswith(".")]:
        raise ValueError(f"encoder {unfit[0]!r}: not the name of a folder, which it needs beside other encoders")
    for field in fields(PrepareSettings):
        values = {str(getattr(one, field.name)) for one in settings}
        if len(values) > 1 and field.name not in _OF_ONE_ENCODER:
            raise ValueError(f"{field.name} {', '.join(sorted(values))}: expected one value for all encoders of a run")


_OF_ONE_ENCODER = ("encoder", "patch_size", "mpp", "half", "batch_size", "weights")


@dataclass(frozen=True, kw_only=True)
class ImportSettings(RecordsSettings):
    """Settings of `import_features`: `patch_size` (level-0 pixels), `mpp` (level 0) and `encoder` that files lack."""

    patch_size: int | None = None
    mpp: float | None = None
    encoder: str | None = None

    def __post_init__(self) -> None:
        _check_mpp("mpp", self.mpp)
        super().__post_init__()

    def of_records(self) -> dict[str, Any]:
        """The settings that a folder of records is tied to."""
        return {
            "command": "import", "patch_size": self.patch_size, "mpp": self.mpp, "override_mpp": self.override_mpp,
            "encoder": self.encoder, "dtype": self.dtype, "cut": self.cut, "edge_um": self.edge_um,
        }  # fmt: skip


def _check_mpp(option: str, value: float | None) -> None:
    if value is not None and not SANE_MPP[0] <= value <= SANE_MPP[1]:
        raise ValueError(f"--{option} {value:g}: expected {SANE_MPP[0]:g} to {SANE_MPP[1]:g} um per level-0 pixel")

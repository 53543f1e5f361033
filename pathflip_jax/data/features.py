"""Patch features of a slide, and the readers of the feature files that labs already have.

One `SlideFeatures` comes out of CLAM, TRIDENT, SlideChat, STAMP and plain HDF5 files alike. The first bytes of a file
and what it holds decide who wrote it, never its extension alone.
"""

import csv
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.data import guarded
from pathflip_jax.data.identity import barcode_patient

FEATURE_SUFFIXES = (".h5", ".hdf5", ".pt", ".csv")
FEATURE_DTYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
LONGEST_ID = 200  # bytes; file systems take names of 255, and suffixes are added
LONGEST_LINE = 2**20  # characters of a line of a csv: 2,560 numbers of 17 digits are 50,000
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# What runs in the worker of `guarded.py`: broken files of these kinds crash and stall their libraries.
H5_READER, PT_READER = "pathflip_jax.data.hdf5:read", "pathflip_jax.data.torch_file:read"
# Nominal micrometres per pixel of a scan at 1x (40x is 0.25); scanners differ from it by up to 10 percent.
UM_TIMES_MAGNIFICATION = 10.0
# Folders that lie beside features and hold none: coordinates, masks, pictures.
NOT_FEATURES = {"patches", "masks", "stitches", "thumbnails", "contours", "contours_geojson", "visualization"}


@dataclass(frozen=True, eq=False)
class SlideFeatures:
    """The patches of one slide, in any order: features [N, F] and where each lies.

    `coords` [N, 2] are x, y of a patch's top-left corner in pixels at level 0, None where the file has none;
    `patch_size` is a patch's edge in the same pixels, `mpp` micrometres per pixel at level 0, `width` and `height` the
    slide's at level 0; 0 stands for unknown. An empty `case_id` becomes that of the slide id (`case_of`). Raises
    ValueError, naming the slide, for arrays that do not belong together, no patches, and features not finite.
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

    def __post_init__(self) -> None:
        where, features = f"slide {self.slide_id}", self.features
        check_slide_id(self.slide_id)
        if features.ndim != 2 or (len(features) and not features.shape[1]):
            found = "one vector: a slide embedding, not patches" if features.ndim == 1 else f"of shape {features.shape}"
            raise ValueError(f"{where}: the features are {found}; expected [patches, feature width]")
        if not len(features):
            raise ValueError(f"{where}: no tissue: features of 0 patches; leave the slide out, or find its tissue anew")
        if features.dtype not in FEATURE_DTYPES:
            raise ValueError(f"{where}: features are {features.dtype}, expected float16, bfloat16 or float32")
        if not all_finite(features):
            with np.errstate(invalid="ignore"):
                rows = np.flatnonzero(~np.isfinite(features).all(axis=1))
            found = f"{len(rows)} of {len(features)} patches hold NaN or infinity (the first is patch {rows[0]})"
            raise ValueError(f"{where}: {found}; extract the features again, in float32 where they overflow float16")
        if self.coords is not None:
            object.__setattr__(self, "coords", _checked_coords(self.coords, len(features), where))
        if min(self.patch_size, self.width, self.height) < 0 or not 0 <= self.mpp < 1e4:
            found = f"patch size {self.patch_size}, mpp {self.mpp}, slide {self.width} x {self.height}"
            raise ValueError(f"{where}: {found}; expected numbers above 0, or 0 for unknown")
        object.__setattr__(self, "case_id", self.case_id or case_of(self.slide_id))


def _checked_coords(coords: np.ndarray, patches: int, where: str) -> np.ndarray:
    coords = np.asarray(coords)
    if coords.shape != (patches, 2):
        found = f"{patches} features and coords of shape {coords.shape}"
        raise ValueError(f"{where}: {found}, expected one x, y per feature; one was cut short, extract the slide again")
    if not np.isfinite(coords).all() or np.abs(coords.astype(np.float64)).max() >= 2**31:
        raise ValueError(f"{where}: coords hold NaN or numbers beyond 2^31, expected level-0 pixels; extract it again")
    return np.ascontiguousarray(np.round(coords), np.int32)


def all_finite(features: Float[np.ndarray, "N F"]) -> bool:
    """Whether no feature is NaN or infinite.

    Of two bytes, by their exponents, in blocks that stay in the cache: ten times as fast as NumPy, which converts each.
    """
    if features.dtype.itemsize != 2:
        return bool(np.isfinite(features).all())
    bits, step = features.view(np.uint16), max(1, 2**17 // features.shape[1])
    beyond = 0x7C00 if features.dtype == np.float16 else 0x7F80  # all exponent bits set: infinity, above it NaN
    return all((bits[i : i + step] & 0x7FFF).max() < beyond for i in range(0, len(bits), step))


def check_slide_id(slide_id: str) -> None:
    """Raise ValueError for a slide id that is no plain file name: what is made of a slide is named by it.

    Ids come out of records and tables of other people, and "../../x" must not be a place to write to.
    """
    if not slide_id:
        raise ValueError("a slide without an id: texts are matched to slides by id, name it")
    try:
        size = len(slide_id.encode())
    except UnicodeEncodeError:  # a file name in no UTF-8
        size = 0
    refused = any(letter in "/\\" or ord(letter) < 32 for letter in slide_id)
    if refused or not slide_id.strip(".") or not 0 < size <= LONGEST_ID:
        raise ValueError(
            f"slide id {slide_id!r:.80}: expected a plain file name of up to {LONGEST_ID} bytes, with no slash and no "
            "control character: what is made of a slide is named by it; give the slide another id"
        )


def case_of(slide_id: str) -> str:
    """The patient that a slide's id names (TCGA, CPTAC), else the slide id itself."""
    return barcode_patient(slide_id) or slide_id


def slide_id_of(path: Path | str) -> str:
    """The slide id in a feature file's name: no extension, no trailing `_features`, `_feats` or `_patches`.

    What follows a dot stays: it is the UUID of a TCGA id.
    """
    return re.sub(r"[_.-](features|feats|patches)$", "", Path(path).stem, flags=re.IGNORECASE)


def find_feature_files(folder: Path | str) -> list[Path]:
    """The feature files below a folder of any of these tools, in order of slide id.

    A CLAM folder holds every slide twice, as .h5 and .pt: the .h5 are taken, they have the coordinates. Tables that
    are no features, and the coordinate files in `patches/`, are passed over. Raises FileNotFoundError where there is
    none, ValueError where a slide has several (the features of two encoders below one folder).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; name the folder that holds the feature files")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in FEATURE_SUFFIXES and path.is_file()]
    found = [path for path in found if not NOT_FEATURES.intersection(path.relative_to(folder).parts[:-1])]
    found = [path for path in found if path.suffix.lower() != ".csv" or _is_feature_table(path)]
    with_coords = {slide_id_of(path) for path in found if path.suffix.lower() != ".pt"}
    found = [path for path in found if path.suffix.lower() != ".pt" or slide_id_of(path) not in with_coords]
    if not found:
        raise FileNotFoundError(f"{folder}: no feature files ({', '.join(FEATURE_SUFFIXES)}) found in it or below")
    slides: dict[str, Path] = {}
    for path in found:
        other = slides.setdefault(slide_id_of(path), path)
        if other != path:
            raise ValueError(
                f"{folder}: slide {slide_id_of(path)} has two feature files, {other.relative_to(folder)} and "
                f"{path.relative_to(folder)}; name the folder of one encoder, or take one file away"
            )
    return [slides[slide_id] for slide_id in sorted(slides)]


def read_features(
    path: Path | str,
    *,
    slide_id: str = "",
    case_id: str = "",
    patch_size: int | None = None,
    mpp: float | None = None,
    encoder: str | None = None,
) -> SlideFeatures:
    """Read a feature file of CLAM, TRIDENT, SlideChat or STAMP, or any HDF5 of `features` and `coords`.

    `patch_size` (level-0 pixels), `mpp` and `encoder` win over what the file says. Without them, mpp is the nominal
    one of the magnification where TRIDENT kept that, and the patch size the commonest gap between neighbours where
    nothing else tells it. Raises OSError or ValueError with the file, what was found and the cure.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (patch_size is not None and patch_size <= 0) or (mpp is not None and not 0 < mpp < 1e4):
        raise ValueError(f"patch_size={patch_size}, mpp={mpp}: expected numbers above 0; leave out what is not known")
    given = {name: v for name, v in {"patch_size": patch_size, "mpp": mpp, "encoder": encoder}.items() if v}
    with path.open("rb") as file:
        start = file.read(8)
    if _is_hdf5(path) or (start and path.suffix.lower() in (".h5", ".hdf5")):
        fields = _read_h5(path, mpp)
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        fields = _read_pt(path)
    elif not start:
        raise ValueError(f"{path}: an empty file of 0 bytes; copy or extract it again")
    elif b"\x00" in start:
        raise ValueError(f"{path}: neither HDF5, nor a .pt tensor, nor a csv table; expected a slide's patch features")
    else:
        fields = _read_csv(path)
    fields |= given
    try:
        coords, features = fields.get("coords"), fields["features"]
        if coords is not None and features.ndim and len(features):
            fields["coords"] = _checked_coords(coords, len(features), f"slide {slide_id or slide_id_of(path)}")
            fields["patch_size"] = fields.get("patch_size") or _patch_size_from_gaps(fields["coords"])
        if features.dtype == np.float64:
            with np.errstate(over="ignore"):
                fields["features"] = features.astype(np.float32)
        return SlideFeatures(slide_id or slide_id_of(path), case_id, **fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_hdf5(path: Path) -> bool:
    """Whether HDF5's signature stands at byte 0, 512, 1024, 2048, ...; behind it, libhdf5 itself would have to look."""
    offset = 0
    with path.open("rb") as file:
        while data := file.read(8):
            if data == HDF5_SIGNATURE:
                return True
            offset = max(512, 2 * offset)
            file.seek(offset)
    return False


def _read_h5(path: Path, mpp: float | None) -> dict:
    facts, arrays = guarded.parse(H5_READER, path, True)
    arrays |= {name: _piece(path, *place) for name, place in facts["places"].items()}
    if "feats" in arrays:
        return _stamp_fields(path, facts, arrays, mpp)
    if "features" not in arrays:
        cure = (
            "it holds coordinates; name the features made from them" if "coords" in facts["names"] else "it is foreign"
        )
        raise ValueError(f"{path}: datasets {facts['names']}, expected 'features' [patches, width]; {cure}")
    fields = {"features": _rows(arrays["features"]), "encoder": _text(facts["features"].get("encoder"))}
    if "coords" in arrays:
        fields["coords"] = _rows(arrays["coords"])
        fields |= _grid_attributes(facts["coords"])
        if "patch_size" not in fields:
            fields |= _sibling_attributes(path)
    return fields


def _piece(path: Path, offset: int, shape: list[int], dtype: str) -> np.ndarray:
    """An array that lies in a file in one piece."""
    array = np.fromfile(path, dtype, math.prod(shape), offset=offset).reshape(shape)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _rows(array: np.ndarray) -> np.ndarray:
    """Drop a leading axis of one; an empty slide may have been written flat."""
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    return array.reshape(0, 2) if array.ndim == 1 and not array.size else array


def _text(value) -> str:
    return "" if value is None or str(value) == "None" else str(value)


def _number(attributes: dict, name: str) -> float:
    """An attribute as a number, the first one of several; 0 where it is absent or says nothing."""
    try:
        value = float(np.ravel(attributes[name])[0]) if name in attributes else 0.0
    except (TypeError, ValueError, IndexError):
        return 0.0
    return value if 0 <= value < 2**31 else 0.0


def _pixels(value: float) -> int:
    """A size in whole pixels; 0, for unknown, where it is absurd."""
    return round(value) if 0 <= value < 2**31 else 0


def _grid_attributes(attributes: dict) -> dict:
    """Patch size, mpp and slide size out of the attributes that TRIDENT or CLAM put on `coords`.

    Some versions store them as floats. CLAM's `patch_size` counts pixels of `patch_level`, TRIDENT's pixels at the
    target magnification; older TRIDENT has no `patch_size_level0`.
    """
    fields = {}
    downsample = _number(attributes, "downsample") or 1.0
    level0, target = _number(attributes, "level0_magnification"), _number(attributes, "target_magnification")
    patch_size = _number(attributes, "patch_size_level0")
    patch_size = patch_size or _number(attributes, "patch_size") * (
        level0 / target if level0 and target else downsample
    )
    if patch_size := _pixels(patch_size):
        fields["patch_size"] = patch_size
    if level0:
        fields["mpp"] = UM_TIMES_MAGNIFICATION / level0
    width, height = _number(attributes, "level0_width"), _number(attributes, "level0_height")
    size = attributes.get("level_dim")
    if not width and isinstance(size, list) and np.shape(size) == (2,):
        width, height = size[0] * downsample, size[1] * downsample
    return fields | {"width": _pixels(width), "height": _pixels(height)}


def _sibling_attributes(path: Path) -> dict:
    """What the `patches/` folder beside a feature folder says of this slide (CLAM `X.h5`, TRIDENT `X_patches.h5`)."""
    slide_id = slide_id_of(path)
    for parent in path.resolve().parents[1:3]:
        for name in (f"{slide_id}.h5", f"{slide_id}_patches.h5"):
            sibling = parent / "patches" / name
            if sibling.is_file():
                facts, _ = guarded.parse(H5_READER, sibling, False)
                if "coords" not in facts:
                    raise OSError(f"{sibling}: no patch coordinates in it; write it again, or pass the patch size")
                return _grid_attributes(facts["coords"])
    return {}


def _stamp_fields(path: Path, facts: dict, arrays: dict[str, np.ndarray], mpp: float | None) -> dict:
    fields = {"features": _rows(arrays["feats"]), "encoder": _text(facts["/"].get("extractor"))}
    if "coords" not in arrays:
        return fields
    unit, tile_um = _text(facts["/"].get("unit")) or "um", _number(facts["/"], "tile_size_um")
    if unit != "um" or not tile_um:
        raise ValueError(
            f"{path}: STAMP coordinates in {unit!r}, tile_size_um {tile_um:g}; expected um and the tile's size "
            "there; extract it with STAMP 2"
        )
    if not mpp:
        raise ValueError(
            f"{path}: STAMP coordinates are in micrometres (tiles of {tile_um:g} um), and the file does not say the "
            "slide's mpp; pass mpp, such as --mpp 0.25 for a 40x scan"
        )
    fields["coords"] = np.round(_rows(arrays["coords"]).astype(np.float64) / mpp)
    return fields | {"patch_size": _pixels(tile_um / mpp)}


def _read_pt(path: Path) -> dict:
    """CLAM's .pt: the tensor alone. Never unpickles code."""
    try:
        facts, arrays = guarded.parse(PT_READER, path)
    except ImportError:
        cure = "install the extra `torch`, or use the .h5 beside it"
        raise ImportError(f"{path}: reading a .pt file needs PyTorch; {cure}") from None
    features = arrays["features"].view(ml_dtypes.bfloat16) if facts["bfloat16"] else arrays["features"]
    return {"features": _rows(features)}


def _is_feature_table(path: Path) -> bool:
    """Whether a csv's header is SlideChat's: numbered columns and a patch name. Slide lists and logs have words."""
    with path.open("rb") as file:
        header = file.readline(1 << 20).decode("utf-8-sig", errors="replace").strip().split(",")
    return len(header) > 1 and all(re.search(r"\d$", cell) for cell in header[:-1])


def _read_csv(path: Path) -> dict:
    """SlideChat: a header, one float column a feature, and a last column with the patch's name, `x_y`."""
    features, coords = [], []
    expected = "expected SlideChat's table: numbers and a last column x_y"
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = iter(lambda: file.readline(LONGEST_LINE + 1), "")
            columns = len(_row(next(lines, "")))
            if columns < 2:
                raise ValueError(f"{path}: a header of {columns} columns; {expected}")
            for number, line in enumerate(lines, 2):
                row, place = _row(line), f"{path}: line {number}"
                if len(row) != columns:
                    found = f"{len(row)} columns, the header has {columns}"
                    raise ValueError(f"{place}: {found}; a cut-off or foreign file, write it again")
                try:
                    features.append(np.array(row[:-1], np.float32))
                    x, y = (int(digits) for digits in re.findall(r"\d+", re.sub(r"\.\w+$", "", row[-1]))[-2:])
                    coords.append(np.array((x, y), np.int32))
                except (ValueError, OverflowError):
                    raise ValueError(f"{place}: ends in {row[-1]!r:.60}; {expected}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a csv table ({error}); {expected}") from None
    coords = np.array(coords, np.int32).reshape(-1, 2)
    return {"features": np.array(features, np.float32).reshape(-1, columns - 1), "coords": coords}


def _row(line: str) -> list[str]:
    """The fields of a line; no row goes on over several. Raises csv.Error for one beyond all measure."""
    if len(line) > LONGEST_LINE:
        raise csv.Error(f"a line of more than {LONGEST_LINE / 1e6:.0f} million characters")
    return next(csv.reader([line]), [])


def _patch_size_from_gaps(coords: Int[np.ndarray, "N 2"]) -> int:
    """The commonest gap between neighbours of a row or column: the patches' edge, when they do not overlap.

    The commonest, not the smallest: the rows of two tissue pieces are seldom in step.
    """
    gaps = []
    for axis in (0, 1):
        order = np.lexsort((coords[:, axis], coords[:, 1 - axis]))
        steps = np.diff(coords[order].astype(np.int64), axis=0)
        gaps.append(steps[steps[:, 1 - axis] == 0, axis])
    sizes, counts = np.unique(np.concatenate(gaps), return_counts=True)
    sizes, counts = sizes[sizes > 0], counts[sizes > 0]
    if not len(sizes):
        found = f"{len(coords)} patches, no two of them side by side"
        raise ValueError(f"the patch size is not in the file, nor to be told from {found}; pass patch_size")
    return int(sizes[np.argmax(counts)])

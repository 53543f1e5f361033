"""Patch features of a slide, and the readers of the feature files that labs already have.

One `SlideFeatures` comes out of CLAM, TRIDENT, SlideChat and STAMP files alike. Files are sniffed: what they hold
decides, their extension only says which parser to try.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import Float, Int

FEATURE_SUFFIXES = (".h5", ".hdf5", ".pt", ".csv")
# Nominal micrometres per pixel of a scan at 1x; scanners differ from it by some percent.
UM_TIMES_MAGNIFICATION = 10.0
# Folders that lie beside features and hold none: coordinates, masks, pictures.
NOT_FEATURES = {"patches", "masks", "stitches", "thumbnails", "contours", "visualization"}


@dataclass(frozen=True)
class SlideFeatures:
    """The patches of one slide: features [N, F] and where each lies.

    `coords` [N, 2] are x, y of a patch's top-left corner in pixels at level 0, None where the file has none;
    `patch_size` is a patch's edge in the same pixels, `mpp` micrometres per pixel at level 0, `width` and `height` the
    slide's at level 0; 0 stands for unknown. Raises ValueError, naming the slide, for arrays that do not belong
    together, for no patches, and for features that are not finite.
    """

    slide_id: str
    features: Float[np.ndarray, "N F"]
    coords: Int[np.ndarray, "N 2"] | None = None
    case_id: str = ""
    patch_size: int = 0
    mpp: float = 0.0
    width: int = 0
    height: int = 0
    encoder: str = ""

    def __post_init__(self):
        features, coords = np.asarray(self.features), self.coords
        if features.ndim != 2 or not features.shape[1]:
            raise ValueError(f"slide {self.slide_id}: features have shape {features.shape}, expected [patches, width]")
        if not len(features):
            raise ValueError(f"slide {self.slide_id}: no tissue, 0 patches; leave the slide out")
        if coords is not None:
            coords = np.asarray(coords)
            if coords.shape != (len(features), 2):
                found = f"{len(features)} features and coords of shape {coords.shape}"
                raise ValueError(f"slide {self.slide_id}: {found}, expected one x, y per feature; extract it again")
            if not np.all(np.isfinite(coords)) or np.abs(coords).max() >= 2**31:
                raise ValueError(f"slide {self.slide_id}: coords are not pixels of a slide; extract it again")
            object.__setattr__(self, "coords", np.ascontiguousarray(coords, np.int32))
        bad = ~np.isfinite(features.astype(np.float32)).all(axis=1)
        if bad.any():
            rows = ", ".join(map(str, np.flatnonzero(bad)[:5]))
            found = f"{bad.sum()} of {len(features)} patches hold NaN or infinity (rows {rows})"
            raise ValueError(f"slide {self.slide_id}: {found}; extract the features again")
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "case_id", self.case_id or case_of(self.slide_id))

    def replace(self, **changes) -> "SlideFeatures":
        """A copy with some fields changed."""
        return replace(self, **changes)


def case_of(slide_id: str) -> str:
    """The patient a slide belongs to where nothing else says: TCGA's first 12 characters, else the slide itself."""
    return slide_id[:12] if slide_id.startswith("TCGA-") and len(slide_id) > 12 else slide_id


def find_feature_files(folder: Path | str) -> list[Path]:
    """The feature files below a folder of any of these tools, in order.

    A CLAM folder holds every slide twice, as .h5 and .pt: the .h5 are taken, they have the coordinates. Raises
    FileNotFoundError where there is no feature file at all.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; name the folder that holds the feature files")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in FEATURE_SUFFIXES and path.is_file()]
    found = [path for path in found if not NOT_FEATURES.intersection(path.relative_to(folder).parts[:-1])]
    with_coords = {path.stem for path in found if path.suffix.lower() != ".pt"}
    found = [path for path in found if path.suffix.lower() != ".pt" or path.stem not in with_coords]
    if not found:
        raise FileNotFoundError(f"{folder}: no feature files ({', '.join(FEATURE_SUFFIXES)}) found in it or below")
    return found


def read_features(
    path: Path | str,
    *,
    slide_id: str = "",
    case_id: str = "",
    patch_size: int | None = None,
    mpp: float | None = None,
    encoder: str | None = None,
) -> SlideFeatures:
    """Read a feature file of CLAM, TRIDENT, SlideChat or STAMP.

    `patch_size` (level-0 pixels), `mpp` and `encoder` fill in what the file does not say. Raises OSError or
    ValueError with the file, what was found and the cure.
    """
    path = Path(path)
    given = {"patch_size": patch_size or 0, "mpp": mpp or 0.0, "encoder": encoder or ""}
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if suffix in (".h5", ".hdf5"):
        fields = _read_h5(path, given)
    elif suffix == ".pt":
        fields = _read_pt(path)
    elif suffix == ".csv":
        fields = _read_csv(path)
    else:
        raise ValueError(f"{path}: not a feature file; expected one of {', '.join(FEATURE_SUFFIXES)}")
    fields = {name: value for name, value in given.items() if value} | {k: v for k, v in fields.items() if _known(v)}
    coords = fields.get("coords")
    if coords is not None and not fields.get("patch_size"):
        fields["patch_size"] = _patch_size_from_gaps(coords)
    try:
        return SlideFeatures(slide_id=slide_id or path.stem, case_id=case_id, **fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _known(value) -> bool:
    return value is not None and not (isinstance(value, (int, float, str)) and not value)


def _read_h5(path: Path, given: dict) -> dict:
    try:
        with h5py.File(path, "r") as file:
            if "feats" in file:
                return _read_stamp(path, file, given)
            if "features" not in file:
                kind = "coordinates only: point at the features made from them" if "coords" in file else "another kind"
                raise ValueError(f"{path}: holds {sorted(file)} and no 'features'; it is a file of {kind}")
            fields = {"features": _rows(file["features"][()])}
            encoder = _text(file["features"].attrs.get("encoder"))
            if encoder and encoder != "None":
                fields["encoder"] = encoder
            if "coords" in file:
                fields["coords"] = _rows(file["coords"][()])
                fields |= _grid_attributes(file["coords"].attrs)
            fields |= {} if "patch_size" in fields else _sibling_attributes(path)
            return fields
    except (OSError, RuntimeError, KeyError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise OSError(f"{path}: not a whole HDF5 file ({error}); copy or extract it again") from None


def _rows(array: np.ndarray) -> np.ndarray:
    """TRIDENT and CLAM sometimes keep a leading axis of one, and write empty slides as a flat array."""
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    return array.reshape(0, 2) if array.size == 0 and array.ndim == 1 else array


def _text(value) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)


def _grid_attributes(attributes) -> dict:
    """Patch size, mpp and slide size out of the attributes that TRIDENT or CLAM put on `coords`.

    Some versions store them as floats. CLAM's `patch_size` counts pixels of `patch_level`.
    """
    fields = {}

    def whole(name):
        return int(round(float(np.ravel(attributes[name])[0])))

    if "patch_size_level0" in attributes:
        fields["patch_size"] = whole("patch_size_level0")
    elif "patch_size" in attributes:
        downsample = float(np.ravel(attributes["downsample"])[0]) if "downsample" in attributes else 1.0
        if "target_magnification" in attributes and "level0_magnification" in attributes:
            downsample = float(attributes["level0_magnification"]) / float(attributes["target_magnification"])
        fields["patch_size"] = int(round(whole("patch_size") * downsample))
    if attributes.get("level0_magnification"):
        fields["mpp"] = UM_TIMES_MAGNIFICATION / float(attributes["level0_magnification"])
    if "level0_width" in attributes and "level0_height" in attributes:
        fields |= {"width": whole("level0_width"), "height": whole("level0_height")}
    elif whole("patch_level") == 0 if "patch_level" in attributes else False:
        fields |= dict(zip(("width", "height"), map(int, attributes.get("level_dim", ())), strict=False))
    return fields


def _sibling_attributes(path: Path) -> dict:
    """What the `patches/` folder beside a feature folder says of this slide (CLAM `X.h5`, TRIDENT `X_patches.h5`)."""
    for parent in path.parents[1:3]:
        for name in (f"{path.stem}.h5", f"{path.stem}_patches.h5"):
            sibling = parent / "patches" / name
            if sibling.is_file():
                with h5py.File(sibling, "r") as file:
                    return _grid_attributes(file["coords"].attrs) if "coords" in file else {}
    return {}


def _read_stamp(path: Path, file: h5py.File, given: dict) -> dict:
    fields = {"features": _rows(file["feats"][()]), "encoder": _text(file.attrs.get("extractor"))}
    if "coords" not in file:
        return fields
    mpp = given["mpp"]
    tile_um, tile_px = float(file.attrs.get("tile_size_um", 0)), float(file.attrs.get("tile_size_px", 0))
    if not mpp:
        found = f"coordinates in micrometres (tiles of {tile_um:g} um, {tile_px:g} px)"
        raise ValueError(f"{path}: STAMP file with {found} and no level-0 mpp; pass it with --mpp, such as --mpp 0.25")
    fields["coords"] = np.round(_rows(file["coords"][()]).astype(np.float64) / mpp)
    return fields | {"mpp": mpp, "patch_size": int(round(tile_um / mpp))}


def _read_pt(path: Path) -> dict:
    """CLAM's .pt: the tensor alone. Never unpickles code."""
    try:
        import torch
    except ImportError:
        raise ImportError(f"{path}: reading .pt files needs torch; `pip install pathflip-jax[torch]`") from None
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for every way of being broken
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a tensor that can be read without running code ({reason})") from None
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{path}: holds a {type(tensor).__name__}, expected one tensor [patches, width]")
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return {"features": _rows(tensor.numpy())}


def _read_csv(path: Path) -> dict:
    """SlideChat: a header, one float column a feature, and a last column with the patch's name, `x_y`."""
    features, coords = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if len(header) < 2:
                raise ValueError(f"{path}: its header has {len(header)} columns, expected features and a patch name")
            for row in rows:
                if len(row) != len(header):
                    raise ValueError(f"{path}:{rows.line_num}: {len(row)} columns, expected {len(header)}")
                features.append(np.array(row[:-1], np.float32))
                x, y = Path(row[-1]).stem.split("_")[-2:]
                coords.append((int(x), int(y)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        found = f"line {len(features) + 2} is not numbers and a patch name x_y ({error})"
        raise ValueError(f"{path}: {found}; expected a SlideChat feature table") from None
    if not features:
        raise ValueError(f"{path}: no tissue, a header and no patches; leave the slide out")
    return {"features": np.stack(features), "coords": np.array(coords)}


def _patch_size_from_gaps(coords: np.ndarray) -> int:
    """The smallest gap between neighbouring patches: their edge, when they do not overlap; 0 where there is none."""

    def gaps() -> Iterator[int]:
        for axis in (0, 1):
            steps = np.diff(np.unique(coords[:, axis]))
            if len(steps):
                yield int(round(steps.min()))

    return min(gaps(), default=0)

"""HDF5 feature files in the formats of tools, and hostile ones: unusual types, decompression bombs, external links."""

import io
import random
from functools import cache

import h5py
import mutations
import numpy as np

ROWS = 12
COORDS = np.stack(np.meshgrid(np.arange(4), np.arange(3)), -1).reshape(-1, 2) * 256


@cache
def features() -> np.ndarray:
    """Features [ROWS, 4] of the slide used throughout."""
    return np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)


TRIDENT = {
    "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40, "target_magnification": 20, "overlap": 128,
    "level0_width": 4000, "level0_height": 5000, "name": "x",
}  # fmt: skip
CLAM = {"patch_size": 256, "patch_level": 1, "downsample": [4.0, 4.0], "level_dim": [1000, 1250], "name": "x"}
STAMP = {"unit": "um", "tile_size_um": 256.0, "tile_size_px": 224, "extractor": "ctranspath"}


def write_h5(kind: str, rng: random.Random | None = None, **how) -> bytes:
    """An h5 feature file in the format of a tool; with `rng`, one whose attributes, types and shapes no tool writes."""
    out = io.BytesIO()
    with h5py.File(out, "w", libver=rng.choice((None, "latest")) if rng else None) as file:
        patches, coords = features(), COORDS.astype(np.float32 if kind == "stamp" else np.int64)
        if rng is not None and rng.random() < 0.5:
            patches, coords = rng.choice(((_strange(rng), coords), (patches, _strange(rng))))
        arrays = {"feats" if kind == "stamp" else "features": patches, "coords": coords}
        if kind == "patches":
            arrays = {"coords": coords}
        if kind == "atlas":
            sound = np.shape(coords) == (ROWS, 2)
            rows = np.concatenate([coords, np.tile([512, 512, 0], (ROWS, 1))], axis=1) if sound else coords
            arrays = {"features/uni_v1": patches, "coords": rows}
        for name, array in arrays.items():
            chunked = np.ndim(array) == 2 and array.shape[0] >= 4 and array.shape[1] >= 2
            file.create_dataset(name, data=array, **(how if chunked else {}))
        attributes = {"clam": CLAM, "patches": CLAM, "trident": TRIDENT, "stamp": STAMP, "atlas": TRIDENT}[kind]
        place = file if kind in ("stamp", "atlas") else file["coords"]
        for name, value in attributes.items():
            if rng is not None and rng.random() < 0.3:
                value = rng.choice((*mutations.VALUES, np.zeros(1000), np.zeros(0), [b"x", b"y"], h5py.Empty("f4")))
            try:
                place.attrs[name] = value
            except (TypeError, ValueError, OverflowError):  # HDF5 cannot store this value
                place.attrs[name] = str(value).encode("utf-8", "replace").replace(b"\x00", b"")
        if rng is not None and rng.random() < 0.2:
            _bomb(rng, file)
    return out.getvalue()


def _strange(rng: random.Random):
    values = [np.zeros(shape, "f4") for shape in ((0,), (5,), (0, 4), (ROWS, 0), (1, ROWS, 4), (2, 2, 2, 2), ())]
    values += [features().astype(t) for t in ("f8", ">f4", "i1", "u8", "c8", "f2", "S4", "?")]
    values += [features() * np.float32(factor) for factor in (np.inf, np.nan, 1e38, 0)]
    values += [np.array([b"x", b"y"]), np.array([("a", 1.0)], dtype="S1,f4"), COORDS * 2.0**40, -COORDS]
    with np.errstate(invalid="ignore"):
        return rng.choice(values)


def _bomb(rng: random.Random, file: h5py.File) -> None:
    """Replace an array by one with a huge declared size, huge expansion, or external storage."""
    name = rng.choice(list(file))
    attributes = dict(file[name].attrs)
    del file[name]
    draw = rng.randrange(6)
    if draw == 0:
        file.create_dataset(name, (rng.choice((10**6, 10**9, 10**12)), 4), "f4", chunks=(1024, 4))
    elif draw == 1:
        file.create_dataset(name, data=np.zeros((500_000, 8), "f4"), chunks=(500_000, 8), compression="gzip")
    elif draw == 2:
        file.create_dataset(name, (10**10, 4), "f4")
    elif draw == 3:
        file[name] = h5py.ExternalLink("/etc/passwd", "features")
    elif draw == 4:
        file.create_dataset(name, (100, 4), "u1", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])
    else:
        file[name] = h5py.SoftLink(f"/{name}")
    if draw < 3:
        file[name].attrs.update(attributes)

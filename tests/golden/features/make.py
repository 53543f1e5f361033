"""Feature files written by the code of other tools, for `tests/data/readers/test_tools.py`; README.md has the commands.

    python make.py TOOL FOLDER [SOURCE ...]

SOURCE are folders of unpacked wheels, of tools that are not installed: their writers need few of the packages that the
tools import, and those that are missing are stubs here (`Stubs`).
Each slide has 24 tiles in a grid of 6 x 4; element j of the features of tile i is sin(i * (1 + j)).
"""

import importlib.abc
import importlib.machinery
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np

TILES, EDGE = 24, 512
CELLS = np.array([(i % 6, i // 6) for i in range(TILES)])


def features(width: int) -> np.ndarray:
    """Features [tiles, width]."""
    return np.sin(np.arange(TILES)[:, None] * (1 + np.arange(width)[None])).astype(np.float32)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stubs of packages that a tool imports and that are not installed; other packages' imports fail as usual."""

    def __init__(self, tools):
        self._stubbed = set()
        self._tools = tools

    def find_spec(self, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__", "").startswith("importlib"):
            frame = frame.f_back
        package = name.partition(".")[0]
        importer = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in self._stubbed and (importer not in self._tools or package in self._tools):
            return None
        self._stubbed.add(package)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module

    def exec_module(self, module):
        pass


def atlaspatch(folder: Path) -> None:
    """AtlasPatch 1.1.0: `H5PatchWriter.write_coords` and `append_features`, of two encoders for S1, of one for S2."""
    from atlas_patch.services.storage import H5PatchWriter

    def entries(with_patches: bool):
        for i, (x, y) in enumerate((CELLS * EDGE).tolist()):
            yield x, y, EDGE, EDGE, 0, np.full((4, 4, 3), i, np.uint8) if with_patches else None

    (folder / "patches").mkdir(parents=True, exist_ok=True)
    for slide, encoders in (("S1", {"uni_v1": 8, "conch_v15": 6}), ("S2", {"uni_v1": 8})):
        path = folder / "patches" / f"{slide}.h5"
        writer = H5PatchWriter(
            chunk_rows=16, patch_size=256, patch_size_level0=EDGE, level0_mag=40, target_mag=20,
            level0_wh=(4000, 3000), overlap=0, slide_stem=slide, wsi_path=f"slides/{slide}.svs",
            extra_file_attrs={"mpp": 0.2527, "magnification": 40, "vendor": "aperio"},
        )  # fmt: skip
        writer.write_coords(path, entries(False), batch=16)
        for encoder, width in encoders.items():
            writer.append_features(
                output_path=path, entries=entries(True), feature_name=encoder, feature_batch=16, expected_total=TILES,
                feature_fn=lambda batch, width=width: features(width)[[patch[0, 0, 0] for patch in batch]],
                feature_attrs={"embedding_dim": width},
            )  # fmt: skip


def slideflow(folder: Path) -> None:
    """slideflow 3.0.2: `DatasetFeatures.to_torch`, with locations that are centres, as `tile_worker` computes them."""
    from slideflow.model.features import DatasetFeatures

    bags = SimpleNamespace(
        slides=["S1"],
        activations={"S1": features(8)},
        locations={"S1": CELLS * EDGE + EDGE // 2},
        dump_config=lambda: {
            "extractor": {"class": "slideflow.model.extractors.virchow.VirchowFeatures", "kwargs": {}},
            "normalizer": None, "num_features": 8, "tile_px": 256, "tile_um": 128,
        },
    )  # fmt: skip
    DatasetFeatures.to_torch(bags, str(folder), verbose=False)


def slide2vec(folder: Path) -> None:
    """slide2vec 7.1.4, `write_tile_embeddings` as .pt and as .npz, and hs2p 6.1.0, `save_tiling_result`."""
    from hs2p.tiling import io
    from slide2vec.artifacts import write_tile_embeddings

    for slide, form in (("S1", "pt"), ("S2", "npz")):
        metadata = {
            "encoder_name": "uni2", "encoder_level": "tile", "tile_size_lv0": EDGE,
            "coordinates_npz_path": f"/run/tiles/{slide}.coordinates.npz",
            "coordinates_meta_path": f"/run/tiles/{slide}.coordinates.meta.json",
        }  # fmt: skip
        rows = np.arange(TILES) if form == "npz" else None
        write_tile_embeddings(
            slide, features(8), output_dir=folder, output_format=form, metadata=metadata, tile_index=rows
        )
        _hs2p_tiles(io, folder / "tiles", slide)


def _hs2p_tiles(io, folder: Path, slide: str) -> None:
    unknown = dict.fromkeys((name for name in io._build_tiling_metadata.__code__.co_names if name.isidentifier()), None)
    order = np.lexsort((CELLS[:, 1], CELLS[:, 0]))  # hs2p orders tiles by x, then y
    stated = {
        "sample_id": slide, "image_path": f"/slides/{slide}.svs", "slide_dimensions": [4000, 3000],
        "base_spacing_um": 0.25, "level_downsamples": [1.0], "tile_size_lv0": EDGE, "step_px_lv0": EDGE,
        "requested_tile_size_px": 256, "requested_spacing_um": 0.5, "read_level": 0, "overlap": 0.0,
        "x": CELLS[order, 0] * EDGE, "y": CELLS[order, 1] * EDGE, "tile_index": np.arange(TILES),
        "tissue_fractions": np.ones(TILES),
    }  # fmt: skip
    result = SimpleNamespace(**unknown | stated)
    result.tiles = result
    io.replace, io.canonicalize_tiling_result = (lambda found, **_: found), (lambda tiles: tiles)
    io._save_tiling_result(result, folder, slide)


def tiatoolbox1(folder: Path) -> None:
    """TIAToolbox 1.6.0: `DeepFeatureExtractor._process_predictions`, of patches of 224 px at its own resolution."""
    from tiatoolbox.models.engine.semantic_segmentor import DeepFeatureExtractor

    folder.mkdir(parents=True, exist_ok=True)
    bounds = np.concatenate([CELLS * 224, CELLS * 224 + 224], axis=1)
    batches = [([place], [[row]]) for place, row in zip(bounds, features(8), strict=True)]
    settings = SimpleNamespace(output_resolutions=[{"units": "mpp", "resolution": 0.5}])
    DeepFeatureExtractor._process_predictions(None, batches, None, settings, str(folder / "S1"), "")


def tiatoolbox(folder: Path) -> None:
    """TIAToolbox 2.1.3: `EngineABC.save_predictions_as_zarr`, as `DeepFeatureExtractor` calls it."""
    import dask.array as da
    from tiatoolbox.models.engine.engine_abc import EngineABC

    bounds = np.concatenate([CELLS * 224, CELLS * 224 + 224], axis=1)
    arrays = {"features": da.from_array(features(8)), "coordinates": da.from_array(bounds)}
    engine = SimpleNamespace(
        _get_tasks_for_saving_zarr=EngineABC._get_tasks_for_saving_zarr, num_workers=1, verbose=False,
        drop_keys=["predictions"],
    )  # fmt: skip
    EngineABC.save_predictions_as_zarr(engine, arrays, folder / "S1.zarr", list(arrays))


def lazyslide(folder: Path) -> None:
    """LazySlide 0.13.0 on a drawn slide: tissue, tiles and features of two functions, stored as Zarr 3 and as Zarr 2.

    `expected.npz` has the features and the bounds of the tiles as spatialdata, anndata and geopandas read them.
    """
    import lazyslide
    import spatialdata
    import tifffile
    from spatialdata._io.format import SpatialDataContainerFormatV01
    from wsidata import open_wsi

    folder.mkdir(parents=True, exist_ok=True)
    rng, expected = np.random.default_rng(0), {}
    y, x = np.mgrid[:900, :1300]
    picture = np.full((900, 1300, 3), 240, np.uint8)
    inside = ((y - 450) / 300) ** 2 + ((x - 650) / 500) ** 2 < 1
    picture[inside] = [190, 90, 160] + rng.integers(-30, 30, (inside.sum(), 3)) + (x[inside] // 30)[:, None]
    slide = folder / "S1.tiff"
    tifffile.imwrite(
        slide, picture, tile=(256, 256), photometric="rgb", resolution=(2e4, 2e4), resolutionunit="CENTIMETER",
        compression="zlib", metadata=None,
    )  # fmt: skip
    wsi = open_wsi(str(slide), store=None)
    lazyslide.pp.find_tissues(wsi)
    lazyslide.pp.tile_tissues(wsi, 64, mpp=1.0)
    for name, model in (
        ("colour", lambda batch: batch.float().mean((1, 2)) / 255),
        ("contrast", lambda batch: batch.float().std((1, 2)) / 255),
    ):
        lazyslide.tl.feature_extraction(wsi, model=model, model_name=name, num_workers=0, pbar=False, device="cpu")
    for form, options in (("zarr3", {}), ("zarr2", {"sdata_formats": SpatialDataContainerFormatV01()})):
        store = folder / form / "S1.zarr"
        wsi.write(store, **options)
        read = spatialdata.read_zarr(store)
        for name in ("colour", "contrast"):
            expected[name] = np.asarray(read.tables[f"{name}_tiles"].X)
        expected["bounds"] = read.shapes["tiles"].bounds.to_numpy()
        shutil.make_archive(str(folder / form), "zip", folder / form)
        shutil.rmtree(folder / form)
    slide.unlink()
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    tool, folder, *sources = sys.argv[1:]
    sys.path[:0] = sources
    sys.meta_path.append(Stubs({path.name for source in sources for path in Path(source).iterdir()}))
    writers = {
        writer.__name__: writer for writer in (atlaspatch, slideflow, slide2vec, tiatoolbox1, tiatoolbox, lazyslide)
    }
    writers[tool](Path(folder))

"""Slides of any kind read for a run: encoded its way, once, and kept in the cache."""

import json
import logging
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import tifffile

import pathflip_jax
from data_prep.build import prepare
from data_prep.settings import PrepareSettings
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.records.records import Records
from pathflip_jax.inference.reading import ReadingSettings, SlideReader
from pathflip_jax.inference.sources import SlideSource

PINK, GLASS = (200, 120, 180), (240, 240, 242)


def write_slide(path, seed=0, mpp=0.5, edge=448):
    pixels = np.empty((edge, edge, 3), np.int16)
    pixels[:] = GLASS
    pixels[64:400, 64:400] = PINK
    pixels += np.random.default_rng(seed).integers(-20, 20, pixels.shape, np.int16)
    tifffile.imwrite(
        path, np.clip(pixels, 0, 255).astype(np.uint8), photometric="rgb", tile=(128, 128), compression="deflate",
        resolution=(1e4 / mpp,) * 2, resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def predictor():
    return pathflip_jax.load("colon-biopsy")


@pytest.fixture
def reader(predictor, tmp_path):
    return SlideReader(predictor, ReadingSettings(cache=tmp_path / "cache", workers=1))


def read(reader, place, on_progress=None):
    (source,) = reader.find(place).slides
    return reader.read(source, on_progress)


def entries(reader):
    return sorted(path for path in reader.cache.folder.iterdir() if path.is_dir())


def test_a_slide_is_encoded_as_prepare_would_and_only_once(reader, predictor, tmp_path, monkeypatch):
    slide = write_slide(tmp_path / "S1.tiff")
    seen = []
    found = read(reader, slide, lambda *progress: seen.append(progress))
    prepare(slide, tmp_path / "records", PrepareSettings(patch_size=112, mpp=0.5, workers=1))
    expected = Records(tmp_path / "records").read(0)
    np.testing.assert_array_equal(found.features, expected.features)
    np.testing.assert_array_equal(found.coords, expected.coords)
    assert found.recipe == expected.recipe and (found.slide_id, found.mpp) == ("S1", expected.mpp)
    assert seen and seen[-1] == ("S1", len(found.features), len(found.features))
    again = SlideReader(predictor, reader.settings)
    monkeypatch.setattr(again._encoder, "encode", lambda *_: pytest.fail("encoded a second time"))
    np.testing.assert_array_equal(read(again, slide).features, found.features)


def test_the_run_reads_any_source(predictor, tmp_path):
    slide, cache = write_slide(tmp_path / "S1.tiff"), tmp_path / "cache"
    features = predictor.read(slide, cache=cache, workers=1)
    (entry,) = (path for path in cache.iterdir() if path.is_dir())
    assert (predictor.read(entry).features == features.features).all()
    with h5py.File(tmp_path / "S2.h5", "w") as file:
        file["features"], file["coords"] = features.features, features.coords
    assert predictor.read(tmp_path / "S2.h5", patch_size=112, mpp=0.5).patch_size == 112
    assert predictor.read(tmp_path, "S1", cache=cache, patch_size=112).slide_id == "S1"


def test_a_changed_slide_is_encoded_again(reader, tmp_path):
    slide = write_slide(tmp_path / "S1.tiff")
    first = read(reader, slide)
    stamp = slide.stat()
    write_slide(slide, seed=1)
    os.utime(slide, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # only its bytes differ
    assert (read(reader, slide).features != first.features).any() and len(entries(reader)) == 2


@pytest.mark.parametrize("damage", ["byte", "recipe", "facts", "shard"])
def test_a_damaged_entry_is_encoded_again_with_a_warning(reader, tmp_path, caplog, damage):
    slide = write_slide(tmp_path / "S1.tiff")
    first = read(reader, slide)
    (entry,) = entries(reader)
    if damage == "byte":
        data = bytearray((entry / "pathflip-00000.tfrecord").read_bytes())
        data[len(data) // 2] ^= 1
        (entry / "pathflip-00000.tfrecord").write_bytes(data)
    elif damage == "recipe":
        recipe = json.loads((entry / "encoder.json").read_text())
        (entry / "encoder.json").write_text(json.dumps(recipe | {"encoder_version": "0"}))
    elif damage == "facts":
        (entry / "source.json").write_text("{}")
    else:
        (entry / "pathflip-00000.tfrecord").unlink()
    with caplog.at_level(logging.WARNING):
        again = read(reader, slide)
    assert (again.features == first.features).all() and "the slide is encoded again" in caplog.text


def test_a_bad_slide_leaves_nothing_and_the_others_go_on(reader, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    write_slide(folder / "S1.tiff")
    (folder / "S2.tiff").write_bytes(b"II*\0 but no slide")
    tifffile.imwrite(folder / "S3.tiff", np.full((448, 448, 3), 240, np.uint8), photometric="rgb", tile=(128, 128))
    failed = []
    found = [slide.slide_id for _, slide in reader.read_each(reader.find(folder).slides, failed)]
    assert found == ["S1"] and sorted(failure.slide for failure in failed) == ["S2", "S3"]
    assert [path.name.partition("-")[0] for path in entries(reader)] == ["S1"]


def test_two_readers_share_one_encoding(predictor, tmp_path, caplog):
    slide = write_slide(tmp_path / "S1.tiff", edge=900)
    readers = [SlideReader(predictor, ReadingSettings(cache=tmp_path / "cache", workers=1)) for _ in range(2)]
    encoded, run = [], type(readers[0]._encoder).encode

    def count(self, tasks, on_progress=None):
        encoded.append(len(tasks))
        time.sleep(0.3)  # the other one arrives meanwhile
        return run(self, tasks, on_progress)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(type(readers[0]._encoder), "encode", count)
        one, two = pool.map(lambda own: read(own, slide), readers)
    assert encoded == [1] and (one.features == two.features).all()


def test_the_cache_keeps_to_its_size_and_to_what_is_in_use(predictor, tmp_path, caplog):
    slides = [write_slide(tmp_path / f"S{number}.tiff", seed=number) for number in range(3)]
    reader = SlideReader(predictor, ReadingSettings(cache=tmp_path / "cache", cache_bytes=1e9, workers=1))
    for number, slide in enumerate(slides[:2]):
        read(reader, slide)
        os.utime(entries(reader)[number], (number, number))
    size = sum(path.stat().st_size for path in entries(reader)[0].rglob("*") if path.is_file())
    read(reader, slides[0])  # used now: S1 is the older one
    small = SlideReader(predictor, ReadingSettings(cache=tmp_path / "cache", cache_bytes=2.5 * size, workers=1))
    read(small, slides[2])
    assert [path.name.partition("-")[0] for path in entries(reader)] == ["S0", "S2"]
    tiny = SlideReader(predictor, ReadingSettings(cache=tmp_path / "cache", cache_bytes=1.0, workers=1))
    read(tiny, slides[1])
    assert [path.name.partition("-")[0] for path in entries(reader)] == ["S1"] and "raise --cache-size" in caplog.text


def test_folders_that_are_no_cache_are_refused(predictor, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match=r"not a cache of encoded slides, it holds 'mine\.txt'; pass --cache with"):
        read(SlideReader(predictor, ReadingSettings(cache=tmp_path)), write_slide(tmp_path / "S1.tiff"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        read(SlideReader(predictor, ReadingSettings(cache=tmp_path / "file")), tmp_path / "S1.tiff")


def test_records_of_slides_and_feature_files_together(reader, predictor, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    features = read(reader, write_slide(folder / "S1.tiff"))
    with h5py.File(folder / "S2.h5", "w") as file:
        file["features"], file["coords"] = features.features, features.coords
        file["coords"].attrs.update(patch_size=112, patch_level=0, downsample=(1.0, 1.0))
    (folder / "S3.h5").write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    prepare(write_slide(tmp_path / "S4.tiff"), folder / "own", PrepareSettings(patch_size=112, mpp=0.5, workers=1))
    failed = []
    records = reader.records(reader.find(folder).slides, failed)
    assert sorted(records.slides.column("slide_id")) == ["S1", "S2", "S4"]
    assert [failure.slide for failure in failed] == ["S3"]
    read_again = records.read(records.position("S2"))
    assert (np.sort(read_again.features, 0) == np.sort(features.features, 0)).all()


def test_an_abandoned_entry_is_removed(reader, tmp_path):
    left = reader.cache.folder / "S9-0123.part"
    left.mkdir()
    os.utime(left, (0, 0))
    read(reader, write_slide(tmp_path / "S1.tiff"))
    assert not left.exists()


def test_a_locked_entry_is_not_removed(reader, tmp_path):
    read(reader, write_slide(tmp_path / "S1.tiff"))
    entry = reader._entry(reader.find(tmp_path / "S1.tiff").slides[0])
    holds, over = threading.Event(), threading.Event()

    def hold():
        with entry.locked():
            holds.set()
            over.wait(10)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        holds.wait(10)
        reader.cache.capacity = 0
        reader.cache.trim()
        over.set()
    assert entry.folder.exists()
    shutil.rmtree(entry.folder)


def test_an_entry_that_another_process_removes_is_made_again(reader, tmp_path, monkeypatch):
    slide = write_slide(tmp_path / "S1.tiff")
    encode, made = SlideReader.encode, []

    def encode_and_lose(self, sources, on_progress=None):
        for found in encode(self, sources, on_progress):
            made.append(found.folder)
            if len(made) == 1:
                shutil.rmtree(found.folder)
            yield found

    monkeypatch.setattr(SlideReader, "encode", encode_and_lose)
    assert len(read(reader, slide).features) and len(made) == 2


def test_features_of_another_encoder_are_left_out_of_the_records(reader, tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    write_slide(folder / "S1.tiff")
    with h5py.File(folder / "S2.h5", "w") as file:
        file["features"], file["coords"] = np.ones((2, 512), np.float32), np.array([[0, 0], [112, 0]])
        file["coords"].attrs.update(patch_size=112, patch_level=0, downsample=(1.0, 1.0))
    failed = []
    assert len(reader.records(reader.find(folder).slides, failed)) == 1
    assert "512 wide, colon-biopsy was trained on 175" in failed[0].error
    assert not list(reader.cache.folder.glob("*.part"))


def test_other_weights_without_a_hash_in_the_run_are_another_entry(tmp_path, small_encoder):
    recipe, weights = small_encoder
    slide = SlideSource("S1", write_slide(tmp_path / "S1.tiff"), None)
    run = SimpleNamespace(name="run", encoder=recipe.name, recipe=FeatureRecipe(patch_size=48, mpp=0.5))
    keys = set()
    for name in ("model.safetensors", "other.safetensors"):
        path = weights / name
        path.write_bytes(path.read_bytes() if path.exists() else b"other")
        reader = SlideReader(run, ReadingSettings(cache=tmp_path / "cache", weights=path))
        keys.add(reader._entry(slide).folder)
    assert len(keys) == 2


def test_a_network_on_the_devices_encodes_as_prepare_does(tmp_path, small_encoder):
    recipe, weights = small_encoder
    slide = write_slide(tmp_path / "S1.tiff")
    prepare(slide, tmp_path / "records", PrepareSettings(encoder=recipe.name, weights=weights, workers=1))
    expected = Records(tmp_path / "records")
    run = SimpleNamespace(name="run", encoder=recipe.name, recipe=expected.recipe, check_records=lambda records: None)
    reader = SlideReader(run, ReadingSettings(cache=tmp_path / "cache", weights=weights, workers=1))
    seen = []
    found = read(reader, slide, lambda *progress: seen.append(progress))
    np.testing.assert_array_equal(found.features, expected.read(0).features)
    assert seen[-1] == ("S1", len(found.features), len(found.features))
    wrong = FeatureRecipe(**{**expected.recipe.to_dict(), "weights": "0" * 64})
    other = SimpleNamespace(name="run", encoder=recipe.name, recipe=wrong, check_records=lambda records: None)
    with pytest.raises(ValueError, match="its features are not those that the run was trained on.*--weights"):
        read(SlideReader(other, reader.settings), slide)

"""A viewer of a tiny cohort: records of 24 slides, six of them with a slide file, and a random model."""

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
from flax import nnx
from PIL import Image

from data_prep.slide_encoder import Encoded
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.inference.load import load
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs.folder import save_run
from pathflip_jax.viewer import grounder
from pathflip_jax.viewer.grounder import Grounder
from pathflip_jax.viewer.pictures import Pictures
from pathflip_jax.viewer.search import Search
from pathflip_jax.viewer.session import Session
from pathflip_jax.viewer.slides import list_slides

CONFIG = PathFLIPConfig(
    feature_dim=16, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2, vocab_size=200,
    max_positions=128, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
)  # fmt: skip
WITH_FILE = [f"S{number:02d}" for number in range(6)]


@pytest.fixture(scope="session")
def write_slide():
    """Writes a tiled pyramid of two levels, smooth colours, 0.5 um per pixel."""

    def write(path, seed: int = 0, size=(320, 384)) -> None:
        small = np.random.default_rng(seed).integers(90, 250, (10, 12, 3), np.uint8)
        level = np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))
        resolution = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
        with tifffile.TiffWriter(path) as writer:
            writer.write(level, tile=(128, 128), photometric="rgb", compression="jpeg", **resolution)
            writer.write(level[::2, ::2], tile=(128, 128), photometric="rgb", compression="jpeg", subfiletype=1)

    return write


@pytest.fixture(scope="session")
def pixels():
    """Turns a JPEG into an array [h, w, 3]."""
    return lambda jpeg: np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), float)


@pytest.fixture(scope="session")
def run_folder(tiny_cohort, tmp_path_factory):
    data = {"encoder": "tiny", "cut": "grid", "edge_um": 64.0, "edge_px": None, "caption_length": 96}
    folder = tmp_path_factory.mktemp("viewer") / "run"
    save_run(folder, PathFLIP(CONFIG, nnx.Rngs(0)), {"data": data}, TextTokenizer(tiny_cohort.vocabulary))
    return folder


@pytest.fixture(scope="session")
def predictor(run_folder):
    return load(run_folder)


@pytest.fixture
def slides_dir(tmp_path, write_slide):
    folder = tmp_path / "slides"
    folder.mkdir()
    for seed, name in enumerate(WITH_FILE):
        write_slide(folder / f"{name}.tiff", seed)
    return folder


@pytest.fixture
def session(slides_dir, tiny_cohort, predictor, monkeypatch):
    """Its maps are of method `region`: few programs to compile. `tests/inference/test_predictor.py` compares the
    others."""
    monkeypatch.setattr(grounder, "WARM_WORDS", 0)  # nobody waits here
    slides = list_slides(slides_dir, records=tiny_cohort.records)
    session = Session(slides, Pictures(readers=2), Grounder(predictor, "region"), Search(slides))
    yield session
    session.pictures.close()


class Encoder:
    """Reader of slides whose features are those of a tiny cohort; it goes on when it is allowed to."""

    def __init__(self, records: Path) -> None:
        self.records, self.begun, self.free = records, [], threading.Event()

    def encode(self, sources, on_progress):
        (source,) = sources
        self.begun.append(source.slide_id)
        on_progress(source.slide_id, 3, 12)
        assert self.free.wait(30)
        error = f"{source.image}: no tissue" if source.slide_id == "bad" else ""
        yield Encoded(source.slide_id, self.records, error)


@pytest.fixture
def encoder(tiny_cohort):
    found = Encoder(tiny_cohort.records)
    yield found
    found.free.set()

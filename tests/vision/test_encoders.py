"""All registered patch encoders against their original classes, with random weights: true width, two layers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import data

from pathflip_jax.convert.vision import LoadedEncoder, load_vision
from pathflip_jax.vision.recipes import RECIPES
from pathflip_jax.vision.transform import transformed
from pathflip_jax.vision.transformer import VisionTransformer

SCRIPT = Path(__file__).with_name("originals.py")
ORIGINALS = Path(sys.prefix) / "originals"  # `make setup-slow` installs timm and torchvision there
SIZES = (224, 256, 512)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"),
    pytest.mark.skipif(
        not all((ORIGINALS / name).is_dir() for name in ("timm", "torchvision")),
        reason=f"timm and torchvision are not in {ORIGINALS}; run `make setup-slow`",
    ),
]


class Encoder(NamedTuple):
    """Encoder with the weights of its original, and what that made of the patches."""

    loaded: LoadedEncoder
    weights: Path
    theirs: dict[str, np.ndarray]

    def features(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(features(self.loaded.network, images))


@partial(jax.jit, static_argnames="dtype")
@jax.default_matmul_precision("highest")
def features(network: VisionTransformer, images: np.ndarray, dtype=jnp.float32) -> jax.Array:
    return network(images, dtype)


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)


@pytest.fixture(scope="module")
def patches() -> dict[int, np.ndarray]:
    """Two cut-outs of a stained section, of each size."""
    image = np.tile(data.immunohistochemistry(), (2, 2, 1))
    return {size: np.stack([image[:size, :size], image[40 : 40 + size, 100 : 100 + size]]) for size in SIZES}


@pytest.fixture(scope="module")
def originals(patches, tmp_path_factory) -> Iterator[Path]:
    """Folder with the weights and features of all originals."""
    folder = tmp_path_factory.mktemp("originals")
    np.savez(folder / "patches.npz", **{str(size): every for size, every in patches.items()})
    environment = os.environ | {"PYTHONPATH": str(ORIGINALS), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, SCRIPT, folder, folder / "patches.npz"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    yield folder
    shutil.rmtree(folder)  # gigabytes


@pytest.fixture(scope="module", params=RECIPES)
def encoder(request, originals) -> Encoder:
    folder, recipe = originals / request.param, RECIPES[request.param]
    with np.load(folder / "features.npz") as file:
        theirs = dict(file)
    recipe = replace(recipe, network=replace(recipe.network, depth=2))
    return Encoder(load_vision(recipe, folder), folder, theirs)


def test_every_registered_encoder_has_its_original(originals):
    assert {path.name for path in originals.iterdir() if path.is_dir()} == set(RECIPES)


def test_features_are_those_of_the_original(encoder):
    theirs = encoder.theirs["224"]
    assert theirs.shape == (2, encoder.loaded.recipe.width)
    assert np.abs(theirs[0] - theirs[1]).max() > 0.01 * np.abs(theirs).max()
    ours = encoder.features(encoder.theirs["images"])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("size", SIZES)
def test_features_of_pixels_are_those_of_the_original(encoder, patches, size):
    theirs = encoder.theirs[str(size)]
    images = jax.jit(transformed, static_argnums=1)(patches[size], encoder.loaded.recipe.transform)
    assert cosines(encoder.features(images), theirs).min() >= 0.99999


def test_features_do_not_depend_on_the_batch(encoder):
    two = encoder.theirs["images"]  # their features differ: test_features_are_those_of_the_original
    five = encoder.features(two[[0, 1, 1, 0, 1]])
    fewer = np.concatenate([encoder.features(two), encoder.features(two[1:]), encoder.features(two)])
    np.testing.assert_allclose(five, fewer, rtol=0, atol=1e-5 * np.abs(five).max())


@pytest.mark.parametrize("encoder", ["kaiko_vits16", "uni_v2"], indirect=True)
def test_bfloat16_is_close(encoder):
    halved = load_vision(encoder.loaded.recipe, encoder.weights, jnp.bfloat16)
    ours = features(halved.network, encoder.theirs["images"], jnp.bfloat16)
    assert ours.dtype == jnp.float32 and halved.sha256 == encoder.loaded.sha256
    assert cosines(np.asarray(ours), encoder.theirs["224"]).min() >= 0.99

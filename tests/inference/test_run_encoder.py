"""Settings by which slides are encoded for a run, from what the run states."""

import logging
from types import SimpleNamespace

import pytest

from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.inference.run_encoder import settings_of_run


def settings(encoder="stain_texture", recipe=None, **more):
    return settings_of_run(SimpleNamespace(name="runs/base", encoder=encoder, recipe=recipe), **more)


def test_a_recipe_gives_patches_and_precision():
    found = settings("uni_v1", FeatureRecipe(encoder="uni_v1", patch_size=224, mpp=1.0, precision="bfloat16"))
    assert (found.encoder, found.patch_size, found.mpp, found.half) == ("uni_v1", 224, 1.0, True)
    assert settings(recipe=FeatureRecipe(patch_size=112, mpp=0.5, colours="srgb")).icc and not found.icc
    found = settings(recipe=FeatureRecipe(patch_size=112, mpp=0.5, precision="float32"), mpp=0.25, workers=1)
    assert (found.patch_size, found.mpp, found.assume_mpp, found.half, found.workers) == (112, 0.5, 0.25, False, 1)


def test_imported_features_give_the_edge_of_a_patch():
    found = settings("UNI2-h", FeatureRecipe(encoder="UNI2-h", patch_um=256 * 0.5))
    assert (found.encoder, found.patch_size, found.mpp) == ("uni_v2", 256, 0.5)
    found = settings("uni_v2", FeatureRecipe(patch_um=256.0))
    assert (found.patch_size, found.mpp) == (256, 1.0)
    assert settings(recipe=FeatureRecipe(patch_um=128.0)).mpp == 0.5


def test_a_run_without_patches_takes_the_published_ones_or_asks(caplog):
    with caplog.at_level(logging.WARNING):
        found = settings("uni_v1")
    assert (found.patch_size, found.mpp) == (256, 0.5) and "those of uni_v1 are assumed" in caplog.text
    with pytest.raises(ValueError, match=r"runs/base does not state the size of its patches; pass --patch-size and --"):
        settings()
    assert settings(patch_size=512, mpp=0.25).mpp == 0.5


def test_an_encoder_that_is_not_at_hand_is_named_with_the_way_out():
    with pytest.raises(ValueError, match="does not state the patch encoder.*pass the feature file"):
        settings("")
    with pytest.raises(ValueError, match="features of 'ctranspath', which is not among.*pass that file"):
        settings("ctranspath")

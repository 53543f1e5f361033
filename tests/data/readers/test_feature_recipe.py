"""Recipes of features: their facts, and the sentence that names what differs."""

import pytest

from pathflip_jax.data.readers.feature_recipe import FeatureRecipe, is_same_size, objection, patch_words

TRANSFORM = {"resize": 224, "crop": 224, "filter": "bilinear", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
UNI = {
    "encoder": "uni_v1", "weights": "12ab" * 16, "transform": TRANSFORM, "pooling": "class", "precision": "float32",
    "feature_dim": 1024, "patch_size": 256, "mpp": 0.5, "source": "prepare",
}  # fmt: skip


def test_a_recipe_knows_the_edge_of_its_patches():
    assert FeatureRecipe(patch_size=256, mpp=0.5).patch_um == 128
    assert FeatureRecipe(patch_um=112.0).patch_um == 112 and FeatureRecipe(patch_size=256).patch_um == 0


def test_only_known_facts_are_written_and_they_come_back():
    assert FeatureRecipe().to_dict() == {} and FeatureRecipe.from_dict({}) == FeatureRecipe()
    recipe = FeatureRecipe(**UNI)
    assert FeatureRecipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.to_dict()["transform"]["mean"] == [0.5, 0.5, 0.5]  # as JSON has it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "34cd" * 16}, "weights (12ab12ab12ab…, not 34cd34cd34cd…)"),
        ({"encoder": "virchow2", "feature_dim": 2560}, "encoder (uni_v1, not virchow2), width (1024, not 2560)"),
        ({"pooling": "mean"}, "pooling (class, not mean)"),
        ({"encoder_version": "2"}, ""),
        ({"transform": TRANSFORM | {"filter": "bicubic"}}, "filter of the transform (bilinear, not bicubic)"),
        ({"transform": {"mean": (0.5, 0.5, 0.4)}}, "mean of the transform (0.5 0.5 0.5, not 0.5 0.5 0.4)"),
        ({"transform": {"mean": (0.5, 0.5)}}, "mean of the transform (0.5 0.5 0.5, not 0.5 0.5)"),
        ({"transform": {"resize": 256}}, "resize of the transform (224, not 256)"),
        ({"patch_size": 224}, "patches (256 px at 0.5 um per px, not 224 px at 0.5 um per px)"),
        ({"patch_size": 512, "mpp": 0.25}, "patches (256 px at 0.5 um per px, not 512 px at 0.25 um per px)"),
        ({"mpp": 0.48}, "patches (256 px at 0.5 um per px, not 256 px at 0.48 um per px)"),
        ({"patch_size": 0, "mpp": 0.0, "patch_um": 112.0}, "patches (256 px at 0.5 um per px, not 112 um)"),
        ({"patch_size": 0, "mpp": 0.0, "patch_um": 118.0}, ""),  # a measured mpp
        ({"mpp": 0.0, "patch_size": 224}, "patches (256 px at 0.5 um per px, not 224 px)"),
        ({"precision": "bfloat16"}, ""),
        ({"source": "import"}, ""),
        ({"encoder": "", "weights": "", "transform": {}, "pooling": "", "feature_dim": 0}, ""),
        ({"transform": {"interpolation": "bicubic"}}, ""),
        ({"transform": {"mean": (0.50001, 0.5, 0.5)}}, ""),
    ],
)  # fmt: skip
def test_every_fact_that_differs_is_named(changes, message):
    one, other = FeatureRecipe(**UNI), FeatureRecipe(**UNI | changes)
    assert objection(one, other) == (f"they differ in {message}" if message else "")
    assert bool(objection(other, one)) == bool(message)


def test_colours_are_told_apart_from_those_of_folders_made_before():
    before, converted = FeatureRecipe(**UNI), FeatureRecipe(**UNI, colours="srgb")
    assert "colours" not in before.to_dict() and FeatureRecipe.from_dict(converted.to_dict()) == converted
    assert objection(before, converted) == "they differ in colours of the patches (as stored, not srgb)"
    assert objection(converted, FeatureRecipe(**UNI | {"source": "import"})) == ""  # another tool does not say
    assert objection(before, FeatureRecipe(**UNI, colours="as stored")) == ""
    with pytest.raises(ValueError, match="colours 'cmyk': expected srgb, as stored, or nothing for unknown"):
        FeatureRecipe(colours="cmyk")


def test_all_that_differs_stands_in_one_sentence():
    other = FeatureRecipe(**UNI | {"pooling": "mean", "patch_size": 224})
    said = objection(FeatureRecipe(**UNI), other)
    assert said.startswith("they differ in pooling (class, not mean), patches (256 px at 0.5 um")


def test_versions_of_an_encoder_without_weights_are_told_apart():
    one, other = (FeatureRecipe(encoder="stain_texture", encoder_version=version) for version in "12")
    assert objection(one, other) == "they differ in version of the encoder (1, not 2)"


def test_an_unknown_recipe_agrees_with_any():
    assert objection(None, FeatureRecipe(**UNI)) == objection(FeatureRecipe(**UNI), None) == objection(None, None) == ""


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"encoder": 3}, "encoder 3: expected a text"),
        ({"patch_size": 256.0}, "patch_size 256.0: expected a whole number"),
        ({"patch_size": True}, "patch_size True: expected a whole number"),
        ({"feature_dim": -1}, "feature_dim -1: expected a whole number"),
        ({"mpp": float("nan")}, "mpp nan: expected a number"),
        ({"mpp": 10**400}, "expected a number"),
        ({"transform": [224]}, "expected an object"),
        ({"transform": {"mean": ["x"]}}, "expected an object of numbers"),
        ({"source": "hearsay"}, "source 'hearsay': expected prepare or import"),
        ({"colour": "pink"}, "a fact 'colour' unknown to this version"),
        ([1], "a list, expected an object"),
    ],
)
def test_what_is_no_recipe_is_refused(facts, message):
    with pytest.raises(ValueError, match=message):
        FeatureRecipe.from_dict(facts)


def test_sizes_within_a_tenth_are_the_same():
    assert is_same_size(128, 118) and is_same_size(118, 128) and is_same_size(0, 128)
    assert not is_same_size(128, 112) and not is_same_size(112, 128)
    assert patch_words(FeatureRecipe(patch_um=112.0)) == "112 um" and patch_words(FeatureRecipe(patch_size=5)) == "5 px"

"""Registry of published encoders: names in the spellings of other tools."""

import pytest

from pathflip_jax.vision.recipes import RECIPES, find_recipe, registry_name


@pytest.mark.parametrize("name", RECIPES)
def test_an_encoder_is_found_by_its_name_and_its_repository(name):
    assert find_recipe(name).name == registry_name(name.upper().replace("_", "-")) == name
    assert registry_name(RECIPES[name].repository) == name


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("UNI2-h", "uni_v2"),
        ("mahmood-conch", "conch_v1"),
        ("H-optimus-0", "hoptimus0"),
        ("kaiko-midnight", "midnight12k"),
    ],
)
def test_other_tools_spell_names_otherwise(spelled, name):
    assert registry_name(spelled) == name


@pytest.mark.parametrize("name", ["", "my_own", "hf:mine", "stain_texture"])
def test_names_of_other_encoders_stay(name):
    assert find_recipe(name) is None and registry_name(name) == name

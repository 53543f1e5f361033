"""encoder.json of a folder of records: written atomically, read on opening, and refused when damaged."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from upath import UPath

from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records import large
from pathflip_jax.data.records.recipe import RECIPE, read_recipe, write_recipe
from pathflip_jax.data.records.records import Records, finish_folder, manifest_hash, shard_name, write_shard
from pathflip_jax.data.storage import blocks

UNI = FeatureRecipe(
    encoder="uni_v1", weights="12ab" * 16, transform={"resize": 224, "mean": [0.485, 0.456, 0.406]}, pooling="class",
    precision="float32", feature_dim=3, patch_size=64, mpp=0.5, source="prepare",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    coords = np.stack(np.meshgrid(np.arange(2), np.arange(2)), -1).reshape(-1, 2).astype(np.int32) * 64
    features = np.arange(12, dtype=np.float32).reshape(4, 3)
    write_shard(tmp_path / shard_name(0), [SlideFeatures("A", "P", features, coords, 64, 0.5, 128, 128)], edge_um=64.0)
    finish_folder(tmp_path, edge_um=64.0)
    return tmp_path


def test_a_folder_of_an_earlier_version_has_no_recipe(folder):
    assert read_recipe(folder) is None and Records(folder).recipe is None and Records(folder).read(0).recipe is None


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_what_is_written_is_read(tmp_path, place):
    where = tmp_path if place == "disk" else UPath(f"memory://{tmp_path.name}")
    write_recipe(where, UNI)
    assert read_recipe(where) == UNI == read_recipe(str(where))
    assert [path.name for path in where.iterdir()] == [RECIPE]


def test_every_slide_of_a_folder_has_its_recipe(folder, monkeypatch):
    write_recipe(folder, UNI)
    records = Records(folder)
    assert records.recipe == records.read(0).recipe == large.open_slide(records, 0).recipe == UNI
    monkeypatch.setattr(blocks, "LARGE", 1)
    assert large.open_slide(records, 0).recipe == UNI


def test_the_recipe_does_not_change_the_hash_of_the_records(folder):
    before, manifest = manifest_hash(folder), (folder / "manifest.json").read_bytes()
    write_recipe(folder, UNI)
    assert manifest_hash(folder) == manifest_hash(Records(folder)) == before
    finish_folder(folder, edge_um=64.0)
    assert (folder / "manifest.json").read_bytes() == manifest and read_recipe(folder) == UNI


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list, not an object"),
        ("{}", "version None, expected 1"),
        ('{"version": 2}', "version 2, expected 1; read it with the version of pathflip that wrote it"),
        ('{"version": true}', "version True, expected 1"),
        ('{"version": 1, "mpp": "fine"}', "not the recipe of features .mpp 'fine': expected a number.*delete it"),
        ('{"version": 1, "colour": "pink"}', "a fact 'colour' unknown to this version"),
    ],
)
def test_a_damaged_recipe_is_refused_by_name(folder, content, message):
    (folder / RECIPE).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        Records(folder)
    assert str(error.value).startswith(f"{folder / RECIPE}: ")


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
JSON = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=4), PLAIN, max_size=2)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*UNI.to_dict(), "encoder_version", "patch_um", "x"]), JSON))
def test_anything_is_a_recipe_or_an_error_with_its_name(tmp_path_factory, values):
    folder = tmp_path_factory.getbasetemp() / "recipes"
    folder.mkdir(exist_ok=True)
    (folder / RECIPE).write_text(json.dumps({"version": 1} | values))
    try:
        found = read_recipe(folder)
    except ValueError as error:
        assert str(error).startswith(f"{folder / RECIPE}: ")
    else:
        assert FeatureRecipe.from_dict(found.to_dict()) == found

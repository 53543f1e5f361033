"""Model families: one record each, with the same keys in the tables of all packages."""

import re
from pathlib import Path

import pytest
from flax import nnx

import pathflip_jax
from pathflip_jax.convert.families import CONVERSIONS
from pathflip_jax.export.families import EXPORTS
from pathflip_jax.grounding.methods import METHODS
from pathflip_jax.inference.families import SERVING
from pathflip_jax.model.config import CONFIGS
from pathflip_jax.model.families import FAMILIES, family_of
from pathflip_jax.model.parameters import abstract_params, make_model
from pathflip_jax.training import alignment

SMALL = dict(feature_dim=8, embed_dim=8, hidden=8, layers=1, heads=1, intermediate=8, vocab_size=9, max_positions=8)


def test_every_room_has_the_same_families():
    for table in (CONFIGS, CONVERSIONS, EXPORTS, SERVING, alignment.FAMILIES):
        assert table.keys() == FAMILIES.keys()
    assert {name: family.config for name, family in FAMILIES.items()} == CONFIGS


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_rooms_say_of_a_family_agrees(name):
    family = FAMILIES[name]
    config = family.config(**SMALL)
    assert family_of(config) is family
    assert isinstance(make_model(config, nnx.Rngs(0)), family.network)
    assert CONVERSIONS[name].bert.whole == (family.added_words == 0)  # an unmodified BERT has no [DEC]
    shapes = abstract_params(config)
    assert f"{CONVERSIONS[name].bert.path}/word_embeddings/embedding" in shapes
    assert [entry.path for entry in CONVERSIONS[name].names(config)] and {
        entry.path for entry in CONVERSIONS[name].names(config)
    } == shapes.keys()
    default = METHODS[SERVING[name].default_method]
    assert not (family.patchwise and default.splits_regions)
    assert SERVING[name].in_blocks != family.patchwise  # blocks consist of regions


def test_no_room_asks_for_a_family_by_its_class():
    asks = re.compile(r"(isinstance|issubclass)\([^()]*PathFLIP2?(Config)?\b")
    library = Path(pathflip_jax.__file__).parent
    assert [path.name for path in sorted(library.rglob("*.py")) if asks.search(path.read_text())] == []

"""Model configs: refused values, and the layers with cross-attention to patches."""

import json

import pytest

from pathflip_jax.model.config import PathFLIPConfig


def test_round_trip_through_json():
    config = PathFLIPConfig(layers=3, init="fan_in", logit_bias_init=-10.0, patch_hidden=7)
    assert PathFLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hiden": 64}, ["hiden", "hidden"]),
        ({"hidden": 100}, ["hidden=100", "heads=12"]),
        ({"embed_dim": 36}, ["embed_dim=36", "region_heads=8"]),
        ({"embed_dim": 24, "text_region_heads": 5}, ["embed_dim=24", "text_region_heads=5"]),
        ({"init": "xavier"}, ["init", "xavier", "fan_in"]),
        ({"patch_projection": "MLP"}, ["patch_projection", "MLP", "mlp"]),
        ({"compute_dtype": "float16"}, ["compute_dtype", "float16", "bfloat16"]),
        ({"layers": 0}, ["layers=0"]),
        ({"cross_attention_freq": 0}, ["cross_attention_freq=0"]),
        ({"num_queries": 0}, ["num_queries=0"]),
        ({"dropout": 1.0}, ["dropout=1.0"]),
        ({"heads": 0}, ["heads=0"]),
        ({"hidden": "768"}, ["hidden='768'"]),
        ({"hidden": -8}, ["hidden=-8"]),
        ({"layers": 2**31}, ["layers=2147483648", "at most 1024"]),
        ({"remat": 1}, ["remat=1"]),
        ({"layers": True}, ["layers=True"]),
        ({"init": ["bert"]}, ["init=['bert']"]),
    ],
)
def test_refusals_name_what_was_found(values, words):
    with pytest.raises(ValueError) as error:
        PathFLIPConfig.from_dict(values)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("layers", "freq", "cross", "shown"),
    [
        (12, 2, (0, 2, 4, 6, 8, 10), 10),
        (11, 2, (0, 2, 4, 6, 8, 10), 8),
        (4, 2, (0, 2), 2),
        (4, 3, (0, 3), 0),
        (5, 3, (0, 3), 3),
        (3, 1, (0, 1, 2), 1),
        (1, 2, (0,), 0),
        (2, 5, (0,), 0),
    ],
)
def test_layers_that_read_patches_and_the_one_that_is_shown(layers, freq, cross, shown):
    config = PathFLIPConfig(layers=layers, cross_attention_freq=freq)
    assert config.cross_layers == cross
    assert config.map_layer == shown

"""FLOPs of a training step: the content of a batch is counted, padding is not."""

import jax
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.model.config import PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.flops import Work, model_flops, parameters, parts
from pathflip_jax.model.parameters import make_model

CONFIG = PathFLIPConfig(
    feature_dim=16, embed_dim=8, hidden=16, layers=2, heads=2, intermediate=32, num_queries=2, vocab_size=30,
    max_positions=32, region_layers=1, region_heads=2, text_region_heads=2,
)  # fmt: skip


def batch():
    """2 slides of 3 and 1 regions with 9 and 2 patches; three texts of 5, 3 and 4 tokens in two rows."""
    mask = np.zeros((2, 4, 5), bool)
    for b, r, n in ((0, 0, 5), (0, 1, 3), (0, 2, 1), (1, 0, 2)):
        mask[b, r, :n] = True
    segments, positions = np.zeros((2, 1, 2, 10), np.int32)
    segments[0, 0, :8], positions[0, 0, :8] = [1] * 5 + [2] * 3, [*range(5), *range(3)]
    segments[0, 1, 2:6], positions[0, 1, 2:6] = 1, range(4)
    return mask, [(np.zeros_like(segments), segments, positions)]


def counted(config, mask, rows):
    return float(jax.jit(model_flops, static_argnums=0)(config, mask, rows))


def test_a_batch_is_counted_inside_a_compiled_step():
    mask, rows = batch()
    expected = sum(part.operations for part in parts(CONFIG, Work(2, 4, 11, 12, 25 + 9 + 16), width=4, training=True))
    assert counted(CONFIG, mask, rows) == pytest.approx(expected)


def test_padding_changes_nothing():
    mask, (rows,) = batch()
    wider = tuple(np.pad(x, ((0, 0), (0, 1), (0, 9))) for x in rows)
    more = [wider, (np.zeros((1, 1, 4), np.int32),) * 3]
    mask_too = np.pad(mask, ((0, 0), (0, 3), (0, 7)))
    assert counted(CONFIG, mask_too, more) == counted(CONFIG, mask, [rows])


def test_large_batches_do_not_overflow():
    config = PathFLIPConfig()
    ones = np.ones((64, 36, 384), np.int32)
    found = counted(config, np.ones((1024, 24, 16), bool), [(ones, ones, ones * np.arange(384))])
    work = Work(1024, 1024 * 24, 1024 * 24 * 16, 2304 * 384, 2304 * 384**2)
    assert found == pytest.approx(sum(part.operations for part in parts(config, work, 4, training=True)), rel=1e-4)
    assert found > 2**33 and parameters(config) > 1e8


def test_the_follow_up_network_takes_what_the_compiler_counts():
    config = PathFLIP2Config(
        feature_dim=64, embed_dim=64, hidden=16, layers=1, heads=2, intermediate=16, vocab_size=20, tokens=15,
        token_heads=4,
    )  # fmt: skip
    model = jax.eval_shape(lambda: make_model(config, nnx.Rngs(0)))
    patches, mask = jax.ShapeDtypeStruct((2, 1, 512, 64), np.float32), jax.ShapeDtypeStruct((2, 1, 512), bool)

    def encode(model, patches, mask):
        found = model.encode_slides(patches, mask)
        return found.slide, found.regions

    compiled = jax.jit(encode).lower(model, patches, mask).compile()
    counted = compiled.cost_analysis()["flops"]
    work = Work(slides=2, regions=2, patches=1024, tokens=0, squared_lengths=0)
    ours = sum(part.operations for part in parts(config, work, 4, training=False))
    assert ours == pytest.approx(counted, rel=0.1)  # the compiler counts softmax and normalisation too


def test_whole_slides_of_the_follow_up_network_cost_in_proportion_to_their_patches():
    config = PathFLIP2Config()
    sizes = [sum(p.operations for p in parts(config, Work(1, 1, n, 0, 0), 4, training=False)) for n in (0, 4096, 65536)]
    assert sizes[2] - sizes[0] == pytest.approx(16 * (sizes[1] - sizes[0]))

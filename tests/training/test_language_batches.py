"""Batches of the language stage: a function of (seed, step), of patches or of slides that were embedded before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.data.batches.patches import PatchSampler
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.texts.conversations import read_conversations
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.inference import embed
from pathflip_jax.inference.load import load
from pathflip_jax.llm.config import DecoderConfig
from pathflip_jax.llm.shape import Shape
from pathflip_jax.llm.tokenizer import DecoderTokenizer, train_bpe
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import flatten
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs import folder as runs_folder
from pathflip_jax.runtime.sharding import Shards
from pathflip_jax.settings.networks import LanguageDataSettings
from pathflip_jax.training.language_batches import (
    EmbeddedSlides,
    LanguageBatches,
    collect_examples,
    read_embeddings,
    unigram_loss,
)
from pathflip_jax.training.language_objective import language_stage

REGIONS = 4


@pytest.fixture(scope="module")
def setting(tiny_cohort, tmp_path_factory):
    """Records, examples (the training split, twice the reports) and their tokenizer."""
    folder = tmp_path_factory.mktemp("batches")
    talks = read_conversations(tiny_cohort.texts)
    train_bpe([talk.turns[0].answer for talk in talks], folder / "tokenizer", 400)
    records, tokenizer = Records(tiny_cohort.records), DecoderTokenizer(folder / "tokenizer")
    ids = [f"S{i:02d}" for i in range(12)]
    return folder, records, tokenizer, collect_examples(records, [(talks, 2)], tokenizer, "plain", ids)


def batches(setting, **more):
    _, records, _, examples = setting
    slides = more.pop("slides", None) or PatchSampler(records, REGIONS, 4, 2)
    data = {name: more.pop(name) for name in ("length", "no_slide_share") if name in more}
    size, shards = more.pop("batch_size", 6), Shards(more.pop("shards", 1), more.pop("own_shards", None))
    return LanguageBatches(examples, slides, LanguageDataSettings(threads=2, **data), size, shards=shards, **more)


def test_a_mixture_is_seen_as_often_as_it_says(setting):
    _, _, _, examples = setting
    assert len(examples) == 24 and batches(setting).steps_per_epoch == 4
    made = batches(setting)
    seen = [made.batch(step).tokens.tobytes() for step in range(4)]
    assert len(set(seen)) == 4


def test_a_batch_is_a_function_of_seed_and_step(setting):
    for step in (0, 5):
        first, again = batches(setting, seed=3).batch(step), batches(setting, seed=3).batch(step)
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(one, other)
    assert batches(setting, seed=4).batch(0).tokens.tobytes() != batches(setting, seed=3).batch(0).tokens.tobytes()
    going_on = batches(setting, seed=3).__iter__(5)
    np.testing.assert_array_equal(next(going_on).tokens, batches(setting, seed=3).batch(5).tokens)


def test_parts_of_two_processes_are_the_whole(setting):
    whole = batches(setting, shards=2).batch(1)
    parts = [batches(setting, shards=2, own_shards=[i]).batch(1) for i in range(2)]
    for both, *halves in zip(*(jax.tree.leaves(batch) for batch in (whole, *parts)), strict=True):
        np.testing.assert_array_equal(both, np.concatenate(halves))


def test_soft_tokens_stand_for_the_slide_and_the_regions_that_are_there(setting):
    _, _, tokenizer, _ = setting
    batch = batches(setting).batch(0)
    for tokens, mask, response, patch_mask in zip(
        batch.tokens, batch.mask, batch.response, batch.patch_mask, strict=True
    ):
        soft = tokens[tokens < 0]
        assert soft.tolist() == list(range(-1, -2 - patch_mask.any(-1).sum(), -1))
        assert not response[tokens < 0].any() and not response[~mask].any()
        said = tokenizer.decode(tokens[response])
        assert said.endswith((".", "cm.")) and tokens[response][-1] == tokenizer.stop_ids[0]


def test_a_share_is_shown_without_its_slide(setting):
    made = batches(setting, no_slide_share=0.5)
    shown = np.concatenate([(made.batch(step).tokens < 0).any(1) for step in range(40)])
    assert 0.4 < shown.mean() < 0.6
    assert all((batches(setting).batch(step).tokens < 0).any(1).all() for step in range(8))


def test_validation_sees_every_example_once(setting):
    made = batches(setting, batch_size=7, seed=None)
    assert made.steps_per_epoch == 4
    taught = [made.batch(step).response.any(1) for step in range(4)]
    assert np.concatenate(taught).sum() == 24 and taught[3].sum() == 3


def test_chance_of_a_response_is_that_of_its_tokens_frequencies(setting):
    *_, examples = setting
    order = examples[0].orders[0]._replace(tokens=np.array([9, 1, 1, 1, 2]), response=np.array([0, 1, 1, 1, 1], bool))
    seen = examples[0]._replace(orders=(order,))
    unseen = examples[0]._replace(orders=(order._replace(tokens=np.array([1, 1, 3, 9, 9]), response=order.tokens < 9),))
    # Counts of 1, 2 and the unseen 3 and 9, each and one more: 4, 2, 1 and 1 of 8.
    assert unigram_loss([seen], [unseen]) == pytest.approx(np.log([2, 8, 8, 8]).mean())


def test_what_cannot_be_batched_is_named(setting):
    with pytest.raises(ValueError, match=r"24 of 24 conversations are longer than 8 tokens .* longest by \d+"):
        batches(setting, length=8)
    with pytest.raises(ValueError, match="too few for a batch of 50"):
        batches(setting, batch_size=50)
    with pytest.raises(ValueError, match="a multiple of the 4 devices"):
        batches(setting, shards=4)


def test_slides_embedded_before_give_the_same_loss(setting, tiny_cohort):
    """Rows of `pathflip embed` in place of patches: where all regions and patches are drawn, the loss is the same."""
    folder, records, tokenizer, examples = setting
    words = TextTokenizer(tiny_cohort.vocabulary)
    config = PathFLIPConfig(
        feature_dim=16, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2,
        vocab_size=words.vocab_size, max_positions=8, region_layers=1, region_heads=2, text_region_heads=2,
    )  # fmt: skip
    run = folder / "run"
    runs_folder.save_run(run, PathFLIP(config, nnx.Rngs(0)), {"data": {"encoder": "tiny", "edge_um": 64.0}}, words)
    assert embed.embed(run, tiny_cohort.records, folder / "rows.parquet", regions=True).finished
    name, trained = str(run), embed.checkpoint_hash(load(run))
    found = read_embeddings(folder / "rows.parquet", records, examples, name, trained)
    most = max(len(example.regions.count) for example in examples)
    slots = max(int(example.regions.count.max()) for example in examples)
    plain = batches(setting, slides=PatchSampler(records, most, slots, 2)).batch(2)
    rows = batches(setting, slides=EmbeddedSlides(found, most)).batch(2)
    for one, other in zip(plain[2:], rows[2:], strict=True):
        np.testing.assert_array_equal(one, other)
    decoder = DecoderConfig(
        family="qwen3", vocab_size=400, width=32, layers=1, heads=2, kv_heads=2, head_dim=16, intermediate=32,
        max_positions=512, rope_theta=1e4, norm_eps=1e-6, tied=True, query_norm=True,
    )  # fmt: skip
    shape, stage = Shape(config, decoder, None, "float32"), language_stage(("projector",))
    rng, abstract = np.random.default_rng(0), sorted(shape.abstract(stage.trainable).items())
    params = {name: jnp.asarray(0.3 * rng.normal(size=x.shape), np.float32) for name, x in abstract}
    params |= {f"aligner/{name}": x for name, x in flatten(load(run).model).items()}
    model, encode = shape.build(params), jax.jit(stage.encode, static_argnums=2)
    losses = [encode(model, batch, None)["loss"] for batch in (plain, rows)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)

    with pytest.raises(ValueError, match="embed again"):
        read_embeddings(folder / "rows.parquet", records, examples, name, "other")
    embed.embed(run, tiny_cohort.records, folder / "bare.parquet")
    with pytest.raises(ValueError, match="embed with --regions"):
        read_embeddings(folder / "bare.parquet", records, examples, name, trained)
    with pytest.raises(FileNotFoundError, match="`pathflip embed` writes it"):
        read_embeddings(folder / "none.parquet", records, examples, name, trained)

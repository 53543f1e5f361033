"""The language stage on the loop of all stages: what is frozen stays bit for bit, runs resume, losses are exact."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from pathflip_jax import cli
from pathflip_jax.convert.decoder import load_decoder
from pathflip_jax.data.storage import json_files
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.inference.language_run import assemble, read_trained
from pathflip_jax.llm.config import DecoderConfig, LoRAConfig
from pathflip_jax.llm.decoder import Decoder
from pathflip_jax.llm.shape import Shape
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import flatten
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.monitoring.metrics import read_metrics
from pathflip_jax.runs import files
from pathflip_jax.runs import folder as runs_folder
from pathflip_jax.training import loop
from pathflip_jax.training.language_objective import (
    LOSS_CHUNK,
    LanguageBatch,
    language_flops,
    language_stage,
    response_losses,
)
from pathflip_jax.training.step import loss_and_gradients

ALIGNER = PathFLIPConfig(
    feature_dim=16, embed_dim=16, hidden=16, layers=2, heads=2, intermediate=32, num_queries=2, vocab_size=201,
    max_positions=64, region_layers=1, region_heads=2, text_region_heads=2, dropout=0.1,
)  # fmt: skip
DECODER = DecoderConfig(
    family="qwen3", vocab_size=300, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, intermediate=48,
    max_positions=512, rope_theta=1e4, norm_eps=1e-6, tied=True, query_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def aligner(tiny_cohort, tmp_path_factory):
    """A run folder of alignment around random weights."""
    folder = tmp_path_factory.mktemp("aligner") / "run"
    tokenizer = TextTokenizer(tiny_cohort.vocabulary)
    config = PathFLIPConfig.from_dict(ALIGNER.to_dict() | {"vocab_size": tokenizer.vocab_size})
    model = jax.jit(lambda: PathFLIP(config, nnx.Rngs(0)))()
    runs_folder.save_run(folder, model, {"data": {"encoder": "tiny", "edge_um": 64.0}}, tokenizer)
    return folder


@pytest.fixture(scope="module")
def options(tiny_cohort, aligner, decoder_folder):
    """The options of a run, but for config and workdir."""
    data = {"records": tiny_cohort.records, "texts": tiny_cohort.texts, "slides": tiny_cohort.slides}
    found = [f"--config.data.{name}={path}" for name, path in data.items()]
    return [*found, f"--config.lm.aligner={aligner}", f"--config.lm.decoder={decoder_folder('qwen3')}"]


@pytest.fixture(scope="module")
def stage1(options, tmp_path_factory):
    """A run of four steps that trained the projector."""
    folder = tmp_path_factory.mktemp("stage1") / "run"
    assert loop.main(["--config=lm_stage1:smoke", *options, f"--workdir={folder}"]) == 0
    return folder


def same(found, expected) -> set[str]:
    """The names whose numbers are the same, bit for bit."""
    assert found.keys() == expected.keys()
    return {name for name in found if np.asarray(found[name]).tobytes() == np.asarray(expected[name]).tobytes()}


def test_the_facts_of_a_run_count_each_split(stage1):
    counts = json_files.read_json(stage1 / files.CONFIG)["data"]["splits"]
    assert counts["train"] == {"slides": 12, "patients": 10, "texts": 12, "no_text": 0, "no_record": 0}
    assert counts["val"]["texts"] == 6 and counts["test"]["slides"] == 6 and counts["not_in_table"] == 0


def sources(options, aligner):
    folder = next(o.partition("=")[2] for o in options if "lm.decoder" in o)
    return (
        {f"aligner/{name}": x for name, x in flatten(runs_folder.load_run(aligner)[0]).items()},
        {f"decoder/{name}": x for name, x in flatten(load_decoder(folder)).items()},
    )


def test_the_first_stage_trains_the_projector_alone(options, aligner, stage1):
    rows = read_metrics(stage1 / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(np.isfinite(row["loss"]) for row in rows)
    assert all(row["perf/useful_flops"] > 1e5 and row["response_tokens"] > 10 for row in rows)
    assert 0 < rows[3]["val/loss_chance"] == rows[1]["val/loss_chance"] < 10
    assert rows[3]["val/loss"] < rows[1]["val/loss"] or rows[3]["loss"] < rows[0]["loss"]
    model, config, tokenizer = assemble(stage1)
    params = flatten(model)
    for part in sources(options, aligner):
        assert same({name: params[name] for name in part}, part) == set(part)
    assert set(read_trained(stage1)[2]) == {"projector/kernel", "projector/bias"}
    assert config["data"]["encoder"] == "tiny" and config["data"]["template"] == "chat" and tokenizer.stop_ids == (2,)


@pytest.mark.slow
def test_the_second_stage_goes_on_with_projector_and_adapters(options, aligner, stage1, tmp_path):
    more = [f"--config.lm.start={stage1}", "--config.lm.lora_rank=2", f"--workdir={tmp_path / 'run'}"]
    assert loop.main(["--config=lm_stage2:smoke", *options, *more]) == 0
    model, _, _ = assemble(tmp_path / "run", "latest")
    params = flatten(model)
    for part in sources(options, aligner):
        assert same({name: params[name] for name in part}, part) == set(part)
    trained = read_trained(tmp_path / "run", "latest")[2]
    before = read_trained(stage1)[2]
    assert len(trained) == 2 + 2 * 2 * 7 and not same({n: trained[n] for n in before}, before)
    assert all(np.abs(x).max() > 0 for name, x in trained.items() if name.endswith("/lora/b"))
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["loss"]
    assert first < read_metrics(stage1 / "metrics.jsonl")[0]["loss"]  # it did not start anew


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT in transformers
def test_an_adapter_goes_to_peft_and_a_run_starts_from_it(options, tmp_path):
    """The exported adapter gives our logits in PEFT, the decoder in transformers; the adapter comes back as a start."""
    import peft
    import torch
    import transformers

    more = ["--config.lm.lora_rank=2", "--config.lm.lora_targets=q_proj,down_proj"]
    run, adapter, whole = tmp_path / "run", tmp_path / "adapter", tmp_path / "whole"
    assert loop.main(["--config=lm_stage2:smoke", *options, *more, f"--workdir={run}"]) == 0
    assert cli.main(["export", str(run), "--to=peft", f"--out={adapter}"]) == 0
    assert cli.main(["export", str(run), "--to=huggingface", f"--out={whole}"]) == 0
    decoder = assemble(run)[0].decoder
    ids = np.arange(3, 43).reshape(2, 20)
    expected = np.asarray(decoder(ids)[0])
    folder = next(o.partition("=")[2] for o in options if "lm.decoder" in o)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
        np.testing.assert_allclose(merged(torch.tensor(ids)).logits.numpy(), expected, atol=2e-5)
        adapted = peft.PeftModel.from_pretrained(base, adapter)
        np.testing.assert_allclose(adapted(torch.tensor(ids)).logits.numpy(), expected, atol=2e-5)
    tensors = load_file(adapter / "projector.safetensors")
    np.testing.assert_array_equal(tensors["weight"].T, read_trained(run)[2]["projector/kernel"])
    again = ["--config=lm_stage2:smoke", *options, *more, f"--config.lm.start={adapter}", "--config.train.steps=1"]
    assert loop.main([*again, "--config.optim.warmup_learning_rate=0.0", f"--workdir={tmp_path / 'again'}"]) == 0
    found = read_trained(tmp_path / "again", "latest")[2]
    before = {name: x for name, x in read_trained(run)[2].items() if "/lora/" in name}
    assert same({name: found[name] for name in before}, before) == set(before)  # its first step has a rate of 0


@pytest.mark.slow
def test_all_at_once_trains_what_slides_pass_through(options, aligner, tmp_path):
    more = ["--config.lm.lora_rank=2", "--config.train.accumulate=2", f"--workdir={tmp_path / 'run'}"]
    assert loop.main(["--config=lm_joint:smoke", *options, *more]) == 0
    params = flatten(assemble(tmp_path / "run", "latest")[0])
    slides, decoder = sources(options, aligner)
    assert same({name: params[name] for name in decoder}, decoder) == set(decoder)
    kept = same({name: params[name] for name in slides}, slides)
    assert {"aligner/qformer/word_embeddings/embedding", "aligner/text_projection/kernel"} <= kept
    moved = set(slides) - kept
    assert {"aligner/patch_projection/linear/kernel", "aligner/qformer/query_tokens"} <= moved
    assert {"aligner/qformer/layers/0/cross_attention/output/kernel", "aligner/region_layers/0/norm/scale"} <= moved
    assert not any("/ffn/" in name or "text" in name or "logit" in name for name in moved)


@pytest.mark.slow
def test_a_run_goes_on_and_ends_as_the_straight_one(options, stage1, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    class Once(loop.StopSignal):
        def requested(self, step):
            return step == 2

    monkeypatch.setattr(loop, "StopSignal", Once)
    argv = ["--config=lm_stage1:smoke", *options, f"--workdir={folder}"]
    assert loop.main(argv) == 75
    monkeypatch.undo()
    assert loop.main(argv) == 0
    found, expected = read_trained(folder, "latest")[2], read_trained(stage1, "latest")[2]
    assert same(found, expected) == set(expected)
    losses = [[row["loss"] for row in read_metrics(x / "metrics.jsonl")] for x in (folder, stage1)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_decoder_learns_from_scratch(options, decoder_folder, tmp_path):
    """The folder then needs no weights; half of the examples are shown without their slide."""
    bare = tmp_path / "decoder"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((decoder_folder("qwen3") / name).read_bytes())
    more = [f"--config.lm.decoder={bare}", "--config.data.no_slide_share=0.5", "--config.data.template=plain"]
    folder = tmp_path / "run"
    assert loop.main(["--config=lm_demo:smoke", *options, *more, f"--workdir={folder}"]) == 0
    trained = read_trained(folder)[2]
    assert "decoder/embedding/embedding" in trained and not any(name.startswith("aligner/") for name in trained)
    assert assemble(folder)[1]["data"]["template"] == "plain"


@pytest.fixture(scope="module")
def language():
    """A model with adapters that add something, and a batch of sequences of several lengths."""
    shape = Shape(ALIGNER, DECODER, LoRAConfig(rank=2, dropout=0.0, targets=("q_proj", "down_proj")), "float32")
    params = {name: 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, (name, x) in enumerate(
        sorted(shape.abstract(lambda _: True).items()))}  # fmt: skip
    rng = np.random.default_rng(0)
    B, R, S, T = 4, 3, 4, 2 * LOSS_CHUNK + 9
    lengths = np.array([T, 40, 200, 130])
    tokens = rng.integers(0, 300, (B, T), dtype=np.int32)
    tokens[:, 2:6] = -1 - np.arange(4)
    real = np.arange(T) < lengths[:, None]
    patch_mask = rng.random((B, R, S)) < 0.9
    patches = rng.normal(size=(B, R, S, 16)).astype(np.float16)
    return shape, params, LanguageBatch(patches, patch_mask, tokens, real, real & (np.arange(T) > 20))


def test_chunks_of_the_loss_are_the_whole_of_it(language):
    shape, params, batch = language
    decoder = shape.build(params).decoder
    states = jax.random.normal(jax.random.key(0), (*batch.tokens.shape, 32))

    def plain(decoder, states):
        logits = jax.nn.log_softmax(decoder.logits(states)[:, :-1])
        chosen = jnp.take_along_axis(logits, jnp.maximum(batch.tokens[:, 1:], 0)[..., None], axis=-1)[..., 0]
        return -jnp.where(batch.response[:, 1:], chosen, 0).sum(1)

    def gradient(losses):
        return jax.jit(jax.value_and_grad(lambda d, x: losses(d, x).sum(), argnums=1))(decoder, states)

    found = gradient(lambda d, x: response_losses(d, x, batch.tokens, batch.response))
    expected = gradient(plain)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


def test_the_logits_of_all_tokens_never_stand_in_memory():
    config = DecoderConfig(**vars(DECODER) | {"vocab_size": 20_000})
    decoder = jax.eval_shape(lambda: Decoder(config, nnx.Rngs(0)))
    of, T = jax.ShapeDtypeStruct, 16 * LOSS_CHUNK + 1
    arguments = of((2, T, 32), np.float32), of((2, T), np.int32), of((2, T), np.bool_)

    def loss(decoder, states, tokens, response):
        return response_losses(decoder, states, tokens, response).sum()

    plan = jax.jit(jax.grad(loss, argnums=1)).lower(decoder, *arguments).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 4 * 2 * T * 20_000 * 4 / 5


def test_padding_and_unseen_slides_change_nothing(language):
    shape, params, batch = language
    encode = jax.jit(language_stage(("projector",)).encode, static_argnums=2)

    def loss(batch):
        return encode(shape.build(params), batch, None)["loss"]

    whole = loss(batch)
    short = jax.tree.map(lambda x: x[1:2], batch)
    short = short._replace(tokens=short.tokens[:, :41], mask=short.mask[:, :41], response=short.response[:, :41])
    np.testing.assert_allclose(loss(short), whole[1:2], rtol=1e-5)
    other = np.where(batch.patch_mask[..., None], batch.patches, np.float16(7))
    np.testing.assert_array_equal(loss(batch._replace(patches=other)), whole)
    words = batch._replace(tokens=np.maximum(batch.tokens, 0))
    changed = batch.patches + np.float16(1)
    np.testing.assert_array_equal(loss(words), loss(words._replace(patches=changed)))
    assert not np.array_equal(loss(batch._replace(patches=changed)), whole)


@pytest.mark.slow
def test_accumulated_gradient_is_that_of_the_whole_batch(language):
    shape, params, batch = language
    stage = language_stage(("aligner", "projector", "lora"))
    learned = {name: x for name, x in params.items() if stage.trainable(name)}
    frozen = {name: x for name, x in params.items() if name not in learned}

    def gradients(accumulate):
        build = lambda p: shape.build(p | frozen)  # noqa: E731
        plain = stage._replace(encode=lambda model, part, key: stage.encode(model, part, None))
        return jax.jit(lambda p: loss_and_gradients(plain, build, p, batch, jax.random.key(0), accumulate))(learned)

    (loss, _), expected = gradients(1)
    (again, _), found = gradients(2)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, atol=max(1e-5 * np.abs(x).max(), 1e-7), err_msg=name)
    silent = {name for name, x in expected.items() if np.abs(x).max() == 0}
    assert {name.rpartition("cross_attention/")[2] for name in silent} == {"key/bias"}  # the softmax cancels that alone


def test_model_flops_are_what_the_compiler_counts(language):
    shape, params, batch = language
    stage = language_stage(("projector", "decoder"))
    full = batch._replace(mask=np.ones_like(batch.mask), response=np.ones_like(batch.response))
    count = float(language_flops(ALIGNER, DECODER, ("projector", "decoder"))(full))
    learned = {name: x for name, x in params.items() if stage.trainable(name)}
    frozen = {name: x for name, x in params.items() if name not in learned}

    def step(p):
        return loss_and_gradients(stage, lambda p: shape.build(p | frozen), p, full, jax.random.key(0))

    counted = jax.jit(step).lower(learned).compile().cost_analysis()["flops"]
    assert 0.5 < count / counted < 1.1  # its softmax, norms and recomputed logits are not in ours


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lm.trains": "projector,lora,head"}, "lm.trains head: expected some of projector, lora, decoder, aligner"),
        ({"lm.random_decoder": "True"}, "add decoder to lm.trains"),
        ({"train.select": "val/recall_at_1"}, "choose one of val/loss"),
        ({"data.template": "poem"}, 'data.template=poem: expected one of "", chat, plain'),
        (
            {"data.length": "16"},
            r"longer than 16 tokens with the regions of their slide, the longest by \d+ tokens; set --config",
        ),
        ({"data.no_slide_share": "1.5"}, "at least 0 and below 1"),
        ({"lm.aligner": "nowhere"}, "no such file or folder; expected the run folder of the aligner"),
        ({"data.texts": "nowhere.csv"}, "nowhere.csv"),
    ],
)
def test_wrong_input_is_named_with_its_cure(options, tmp_path, change, message):
    argv = ["--config=lm_stage1:smoke", *options, f"--workdir={tmp_path / 'run'}"]
    argv += [f"--config.{name}={value}" for name, value in change.items()]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.main(argv)


def test_a_start_on_other_weights_is_refused(options, stage1, decoder_folder, tmp_path):
    other = decoder_folder("qwen3", seed=1)
    argv = ["--config=lm_stage2:smoke", *options, f"--config.lm.decoder={other}", f"--config.lm.start={stage1}"]
    with pytest.raises(ValueError, match="was trained with another decoder"):
        loop.main([*argv, f"--workdir={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match="was trained on another decoder than .* with --decoder"):
        assemble(stage1, decoder=str(other))
    with pytest.raises(ValueError, match="a run of the language stage"):
        runs_folder.load_run(stage1)


def test_a_damaged_shape_is_named(stage1, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_bytes((stage1 / "config.json").read_bytes())
    (folder / "model.json").write_text(json.dumps({"aligner": {}}))
    with pytest.raises(ValueError, match="model.json: not the shape of a slide-conditioned language model"):
        read_trained(folder)

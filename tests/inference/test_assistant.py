"""Inference with the language stage: batching has no effect, likelihoods are the decoder's, commands report faults."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from pathflip_jax import cli
from pathflip_jax.convert.decoder import load_decoder
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.texts.conversations import Turn
from pathflip_jax.inference import assistant as assistants
from pathflip_jax.inference.assistant import SlideAssistant
from pathflip_jax.llm.adapter import SlideLanguageModel
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.llm.tokenizer import DecoderTokenizer
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import flatten, unflatten

ALIGNER = PathFLIPConfig(
    feature_dim=16, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2, vocab_size=8,
    max_positions=8, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
)  # fmt: skip


@pytest.fixture(scope="module")
def assistant(decoder_folder):
    """A random aligner and projector before a random decoder."""
    folder = decoder_folder("qwen3")
    decoder = load_decoder(folder)
    template = jax.eval_shape(lambda: SlideLanguageModel(ALIGNER, decoder.config, None, nnx.Rngs(0)))
    drawn = flatten(jax.jit(lambda: SlideLanguageModel(ALIGNER, decoder.config, None, nnx.Rngs(0)))())
    params = drawn | {f"decoder/{name}": x for name, x in flatten(decoder).items()}
    params["projector/kernel"] *= 20  # so that slides matter
    config = {"data": {"encoder": "tiny", "cut": "grid", "edge_um": 64.0, "template": "plain"}}
    return SlideAssistant(unflatten(template, params), config, DecoderTokenizer(folder), "random")


@pytest.fixture(scope="module")
def rows(assistant, tiny_cohort):
    records = Records(tiny_cohort.records)
    return assistant.embed_slides([records.read(i) for i in range(5)])


def test_rows_are_the_slide_and_its_regions(assistant, rows, tiny_cohort):
    records = Records(tiny_cohort.records)
    one = assistant.predictor.encode_slide(records.read(3))
    np.testing.assert_allclose(rows[3][0], one.slide, atol=1e-5)
    np.testing.assert_allclose(rows[3][1:], one.regions, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"beams": 2}])
def test_a_batch_writes_what_each_prompt_alone_does(assistant, rows, more):
    sampling = Sampling(max_new_tokens=12, **more)
    prompts = [assistant.prompt("What does this slide show? " * (1 + i), x) for i, x in enumerate([*rows[:3], None])]
    together = assistant.answer(prompts, sampling)
    alone = [assistant.answer([prompt], sampling)[0] for prompt in prompts]
    assert together == alone and len(set(together)) > 1


def test_a_caption_is_asked_as_training_asked(assistant, rows):
    sampling = Sampling(max_new_tokens=8)
    asked = assistant.prompt("Describe the input pathology whole slide image.", rows[0])
    assert assistant.caption(rows[:1], sampling) == assistant.answer([asked], sampling)
    text = assistant.tokenizer.decode(asked.tokens[asked.tokens >= 0])
    assert text.startswith("Instruction: Describe") and text.endswith("Response: ")


def test_likelihoods_are_those_of_the_decoder(assistant, rows):
    """Each answer as one plain sequence, scored token by token."""
    prompts = [assistant.prompt("A or B?", rows[0]), assistant.prompt("Which of the three is it?", None)]
    answers = [["A", "Glands infiltrate"], ["B", "necrosis is extensive", "no"]]
    found = assistant.choose(prompts, answers)
    for prompt, texts, likelihoods in zip(prompts, answers, found, strict=True):
        for text, likelihood in zip(texts, likelihoods, strict=True):
            tokens, embeds, mask = assistant._inputs([prompt])
            ids = np.append(assistant.tokenizer.text_ids(text), assistant.stop_ids[0])
            whole = np.concatenate([embeds, assistant.model.decoder.embed(ids[None])], axis=1)
            seen = np.concatenate([mask, np.ones((1, len(ids)), bool)], axis=1)
            logits = assistant.model.decoder(inputs_embeds=whole, mask=seen)[0][0]
            shares = jax.nn.log_softmax(logits)[tokens.shape[1] - 1 : -1]
            np.testing.assert_allclose(likelihood, shares[np.arange(len(ids)), ids].sum(), atol=2e-4)


def test_what_cannot_be_asked_is_named(assistant, rows):
    with pytest.raises(ValueError, match="has no words"):
        assistant.prompt(" <image> ", rows[0])
    with pytest.raises(ValueError, match="holds <image> 2 times"):
        assistant.prompt("<image> or <image>?", rows[0])
    later = assistant.prompt("And the margin?", rows[0], [Turn("What is it?", "A tumor.")])
    assert (later.tokens == -1).sum() == 1
    with pytest.raises(ValueError, match=r"256"):
        assistant.answer([assistant.prompt("What? " * 60, rows[0])], Sampling(max_new_tokens=250))


@pytest.fixture
def loaded(assistant, monkeypatch):
    monkeypatch.setattr(assistants, "load_assistant", lambda folder, **more: assistant)
    return assistant


def test_commands_caption_and_ask(loaded, rows, tiny_cohort, capsys):
    slide = [str(tiny_cohort.records), "--slide-id=S00", "--checkpoint=run", "--json"]
    assert cli.main(["caption", *slide, "--max-tokens=8"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"slide_id": "S00", "caption": loaded.caption(rows[:1], Sampling(max_new_tokens=8))[0]}
    question = ["ask", slide[0], "What does this slide show?", *slide[1:]]
    assert cli.main([*question, "--max-tokens=8", "--beams=2", "--min-tokens=2"]) == 0
    assert json.loads(capsys.readouterr().out)["slide_id"] == "S00"
    assert cli.main([*question, "--options", "A=Ductal", "B=Lobular", "C=Normal"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert sum(said["probabilities"].values()) == pytest.approx(1) and said["answer"] in "ABC"
    assert cli.main([*question, "--options", "A=Ductal", "A=Lobular"]) == 2
    assert "each with its own letter" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*question, "--options", "Ductal"])
    assert "expected a letter and a text" in capsys.readouterr().err


def test_a_folder_that_is_no_language_run(tmp_path, capsys, tiny_cohort):
    slide = [str(tiny_cohort.records), "--slide-id=S00", f"--checkpoint={tmp_path}"]
    assert cli.main(["caption", *slide]) == 2
    assert "it is not a run" in capsys.readouterr().err

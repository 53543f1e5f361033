import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pathflip_jax.data.texts.conversations import Conversation, Turn
from pathflip_jax.llm.prompts import (
    IMAGE_ID,
    TEMPLATES,
    Prompted,
    encode_conversation,
    encode_prompt,
    insert_slide,
    stop_ids,
)
from pathflip_jax.llm.tokenizer import DATE, END, DecoderTokenizer

spec = importlib.util.spec_from_file_location("chat_folders", Path(__file__).with_name("chat_folders.py"))
chat_folders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chat_folders)

KINDS = ("qwen2.5", "qwen3", "llama3")
ENDS = {"qwen2.5": "<|im_end|>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {kind: chat_folders.make_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {kind: DecoderTokenizer(folder) for kind, folder in folders.items()}


def conversation(*said):
    turns = tuple(Turn(asked, answer) for asked, answer in zip(said[::2], said[1::2], strict=True))
    return Conversation("train::0", ("S1",), "", turns)


def written(folder, ids):
    """The text of ids with special tokens, and the slide as it is written in a table."""
    names = Tokenizer.from_file(str(folder / "tokenizer.json"))
    runs = np.split(ids, [edge for at in np.flatnonzero(ids < 0) for edge in (at, at + 1)])
    texts = ["<image>" if len(run) and run[0] < 0 else names.decode(run.tolist(), False) for run in runs]
    return "".join(texts)


def learnt(folder, prompted):
    """The texts that are learnt, one for each stretch of them."""
    edges = np.flatnonzero(np.diff(prompted.response.astype(int))) + 1
    runs = np.split(prompted.tokens, edges)
    return [written(folder, run) for run in runs[int(not prompted.response[0]) :: 2]]


@pytest.mark.parametrize("asked", ["What is it?\n<image>", "<image>\nWhat is it?", "What <image> is it?"])
def test_the_plain_template_is_the_papers(folders, tokenizers, asked):
    found = encode_conversation(tokenizers["qwen3"], conversation(asked, "A tumor.", "Why?", "Mitoses."), "plain")
    text = (
        "Instruction: What is it?\nInput pathology whole slide image: <image>.\nResponse: A tumor.<|im_end|>"
        "\nInstruction: Why?\nResponse: Mitoses.<|im_end|>"
    )
    assert written(folders["qwen3"], found.tokens) == text
    assert learnt(folders["qwen3"], found) == ["A tumor.<|im_end|>", "Mitoses.<|im_end|>"]
    assert found.tokens.dtype == np.int32 and found.response.dtype == bool
    assert np.flatnonzero(found.tokens < 0).tolist() == np.flatnonzero(found.tokens == IMAGE_ID).tolist()


def test_a_plain_conversation_begins_and_ends_as_the_tokenizer_does(folders, tokenizers):
    for template in TEMPLATES:  # Llama's chat template writes its first token itself
        found = encode_conversation(tokenizers["llama3"], conversation("<image>\nWhat?", "A."), template)
        text = written(folders["llama3"], found.tokens)
        assert text.startswith("<|begin_of_text|>") and text.count("<|begin_of_text|>") == 1
        assert text.endswith(END if template == "plain" else "<|eot_id|>")


def test_what_a_chat_template_writes(folders, tokenizers):
    said = ("Look: <image>\nWhat?", "A tumor.", "Why?", "Mitoses.")
    texts = {
        "qwen2.5": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nLook: <image>\nWhat?"
        "<|im_end|>\n<|im_start|>assistant\nA tumor.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nMitoses.<|im_end|>\n",
        "qwen3": "<|im_start|>user\nLook: <image>\nWhat?<|im_end|>\n<|im_start|>assistant\nA tumor.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nMitoses.<|im_end|>\n",
        "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nLook: <image>\nWhat?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\nA tumor.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nMitoses.<|eot_id|>",
    }
    for kind, text in texts.items():
        found = encode_conversation(tokenizers[kind], conversation(*said), "chat")
        assert written(folders[kind], found.tokens) == text
        assert learnt(folders[kind], found) == [f"A tumor.{ENDS[kind]}", f"Mitoses.{ENDS[kind]}"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "said",
    [
        ("What is the diagnosis?<image>", "It is an adenocarcinoma, grade 2."),
        (" <image>Is it malignant?\nA. Yes\nB. No ", "A ", "Why?", "Necrosis is extensive.", "And?", "1.8 cm"),
    ],
)
def test_ids_are_those_of_transformers(folders, tokenizers, kind, said):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folders[kind])
    found = insert_slide(encode_conversation(tokenizers[kind], conversation(*said), "chat"), rows=0)
    chat = [
        {"role": ("user", "assistant")[i % 2], "content": text.replace("<image>", "").strip()}
        for i, text in enumerate(said)
    ]
    options = {"return_dict": False, "date_string": DATE}
    assert found.tokens.tolist() == theirs.apply_chat_template(chat, **options)
    options |= {"enable_thinking": False, "add_generation_prompt": True}
    turns = conversation(*said).turns
    prompt = encode_prompt(tokenizers[kind], turns[:-1], turns[-1].asked, "chat")
    assert prompt[prompt >= 0].tolist() == theirs.apply_chat_template(chat[:-1], **options)


texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=8) | st.sampled_from(
    ["Is it malignant?", "<|im_end|>", "<|eot_id|>\n", "<think>\n\n</think>", END, "{{ 1 }}", "\ue0000\ue001", " A. "]
)


@settings(deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(TEMPLATES),
    st.tuples(texts, texts),
    st.lists(st.tuples(texts, texts), max_size=2),
    texts,
)
def test_a_prompt_is_what_stands_before_the_last_answer(folders, tokenizers, kind, template, first, pairs, answer):
    tokenizer, said = tokenizers[kind], ["<image>".join(first)]
    for earlier, asked in pairs:
        said += [earlier, asked]
    talk = conversation(*said, answer)
    tokens, response = encode_conversation(tokenizer, talk, template)
    prompt = encode_prompt(tokenizer, talk.turns[:-1], said[-1], template)
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert (prompt == IMAGE_ID).sum() == 1
    # What follows is the answer, what ends it, and at most a line end that is not learnt.
    end = ENDS[kind] if template == "chat" else {"llama3": END, "qwen2.5": END, "qwen3": "<|im_end|>"}[kind]
    names = Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    rest, learnt_rest = tokens[len(prompt) :], response[len(prompt) :]
    assert rest[learnt_rest].tolist() == [*tokenizer.text_ids(answer.strip()), names.token_to_id(end)]
    assert names.decode(rest[~learnt_rest].tolist(), False) in ("", "\n")
    # No word that was written became a special token: there are as many as without any.
    added = [*names.get_added_tokens_decoder()]
    silent = encode_conversation(tokenizer, conversation("<image>", *[""] * len(said)), template)
    assert np.isin(tokens, added).sum() == np.isin(silent.tokens, added).sum()


def test_soft_tokens_take_the_place_of_the_slide(tokenizers):
    prompted = encode_conversation(tokenizers["qwen3"], conversation("What?<image> Hm?", "A."), "chat")
    (at,) = np.flatnonzero(prompted.tokens == IMAGE_ID)
    tokens, response = insert_slide(prompted, rows=3)
    assert tokens[at : at + 3].tolist() == [-1, -2, -3] and not response[at : at + 3].any()
    assert np.delete(tokens, [at, at + 1, at + 2]).tolist() == np.delete(prompted.tokens, at).tolist()
    assert np.delete(response, [at, at + 1, at + 2]).tolist() == np.delete(prompted.response, at).tolist()
    assert tokens.dtype == np.int32 and response.dtype == bool
    assert insert_slide(prompted, rows=0).tokens.tolist() == np.delete(prompted.tokens, at).tolist()
    assert insert_slide(prompted, rows=1).tokens.tolist() == prompted.tokens.tolist()
    prompt = encode_prompt(tokenizers["qwen3"], (), "What?<image>", "chat")
    assert (insert_slide(Prompted(prompt, np.zeros(len(prompt), bool)), 2).tokens < 0).sum() == 2


@pytest.mark.parametrize("ids", [[1, 2], [1, -1, -1], [-1, -2], [-2, 3]])
def test_a_slide_that_does_not_stand_once(ids):
    with pytest.raises(ValueError, match="expected one -1 for the slide; pass a result"):
        insert_slide(Prompted(np.array(ids), np.zeros(len(ids), bool)), 2)
    with pytest.raises(ValueError, match="-1 soft tokens; expected 0 or more"):
        insert_slide(Prompted(np.array([-1]), np.zeros(1, bool)), -1)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    ("said", "message"),
    [
        (("What?", "A."), "the first question, 'What\\?', holds <image> 0 times; write it once"),
        (("<image><image>What?", "A."), "holds <image> 2 times"),
        (("What?", "A.", "<image>Why?", "B."), "holds <image> 0 times"),
        (
            ("<image>What?", "A.", "<image>Why?", "B."),
            "<image> in '<image>Why\\?'; only the first question may",
        ),
        (("<image>What?", "<image>", "Why?", "B."), "<image> in '<image>'; only the first question may contain it"),
        (("<image>What?", "An <image>."), "<image> in the answer"),
    ],
)
def test_slides_that_stand_elsewhere(tokenizers, template, said, message):
    with pytest.raises(ValueError, match=f"conversation train::0: .*{message}"):
        encode_conversation(tokenizers["qwen3"], conversation(*said), template)


def test_templates_of_another_name(tokenizers):
    with pytest.raises(ValueError, match="template 'vicuna': expected one of plain, chat"):
        encode_prompt(tokenizers["qwen3"], (), "<image>What?", "vicuna")


def test_the_ids_at_which_an_answer_ends(folders, tokenizers):
    base = tokenizers["qwen2.5"]  # as a base model: no setting names the end of a turn
    names = Tokenizer.from_file(str(folders["qwen2.5"] / "tokenizer.json"))
    assert stop_ids(base, "plain") == base.stop_ids == (names.token_to_id(END),)
    assert stop_ids(base, "chat") == (names.token_to_id(END), names.token_to_id("<|im_end|>"))
    for kind in ("qwen3", "llama3"):
        assert stop_ids(tokenizers[kind], "chat") == tokenizers[kind].stop_ids


LOOP = "{%% for message in messages %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, 'no chat template in it; use the template "plain"'),
        (LOOP % "{{ message.role }}", "writes numbers none, expected each once"),
        (LOOP % "{{ message.content * 2 }}<|im_end|>", "writes numbers 0, 0, expected each once"),
        (LOOP % "{{ messages[-1].content }}<|im_end|>", "writes numbers 0, expected|writes numbers 1, 1, expected"),
        (LOOP % "{{ message.content }}\n", "puts no special token after an answer"),
        (LOOP % "{{ raise_exception('no roles') }}", "its chat template fails .TemplateError: no roles."),
    ],
)
def test_chat_templates_that_cannot_be_learnt(folders, tmp_path, template, message):
    folder = tmp_path / "folder"
    DecoderTokenizer(folders["qwen3"]).save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    with pytest.raises(ValueError, match=f"folder: .*({message})"):
        encode_conversation(DecoderTokenizer(folder), conversation("<image>What?", "A."), "chat")
    assert len(encode_prompt(DecoderTokenizer(folder), (), "<image>What?", "plain"))


def test_a_generation_prompt_of_its_own_is_learnt_too(folders, tmp_path):
    """The prompt for generation counts where a template begins a known answer differently from one to be generated."""
    DecoderTokenizer(folders["qwen3"]).save(tmp_path)
    template = (
        LOOP % "<|im_start|>{{ message.role }}\n {{ message.content }} <|im_end|><|endoftext|>\n"
        + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    found = encode_conversation(DecoderTokenizer(tmp_path), conversation("<image>What?", "A.", "Why?", "B."), "chat")
    assert written(tmp_path, found.tokens) == (
        "<|im_start|>user\n <image>What? <|im_end|><|endoftext|>\n<|im_start|>assistant\n A. <|im_end|><|endoftext|>\n"
        "<|im_start|>user\n Why? <|im_end|><|endoftext|>\n<|im_start|>assistant\n<think>\nB. <|im_end|><|endoftext|>\n"
    )
    assert learnt(tmp_path, found) == ["A. <|im_end|><|endoftext|>", "B. <|im_end|><|endoftext|>"]

import importlib.util
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pathflip_jax.llm.tokenizer import DATE, END, DecoderTokenizer, train_bpe

spec = importlib.util.spec_from_file_location("chat_folders", Path(__file__).with_name("chat_folders.py"))
chat_folders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(chat_folders)

KINDS = ("qwen2.5", "qwen3", "llama3")
WRITTEN = [
    "The tumor is 1.8 cm.\n\n Grade 2;  it's G2\t-",
    "Größe µm 染色 \u200b e\u0301",
    "<|im_end|> [END] <|endoftext|><think>",
    " leading and trailing ",
    "",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {kind: chat_folders.make_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def theirs(folders):
    transformers = pytest.importorskip("transformers")
    return {kind: transformers.AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


@pytest.fixture
def folder(tmp_path):
    """A folder that a test may spoil."""
    return chat_folders.make_folder(tmp_path / "spoilt", "qwen3")


def change(folder, name, **values):
    path = folder / name
    held = json.loads(path.read_text()) if path.exists() else {}
    held = {key: value for key, value in (held | values).items() if value is not ...}
    path.write_text(json.dumps(held))


def spoken(*said):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", WRITTEN)
def test_ids_are_those_of_transformers(folders, theirs, kind, text):
    ours = DecoderTokenizer(folders[kind])
    assert ours.ids(text).dtype == np.int32
    assert ours.ids(text).tolist() == theirs[kind](text, add_special_tokens=False)["input_ids"]
    assert [*ours.prefix(), *ours.ids(text)] == theirs[kind](text)["input_ids"]
    ids = theirs[kind](text)["input_ids"]
    assert ours.decode(np.array(ids)) == theirs[kind].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", WRITTEN)
def test_what_somebody_wrote_never_becomes_a_special_token(folders, kind, text):
    ours = DecoderTokenizer(folders[kind])
    added = set(Tokenizer.from_file(str(folders[kind] / "tokenizer.json")).get_added_tokens_decoder())
    ids = ours.text_ids(text)
    assert not added & {*ids.tolist()}
    assert ours.decode(ids) == unicodedata.normalize("NFC", text)
    if not any(token in text for token in ours._added.values()):
        assert ids.tolist() == ours.ids(text).tolist()


def test_a_text_that_cannot_be_told_from_a_special_token_is_refused(tmp_path):
    vocabulary = {"<unk>": 0, "tumor": 1, "<end>": 2}
    tokenizer = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        "post_processor": None, "decoder": None, "truncation": None, "padding": None,
    }  # fmt: skip
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": 2, "content": "<end>"} | flags]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    ours = DecoderTokenizer(tmp_path)
    assert ours.text_ids("tumor").tolist() == [1]
    with pytest.raises(ValueError, match="'tumor <end>' cannot be distinguished from the special token '<end>'"):
        ours.text_ids("tumor <end>")


def test_sizes_ends_and_padding(folders):
    tokens = {kind: Tokenizer.from_file(str(folder / "tokenizer.json")) for kind, folder in folders.items()}
    ours = {kind: DecoderTokenizer(folder) for kind, folder in folders.items()}
    for kind, tokenizer in ours.items():
        assert tokenizer.vocab_size == tokens[kind].get_vocab_size() == max(tokens[kind].get_vocab().values()) + 1
        assert tokenizer.has_chat_template
    end = {kind: tokens[kind].token_to_id(END) for kind in KINDS}
    assert ours["qwen2.5"].stop_ids == (end["qwen2.5"],)
    assert ours["qwen3"].stop_ids == (tokens["qwen3"].token_to_id("<|im_end|>"), end["qwen3"])
    assert ours["llama3"].stop_ids == (end["llama3"], tokens["llama3"].token_to_id("<|eot_id|>"))
    assert ours["qwen3"].pad_id == end["qwen3"]
    assert ours["llama3"].pad_id == end["llama3"]  # names no padding: the first end
    assert ours["qwen3"].prefix().tolist() == []
    assert ours["llama3"].prefix().tolist() == [tokens["llama3"].token_to_id("<|begin_of_text|>")]


def test_ends_and_padding_by_every_file_that_may_name_them(folder):
    (folder / "generation_config.json").unlink()
    end, turn = (Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(t) for t in (END, "<|im_end|>"))
    assert DecoderTokenizer(folder).stop_ids == (turn,)
    change(folder, "config.json", eos_token_id=end, pad_token_id=7)
    change(folder, "tokenizer_config.json", pad_token=...)
    assert (DecoderTokenizer(folder).stop_ids, DecoderTokenizer(folder).pad_id) == ((end, turn), 7)
    change(folder, "generation_config.json", eos_token_id=[5, end], pad_token_id=6)
    assert (DecoderTokenizer(folder).stop_ids, DecoderTokenizer(folder).pad_id) == ((5, end, turn), 6)
    change(folder, "tokenizer_config.json", eos_token=...)
    change(folder, "special_tokens_map.json", eos_token={"content": "<think>"}, pad_token=END)
    assert DecoderTokenizer(folder).stop_ids[:2] == (5, end) and len(DecoderTokenizer(folder).stop_ids) == 3
    assert DecoderTokenizer(folder).pad_id == end
    for name in ("generation_config.json", "config.json", "special_tokens_map.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no file says which token ends a text; add a tokenizer_config.json"):
        DecoderTokenizer(folder)


def test_the_settings_say_whether_a_token_begins_texts(folders, tmp_path):
    kept = DecoderTokenizer(folders["llama3"])
    kept.save(tmp_path)
    change(tmp_path, "tokenizer_config.json", add_bos_token=False)
    assert DecoderTokenizer(tmp_path).prefix().tolist() == []
    change(tmp_path, "tokenizer_config.json", add_bos_token=True)
    assert DecoderTokenizer(tmp_path).prefix().tolist() == kept.prefix().tolist() != []


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("generation_config.json", {"eos_token_id": 10**6}, "eos_token_id is 1000000, expected ids from 0 to"),
        ("generation_config.json", {"eos_token_id": [True]}, "eos_token_id is \\[True\\]"),
        ("config.json", {"pad_token_id": "0"}, "config.json: pad_token_id is '0'"),
        ("tokenizer_config.json", {"eos_token": "<none>"}, "eos_token is '<none>', which tokenizer.json does not hold"),
        ("tokenizer_config.json", {"pad_token": 3}, "tokenizer_config.json: pad_token is 3, expected a token's text"),
        ("tokenizer_config.json", {"chat_template": 3}, "chat_template is 3, expected a text"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "of which one is called default"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": "<x>"}}}, "'<x>' has id 3, .* None"),
    ],
)
def test_files_that_contradict_each_other(folder, name, values, message):
    change(folder, name, **values)
    if name != "config.json":
        with pytest.raises(ValueError, match=message):
            DecoderTokenizer(folder).render(spoken("A"))
    else:
        change(folder, "tokenizer_config.json", pad_token=...)
        with pytest.raises(ValueError, match=message):
            DecoderTokenizer(folder)


ids = st.integers(-2, 500) | st.none() | st.booleans() | st.text(max_size=3) | st.lists(st.integers(0, 9), max_size=2)
tokens = st.sampled_from([END, "<|im_end|>", "<think>", "absent", None, 3, {"content": END}, {}, []])
settings_files = {
    "generation_config.json": st.fixed_dictionaries({}, optional={"eos_token_id": ids, "pad_token_id": ids}),
    "tokenizer_config.json": st.fixed_dictionaries(
        {},
        optional={"eos_token": tokens, "pad_token": tokens, "bos_token": tokens, "add_bos_token": st.booleans() | ids}
        | {"added_tokens_decoder": st.dictionaries(st.text("0123", max_size=3), tokens, max_size=2) | tokens}
        | {"chat_template": tokens | st.lists(tokens | st.dictionaries(st.sampled_from(["name", "template"]), tokens))},
    ),
}


@settings(deadline=None)
@given(st.fixed_dictionaries(settings_files))
def test_hostile_settings_raise_nothing_but_value_errors(folders, tmp_path_factory, files):
    folder = tmp_path_factory.getbasetemp() / "hostile_settings"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_bytes((folders["qwen3"] / "tokenizer.json").read_bytes())
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    try:
        ours = DecoderTokenizer(folder)
        ours.render(spoken("A"))
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert all(0 <= number < ours.vocab_size for number in (*ours.stop_ids, ours.pad_id, *ours.prefix()))


@settings(deadline=None)
@given(st.data())
def test_a_damaged_vocabulary_raises_nothing_but_value_errors(folders, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged_vocabulary"
    folder.mkdir(exist_ok=True)
    parts = json.loads((folders["llama3"] / "tokenizer.json").read_text())
    where = parts
    for _ in range(data.draw(st.integers(0, 3))):  # one value, somewhere, becomes another
        inner = list(where.values()) if isinstance(where, dict) else where
        inner = [value for value in inner if isinstance(value, dict | list) and value]
        where = data.draw(st.sampled_from(inner)) if inner else where
    key = data.draw(st.sampled_from(list(where) if isinstance(where, dict) else range(len(where))))
    where[key] = data.draw(st.none() | st.integers(-1, 2**70) | st.text(max_size=3) | st.just([]) | st.just({}))
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    (folder / "tokenizer_config.json").write_bytes((folders["llama3"] / "tokenizer_config.json").read_bytes())
    try:
        DecoderTokenizer(folder).text_ids("The tumor.")
    except ValueError as error:
        assert str(folder) in str(error)


def test_damaged_folders(folder, tmp_path):
    for name in ("tokenizer_config.json", "tokenizer.json", "generation_config.json"):
        held = (folder / name).read_bytes()
        for damage in (b"", held[:20], b"[]", b"\xff", b"[" * 100_000):
            (folder / name).write_bytes(damage)
            with pytest.raises(ValueError, match=f"{name}: .*copy the file again"):
                DecoderTokenizer(folder)
        (folder / name).write_bytes(held)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja: not UTF-8 .byte 0."):
        DecoderTokenizer(folder).render(spoken("A"))
    with pytest.raises(FileNotFoundError, match="absent: no tokenizer.json in it; .*save_pretrained"):
        DecoderTokenizer(tmp_path / "absent")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        ("What is it?",),
        ("What is it?", "A tumor. "),
        ("What is it?", "A tumor.", " And <b>why</b>?\n"),
        ("What?", "<think>\nHm.\n</think>\n\nA tumor.", "Why?", "<think>\nWell.\n</think>\n\nMitoses."),
        ("What?", "A tumor.", "Why?", "\n\nMitoses."),
    ],
)
def test_chats_are_written_as_transformers_does(folders, theirs, kind, said, thinking):
    ours = DecoderTokenizer(folders[kind])
    asked = {"add_generation_prompt": len(said) % 2 == 1, "enable_thinking": thinking}
    expected = theirs[kind].apply_chat_template(spoken(*said), tokenize=False, date_string=DATE, **asked)
    assert ours.render(spoken(*said), **asked) == expected


@pytest.mark.parametrize(
    "template",
    [
        "  {% if true %}\n    a\n  {% endif %}\n{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }}",
        "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{% set x = 1 %}{% generation %}\n{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}{{ bos_token }}{{ nobody }}",
        "{{ dict(a=1).items() | list }}{% set ns = namespace({'a': 1}, b=2) %}{% set ns.a = 3 %}{{ ns.a + ns.b }}",
        "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ eos_token }}{{ pad_token }}",
        "{{ strftime_now('%Y') | length }}",
    ],
)
def test_templates_find_what_transformers_gives_them(folder, template):
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(template)  # wins over tokenizer_config.json
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = spoken("<Größe> & 'more'")
    assert DecoderTokenizer(folder).render(chat) == theirs.apply_chat_template(chat, tokenize=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__.mro()[1].__subclasses__()[0]('x') }}",
        "{{ messages.append(messages[0]) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ '%s'.format.__globals__ }}{{ 1 / 0 }}",
        "{{ range(10 ** 9) | list }}",
        "{% for message in messages %}",
        "{{ messages | nofilter }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'tokenizer.json' %}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match='spoilt: its chat template fails .*; use the template "plain"'):
        DecoderTokenizer(folder).render(spoken("A"))


def test_a_folder_without_a_template(folder):
    change(folder, "tokenizer_config.json", chat_template=...)
    ours = DecoderTokenizer(folder)
    assert not ours.has_chat_template
    with pytest.raises(ValueError, match='spoilt: no chat template in it; use the template "plain"'):
        ours.render(spoken("A"))
    change(folder, "chat_template.json", chat_template="{{ messages[0].content }}!")
    assert DecoderTokenizer(folder).render(spoken("A")) == "A!"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_read(folders, kind, tmp_path):
    ours = DecoderTokenizer(folders[kind])
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "qwen3"}')
    ours.save(tmp_path / "saved")
    ours.save(tmp_path / "saved")
    again = DecoderTokenizer(str(tmp_path / "saved"))
    for name in ("vocab_size", "stop_ids", "pad_id", "special_ids"):
        assert getattr(again, name) == getattr(ours, name)
    assert again.render(spoken("A", "B")) == ours.render(spoken("A", "B"))
    assert again.ids(WRITTEN[0]).tolist() == ours.ids(WRITTEN[0]).tolist()
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == {"model_type": "qwen3"}
    held = sorted(path.name for path in folders[kind].iterdir())
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted([*held, "config.json"])


def test_folders_behind_urls(folders):
    from upath import UPath

    place = "memory://decoders/qwen3"
    ours = DecoderTokenizer(folders["qwen3"])
    ours.save(place)
    again = DecoderTokenizer(UPath(place))
    assert again.stop_ids == ours.stop_ids
    assert again.ids(WRITTEN[0]).tolist() == ours.ids(WRITTEN[0]).tolist()


@pytest.mark.parametrize("model_type", [None, "qwen3", "qwen2", "llama"])
def test_a_learnt_vocabulary_is_that_of_transformers(tmp_path, model_type):
    transformers = pytest.importorskip("transformers")
    train_bpe(chat_folders.TEXTS * 3, tmp_path, vocab_size=320)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), DecoderTokenizer(tmp_path)
    assert ours.vocab_size == len(theirs) <= 320
    assert ours.stop_ids == (theirs.eos_token_id,) and ours.pad_id == theirs.pad_token_id == theirs.eos_token_id
    assert ours.prefix().tolist() == [] and not ours.has_chat_template
    for text in (*WRITTEN, *chat_folders.TEXTS):
        assert ours.ids(text).tolist() == theirs(text)["input_ids"]
    assert len(ours.ids(chat_folders.TEXTS[0])) < len(chat_folders.TEXTS[0]) / 1.5


def test_the_same_texts_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        train_bpe(iter(chat_folders.TEXTS * 2), tmp_path / name, vocab_size=350)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_cannot_be_learnt_from(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 256 is below the 256 bytes .* at least 257"):
        train_bpe(["A."], tmp_path, vocab_size=256)
    with pytest.raises(ValueError, match="all texts are empty"):
        train_bpe(["", " "], tmp_path)
    train_bpe(["A."], tmp_path, vocab_size=257)
    assert DecoderTokenizer(tmp_path).vocab_size == 257


@pytest.fixture(scope="module")
def qwen(folders):
    return DecoderTokenizer(folders["qwen3"])


@given(st.text(st.characters(codec="utf-8")))
def test_any_text_is_written_and_read(qwen, text):
    assert qwen.decode(qwen.text_ids(text)) == unicodedata.normalize("NFC", text)


def test_neither_torch_nor_transformers_is_imported():
    code = "import pathflip_jax.llm.prompts, sys; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

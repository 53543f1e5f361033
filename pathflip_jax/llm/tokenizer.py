"""Tokenizer of a decoder's Hugging Face folder, with its chat template (DESIGN, section 7).

Only `tokenizers` and jinja2 are used, not transformers. A chat template is untrusted code: it is rendered in jinja2's
sandbox, and no other code of a folder ever runs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Int
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.files import Place, as_path, make_folder, read_many
from pathflip_jax.data.storage.json_values import json_object

END = "<|endoftext|>"  # end and padding token of tokenizers trained here
#: Date that Llama 3's templates write: their default, so that prompts do not change from day to day.
DATE = "26 Jul 2024"
_OBJECTS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    "chat_template.json",
    "chat_templates.json",
)
_FILES = ("tokenizer.json", "chat_template.jinja", *_OBJECTS)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Pre-tokenization as in Qwen: contractions, letters, single digits, signs, line ends, white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class DecoderTokenizer:
    """Tokenizer of a language model's Hugging Face folder: tokenizer.json and the settings files next to it.

    `vocab_size` is the largest id + 1, which may be less than the rows of the model's embedding. `stop_ids` are the
    end-of-text ids in any file of the folder, those of generation_config.json first; `pad_id` is the first of them
    where no file names a padding token. `special_ids` are those of special tokens.

    Raises FileNotFoundError without a tokenizer.json, ValueError naming the file that is damaged or contradicts it.
    """

    def __init__(self, folder: str | Place) -> None:
        self.folder = as_path(folder)
        found = zip(_FILES, read_many([self.folder / name for name in _FILES]), strict=True)
        self._files = {name: data for name, data in found if data is not None}
        if "tokenizer.json" not in self._files:
            raise FileNotFoundError(
                f"{self.folder}: no tokenizer.json in it; pass the Hugging Face folder of a decoder. If it has other "
                "tokenizer files, write it by AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of "
                "transformers"
            )
        self._tokenizer = self._read_tokenizer()
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {number: token.content for number, token in added.items()}
        self._texts = self._read_tokenizer()  # a tokenizer that treats special tokens as ordinary text
        self._texts.add_special_tokens([AddedToken(token, special=True) for token in self._added.values()])
        self._texts.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.vocab_size < 2**31:
            raise ValueError(
                f"{self.folder / 'tokenizer.json'}: its largest id is {self.vocab_size - 1}; copy the file again"
            )
        self._objects = {
            name: json_object(self.folder / name, self._files[name]) for name in _OBJECTS if name in self._files
        }
        self._check_added()
        self._named = self._named_tokens()
        self.stop_ids = self._stop_ids()
        self.pad_id = self._pad_id()
        self.special_ids = frozenset(number for number, token in added.items() if token.special) | {*self.stop_ids}
        self._prefix = self._read_prefix()

    @property
    def described(self) -> dict[str, Any]:
        """Content of its tokenizer.json."""
        return json_object(self.folder / "tokenizer.json", self._files["tokenizer.json"])

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder has a chat template."""
        return self._template_text is not None

    def ids(self, text: str) -> Int[np.ndarray, "T"]:
        """Ids of a text; special tokens spelt in it are recognised, none is added."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def text_ids(self, text: str) -> Int[np.ndarray, "T"]:
        """Ids of user text: a special token spelt in it stays ordinary text.

        Raises ValueError naming the token where this vocabulary has no other spelling for it.
        """
        ids = np.array(self._texts.encode(text, add_special_tokens=False).ids, np.int32)
        for number in self._added.keys() & {*ids.tolist()}:
            raise ValueError(
                f"{self.folder}: the text {text!r:.60} cannot be distinguished from the special token "
                f"{self._added[number]!r}; remove it from the text"
            )
        return ids

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        """Text of ids, without special tokens."""
        return self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)

    def prefix(self) -> Int[np.ndarray, "t"]:
        """Ids that precede any text: Llama's BOS, none for Qwen. Chat templates include them already."""
        return self._prefix.copy()

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = False,
        enable_thinking: bool = False,
    ) -> str:
        """Render a conversation by the folder's chat template, from messages with a `role` and a `content`.

        As `apply_chat_template` of transformers, with DATE as today's date. Raises ValueError where there is no
        template, and with the template's error message where it fails.
        """
        self.require_chat_template()
        settings = {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking}
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                date_string=DATE,
                **self._named,
                **settings,
            )
        except Exception as error:  # untrusted code may raise anything
            raise ValueError(
                f"{self.folder}: its chat template fails ({type(error).__name__}: {error!s:.200}); use the template "
                '"plain", or fix it'
            ) from error

    def require_chat_template(self) -> None:
        """Raise ValueError where the folder has no chat template."""
        if not self.has_chat_template:
            raise ValueError(
                f'{self.folder}: no chat template in it; use the template "plain", or the folder of a chat model '
                "(with chat_template.jinja, or chat_template in tokenizer_config.json)"
            )

    def save(self, folder: str | Place) -> None:
        """Write a folder (without weights) that restores the same tokenizer; an existing config.json is kept."""
        folder = as_path(folder)
        make_folder(folder)
        held = read_many([folder / name for name in self._files])
        for (name, data), before in zip(self._files.items(), held, strict=True):
            if before != data and (name != "config.json" or before is None):
                with atomic_file(folder / name) as out:
                    out.write(data)

    def _read_tokenizer(self) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_buffer(self._files["tokenizer.json"])
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode("a")  # some damage shows only here
        except BaseException as error:  # tokenizers raises bare Exception, or panics, which is not an Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"{self.folder / 'tokenizer.json'}: not a tokenizer ({error!s:.200}); copy the file again"
            ) from error
        return tokenizer

    def _named_tokens(self) -> dict[str, str]:
        """Named tokens of tokenizer_config.json, else of special_tokens_map.json: eos_token and so on."""
        named = {}
        for name in _NAMED:
            for file in ("tokenizer_config.json", "special_tokens_map.json"):
                value = self._objects.get(file, {}).get(name)
                token = value.get("content") if isinstance(value, dict) else value
                if token is None:
                    continue
                if not isinstance(token, str):
                    raise ValueError(f"{self.folder / file}: {name} is {value!r:.60}, expected a token's text")
                named.setdefault(name, token)
        return named

    def _check_added(self) -> None:
        """Refuse a folder whose settings add tokens that tokenizer.json lacks: their ids would differ."""
        stated = self._objects.get("tokenizer_config.json", {}).get("added_tokens_decoder")
        for number, token in stated.items() if isinstance(stated, dict) else ():
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and str(self._tokenizer.token_to_id(text)) != number:
                raise ValueError(
                    f"{self.folder / 'tokenizer_config.json'}: the token {text!r:.60} has id {number:.20}, but in "
                    f"tokenizer.json {self._tokenizer.token_to_id(text)}; copy the files again, all from one model"
                )

    def _id(self, name: str) -> int | None:
        """Id of a named token."""
        if name not in self._named:
            return None
        number = self._tokenizer.token_to_id(self._named[name])
        if number is None:
            raise ValueError(
                f"{self.folder}: {name} is {self._named[name]!r:.60}, which tokenizer.json does not hold; copy the "
                "tokenizer's files again, all from one model"
            )
        return number

    def _stated_ids(self, file: str, name: str) -> list[int]:
        """Ids of a setting that is an id, a list of ids, or absent."""
        value = self._objects.get(file, {}).get(name)
        numbers = [] if value is None else value if isinstance(value, list) else [value]
        for number in numbers:
            if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < self.vocab_size:
                raise ValueError(
                    f"{self.folder / file}: {name} is {value!r:.60}, expected ids from 0 to {self.vocab_size - 1} as "
                    "in tokenizer.json; copy the files again, all from one model"
                )
        return numbers

    def _stop_ids(self) -> tuple[int, ...]:
        stated = [self._stated_ids(file, "eos_token_id") for file in ("generation_config.json", "config.json")]
        named = self._id("eos_token")
        found = [*stated[0], *stated[1], *([] if named is None else [named])]
        if not found:
            raise ValueError(
                f"{self.folder}: no file says which token ends a text; add a tokenizer_config.json with an eos_token"
            )
        return tuple(dict.fromkeys(found))

    def _pad_id(self) -> int:
        named = self._id("pad_token")
        if named is not None:
            return named
        stated = [self._stated_ids(file, "pad_token_id") for file in ("generation_config.json", "config.json")]
        return [*stated[0], *stated[1], *self.stop_ids][0]

    def _read_prefix(self) -> Int[np.ndarray, "t"]:
        begins = self._objects.get("tokenizer_config.json", {}).get("add_bos_token")
        if isinstance(begins, bool):  # it overrides tokenizer.json, as in transformers
            number = self._id("bos_token") if begins else None
            return np.array([] if number is None else [number], np.int32)
        encoding = self._tokenizer.encode("a")
        count = (*encoding.special_tokens_mask, 0).index(0)
        return np.array(encoding.ids[:count], np.int32)

    @cached_property
    def _template_text(self) -> str | None:
        if "chat_template.jinja" in self._files:
            try:
                return self._files["chat_template.jinja"].decode("utf-8")
            except UnicodeDecodeError as error:
                path = self.folder / "chat_template.jinja"
                raise ValueError(f"{path}: not UTF-8 (byte {error.start}); copy the file again") from error
        for file in ("tokenizer_config.json", "chat_template.json", "chat_templates.json"):
            found = self._objects.get(file, {}).get("chat_template")
            if isinstance(found, list):  # one of several templates, by name
                usual = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
                found = usual[0].get("template", found) if usual else found
            if found is not None and not isinstance(found, str):
                raise ValueError(
                    f"{self.folder / file}: chat_template is {found!r:.60}, expected a text, or a list of "
                    '{"name", "template"} of which one is called default'
                )
            if found is not None:
                return found
        return None

    @cached_property
    def _template(self) -> jinja2.Template:
        return _sandbox().from_string(self._template_text)


class _Generation(Extension):
    """jinja2 tag `{% generation %} ... {% endgeneration %}` around assistant messages, without effect on the text."""

    tags = {"generation"}

    def parse(self, parser):
        """Parse the enclosed statements into their own variable scope."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without the names by which a template could reach Python internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*given, **values).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _sandbox() -> ImmutableSandboxedEnvironment:
    """Environment that chat templates are written for, as set up by transformers."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )  # jinja2's own escapes HTML

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": _Namespace,
        "dict": lambda *given, **values: dict(*given, **values),
    }
    return sandbox


def train_bpe(texts: Iterable[str], folder: str | Place, vocab_size: int = 2000) -> None:
    """Learn a byte-level BPE vocabulary from texts and write it as a Hugging Face folder without weights.

    END is the end and padding token. Any text can be encoded, as every byte is a token; the same texts give the same
    files. A small corpus may yield fewer tokens than `vocab_size`. Raises ValueError when the bytes alone do not fit,
    and for texts that are all empty.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(letters) + 1:
        raise ValueError(
            f"vocab_size {vocab_size} is below the {len(letters)} bytes and {END}; pass at least {len(letters) + 1}"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError("no words to learn a vocabulary from: all texts are empty")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=letters, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": END, "pad_token": END, "add_bos_token": False}
    files = {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": json.dumps(settings, indent=2)}
    folder = as_path(folder)
    make_folder(folder)
    for name, text in files.items():
        with atomic_file(folder / name) as out:
            out.write(f"{text}\n".encode())

"""A benchmark as one file: YAML that names records, slides, texts, prompts and labels of one or several tasks.

The keys are the options of `pathflip evaluate`; paths are relative to the file. What stands at the top holds for every
task of `tasks`, which may say otherwise:

    records: records
    slides: slides.csv
    tasks:
      subtypes: {prompts: tcga-rcc, few-shot: [1, 4, 16]}
      mutations: {few-shot: [16, all], labels: [tp53, kras], label-table: mutations.csv}
"""

import difflib
from collections.abc import Mapping
from pathlib import Path

import yaml

from pathflip_jax.data.storage.files import as_path
from pathflip_jax.data.storage.paths import expand
from pathflip_jax.evaluate.prompt_files import SHIPPED
from pathflip_jax.evaluate.protocols import PROTOCOLS
from pathflip_jax.grounding.maps import METHODS
from pathflip_jax.runs.bounds import OPTIONS

TASKS = "tasks"
# PyYAML lets through what its own constructors stumble over ("!!int" with nothing behind it is an IndexError).
_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
PLACES = {"records", "slides", "texts", "region-texts", "label-table", "questions", "language"}  # or URLs
FILES = {"prompts", "grounding", "outlines", "images", "concepts"}
CHOICES = {"split": None, "lesions": None, "protocol": PROTOCOLS, "method": METHODS}
NUMBERS = {"seed", "draws", "window", "clear", "max-tokens", "min-tokens", "beams", "smooth"}
NUMBERS |= {"length-penalty", "repetition-penalty"}
LISTS = {"few-shot", "labels", "compare-to"}
FLAGS = {"strict"}
KEYS = sorted(PLACES | FILES | set(CHOICES) | NUMBERS | LISTS | FLAGS)


def read_tasks(path) -> dict[str, dict]:
    """The settings of every task by its name, named as the options are in Python; without `tasks` one, named "".

    Raises ValueError naming the file for what is no YAML, for a key given twice or unknown, and for values of another
    kind than the option takes.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: not YAML ({str(error) or 'nested too deeply'})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected keys such as records, slides and prompts, found {type(content).__name__}")
    tasks = content.pop(TASKS, {"": {}})
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"{path}: {TASKS} must name tasks, each with its own keys")
    shared = _settings(path, content)
    found = {}
    for name, own in tasks.items():
        if name and (Path(str(name)).name != str(name) or str(name).startswith(".")):
            raise ValueError(f"{path}: the task {name!r} names a folder of results; use letters, digits, - and _")
        if not isinstance(own, dict | None):
            raise ValueError(f"{path}: the task {name!r} must hold keys, found {own!r:.60}")
        found[str(name)] = shared | _settings(path, own or {})
    return found


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which plain YAML silently takes the last, and references.

    A few lines of references to references stand for more values than memory holds.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "references (*name) are not read", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _settings(path: Path, given: Mapping) -> dict:
    """The keys of a mapping, checked and turned into what the options hold."""
    found = {}
    for key, value in given.items():
        name = str(key).replace("_", "-")
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{path}: unknown key {key!r}{hint} Known are {', '.join(KEYS)}, and {TASKS}")
        try:
            found[name.replace("-", "_")] = _value(path.parent, name, value)
        except (TypeError, ValueError) as error:
            why = f": {error}" if name in PLACES | FILES | NUMBERS and str(error) != str(value) else ""
            raise ValueError(f"{path}: {key}: {value!r:.60} is not what this option takes{why}") from None
    return found


def _value(folder: Path, name: str, value):
    if name in FLAGS:
        return _is(bool, value)
    if name in CHOICES:
        if CHOICES[name] is not None and value not in CHOICES[name]:
            raise ValueError(value)
        return _is(str, value)
    if name in NUMBERS:
        return _number(name, value)
    if name in LISTS:
        listed = [_is(str | int, item) for item in (value if isinstance(value, list) else [value])]
        return [_place(folder, item) for item in listed] if name == "compare-to" else [str(item) for item in listed]
    if name == "prompts" and not (folder / _is(str, value)).exists() and (SHIPPED / f"{value}.json").exists():
        return Path(value)
    return folder / expand(_is(str, value)) if name in FILES else _place(folder, value)


def _number(name: str, value):
    bound = OPTIONS[name]
    if not bound.holds(_is(int if bound.whole else int | float, value)):
        raise ValueError(f"expected {bound.words(value)}")
    return value if bound.whole else float(value)


def _place(folder: Path, value):
    """A path relative to the file's folder; a URL or an absolute path as it is."""
    place = as_path(expand(_is(str, value)))
    return folder / place if isinstance(place, Path) else place


def _is(kind, value):
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(value)
    return value

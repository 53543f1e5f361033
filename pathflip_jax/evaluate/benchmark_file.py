"""Benchmark files: YAML that names records, slides, texts, prompts and labels of one or several tasks.

The keys are the options of `pathflip evaluate`; paths are relative to the file. Top-level keys apply to every task of
`tasks`, which may override them:

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
from pathflip_jax.evaluate.spec import FILE, FLAG, NUMBER, PLACE, PROMPTS, SPEC_OPTIONS, Option, option_name
from pathflip_jax.runs.bounds import OPTIONS

TASKS = "tasks"
# PyYAML does not catch errors of its own constructors ("!!int" without a value is an IndexError).
_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_FIELDS = {option_name(name): name for name in SPEC_OPTIONS}
KEYS = sorted(_FIELDS)


def read_benchmark(path) -> dict[str, dict]:
    """Read the fields of an `EvaluationSpec` from a file, by task name; without `tasks` a single task named "".

    Raises ValueError naming the file for invalid YAML, an unknown or repeated key, and a value of the wrong kind.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except _UNREADABLE as error:
        raise ValueError(f"{path}: not valid YAML ({str(error) or 'nested too deeply'})") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected keys such as records, slides and prompts, found {type(content).__name__}")
    tasks = content.pop(TASKS, {"": {}})
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(f"{path}: {TASKS} must name tasks, each with its own keys")
    shared = _settings(path, content)
    found = {}
    for name, own in tasks.items():
        if name and (Path(str(name)).name != str(name) or str(name).startswith(".")):
            raise ValueError(f"{path}: task {name!r} cannot be the name of a folder; use letters, digits, - and _")
        if not isinstance(own, dict | None):
            raise ValueError(f"{path}: task {name!r} must be a mapping of keys, found {own!r:.60}")
        found[str(name)] = shared | _settings(path, own or {})
    return found


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses references and repeated keys, of which PyYAML silently takes the last.

    A few lines of nested references can expand to more values than fit in memory.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "references (*name) are not supported", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _settings(path: Path, given: Mapping) -> dict:
    """The keys of a mapping as fields of an `EvaluationSpec`, checked and converted."""
    found = {}
    for key, value in given.items():
        name = str(key).replace("_", "-")
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{path}: unknown key {key!r}{hint}; expected one of {', '.join(KEYS)}, or {TASKS}")
        option = SPEC_OPTIONS[_FIELDS[name]]
        try:
            found[_FIELDS[name]] = _value(path.parent, name, option, value)
        except (TypeError, ValueError) as error:
            explained = option.kind in (PLACE, FILE, PROMPTS, NUMBER) and not option.many and str(error) != str(value)
            why = f": {error}" if explained else ""
            raise ValueError(f"{path}: {key}: {value!r:.60} is not valid for this option{why}") from None
    return found


def _value(folder: Path, name: str, option: Option, value):
    if option.many:
        return tuple(_item(folder, option, item) for item in (value if isinstance(value, list) else [value]))
    if option.kind == FLAG:
        return _require(bool, value)
    if option.kind == NUMBER:
        return _number(name, value)
    if option.choices and value not in option.choices:
        raise ValueError(value)
    if option.kind == PROMPTS and not (folder / _require(str, value)).exists():
        if (SHIPPED / f"{value}.json").exists():
            return Path(value)
    if option.kind in (FILE, PROMPTS):
        return folder / expand(_require(str, value))
    return _place(folder, value) if option.kind == PLACE else _require(str, value)


def _item(folder: Path, option: Option, value):
    """An element of a list."""
    value = _require(str | int, value)
    return _place(folder, value) if option.kind == PLACE else str(value)


def _number(name: str, value):
    bound = OPTIONS[name]
    if not bound.holds(_require(int if bound.whole else int | float, value)):
        raise ValueError(f"expected {bound.words(value)}")
    return value if bound.whole else float(value)


def _place(folder: Path, value):
    """A path relative to the file's folder; URLs and absolute paths as they are."""
    place = as_path(expand(_require(str, value)))
    return folder / place if isinstance(place, Path) else place


def _require(kind, value):
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(value)
    return value

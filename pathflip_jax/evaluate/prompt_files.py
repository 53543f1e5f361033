"""Prompt files: the texts of classes (zero-shot) or concepts (grounding, captions) in JSON."""

from pathlib import Path
from typing import NamedTuple

from pathflip_jax.data.storage.json_values import parse_json

SHIPPED = Path(__file__).parent / "prompts"  # prompt files of the package, by name


class Prompts(NamedTuple):
    """The texts of each class, and the class of every label that a slide table may have.

    `labels` are in lower case: the classes themselves and their other spellings.
    """

    task: str
    classes: dict[str, list[str]]
    labels: dict[str, str]

    def class_of(self, label: str | None) -> str | None:
        """The class of a slide table's label; an unknown label stays as it is."""
        return None if label is None else self.labels.get(label.lower(), label)

    def first_texts(self) -> "Prompts":
        """The classes with their first text alone: no prompt ensemble."""
        return self._replace(classes={label: texts[:1] for label, texts in self.classes.items()})


def find_prompts(name) -> Path:
    """The prompt file of that path or of that shipped name; FileNotFoundError lists the shipped names."""
    path, shipped = Path(name), {file.stem: file for file in SHIPPED.glob("*.json")}
    if path.is_file():  # a folder may have the name of a shipped file
        return path
    if str(name) not in shipped:
        raise FileNotFoundError(f"{name}: no such prompt file; expected a file or one of {', '.join(sorted(shipped))}")
    return shipped[str(name)]


def read_prompts(path) -> Prompts:
    """Read {"classes": {label: [texts]}}, with optional "task", "templates" and "spellings".

    Every text is put into every template, in place of its `{}`. "spellings" are other labels of a class in slide
    tables, {label: [others]}. A bare {label: [texts]} is accepted too (concepts of grounding and captions). Raises
    ValueError naming the file for a class given twice, a class without texts, and a text or spelling of two classes.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_key_twice)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f'{path}: expected {{"classes": {{label: [texts]}}}}, found {type(content).__name__}')
    listed = content.get("classes", content if "templates" not in content and "task" not in content else None)
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f'{path}: no classes; expected {{"classes": {{label: [texts]}}}}')
    templates = content.get("templates", ["{}"]) if "classes" in content else ["{}"]
    for template in templates if isinstance(templates, list) else [templates]:
        if not isinstance(templates, list) or not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"{path}: the template {template!r} must contain {{}} exactly once, in place of the text")
    classes: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for label, texts in listed.items():
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and has_words(t) for t in texts):
            raise ValueError(f"{path}: class {label!r} needs a list of texts with words in them, found {texts!r:.80}")
        for text in texts:
            if owner.setdefault(text.strip().lower(), label) != label:
                raise ValueError(
                    f"{path}: {text!r} is a text of both {owner[text.strip().lower()]!r} and {label!r}; keep one"
                )
        classes[label] = [template.replace("{}", text) for text in texts for template in templates]
    spellings = content.get("spellings", {}) if "classes" in content else {}
    task = str(content.get("task", "")) if "classes" in content else ""
    return Prompts(task, classes, _spellings(path, list(classes), spellings))


def _spellings(path: Path, classes: list[str], given) -> dict[str, str]:
    """The class of every label, in lower case."""
    found = {label.lower(): label for label in classes}
    if len(found) < len(classes):
        raise ValueError(f"{path}: two classes differ only in upper and lower case; rename one")
    if not isinstance(given, dict) or not set(given) <= set(classes):
        raise ValueError(
            f"{path}: spellings must be {{class: [other labels]}}, with classes among {', '.join(classes)}"
        )
    for label, others in given.items():
        if not isinstance(others, list) or not all(isinstance(other, str) and other.strip() for other in others):
            raise ValueError(f"{path}: the spellings of {label!r} must be a list of labels, found {others!r:.80}")
        for other in others:
            if found.setdefault(other.strip().lower(), label) != label:
                raise ValueError(
                    f"{path}: {other!r} is a spelling of both {found[other.strip().lower()]!r} and {label!r}"
                )
    return found


def has_words(text: str) -> bool:
    """Whether a text has a letter or a digit in it."""
    return any(letter.isalnum() for letter in text)


def _no_key_twice(pairs):
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is given twice; merge its texts into one list")
        found[key] = value
    return found

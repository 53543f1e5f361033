"""Troubleshooting page: the code raises or prints every error that it quotes."""

import ast
import difflib
import re

import pages
import pytest

TEXT = (pages.ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [code.strip() for language, code in pages.FENCED.findall(TEXT) if language == "text"]


def _texts(path) -> list[str]:
    """The strings of a module without docstrings; f-strings have … for inserted values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if id(node) in documents:
            continue
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return [text for text in found if " " in text]


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """Every string of the package, with its file."""
    folders = (pages.ROOT / "pathflip_jax", pages.ROOT / "data_prep")
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return {text: path.relative_to(pages.ROOT).as_posix() for path in paths for text in _texts(path)}


def _says(message: str, quoted: str) -> bool:
    """Whether a message contains the quotation, in which … stands for anything."""
    return re.search(".*".join(map(re.escape, re.split("…", quoted))), message, re.DOTALL) is not None


@pytest.mark.parametrize("quoted", QUOTED)
def test_every_error_that_is_quoted_is_one_of_the_code(quoted, messages):
    if not any(_says(message, quoted) for message in messages):
        near = difflib.get_close_matches(quoted, messages, n=1, cutoff=0.0)[0]
        pytest.fail(
            f"docs/troubleshooting.md quotes an error that the code does not have:\n  {quoted}\n"
            f"the nearest is in {messages[near]}:\n  {near}\nquote the current text"
        )


def test_enough_errors_are_quoted_each_with_a_cure():
    assert len(QUOTED) >= 15 and len(set(QUOTED)) == len(QUOTED)
    assert all(len(quoted) > 15 for quoted in QUOTED)
    parts = pages.FENCED.split(TEXT)[3::3]  # what follows each block
    assert all(re.match(r"\n+[A-Z`]", part) for part in parts), "a quoted error without a cure"


def test_an_error_that_is_not_there_is_found(messages):
    assert not any(_says(message, "the slide is upside down, turn it by … degrees") for message in messages)


def test_the_exit_codes_are_those_of_the_command_line():
    from pathflip_jax import cli

    told = re.findall(r"^\| (\d+) \|", TEXT, re.MULTILINE)
    assert told == ["0", "1", "2", "75"] and all(re.search(rf"\b{code} ", cli.__doc__ + " ") for code in told)

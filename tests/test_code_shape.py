"""Sizes of the code: functions of at most 60 lines and 8 parameters, files of at most 400 lines; exceptions say why."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES, PARAMETERS, FILE_LINES = 60, 8, 400

# What is above the figures, and why it stays. An entry that is no longer above them fails, too.
EXCEPTIONS = {
    "pathflip_jax/convert/torch_model.py": "one self-contained file, which is copied beside exported weights",
}


def _above(path: Path) -> Iterator[str]:
    """The file and its functions that are above the figures, as "file" and "file:function"."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    if len(text.splitlines()) > FILE_LINES:
        yield name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            parameters = [argument for argument in named if argument.arg not in ("self", "cls")]
            if node.end_lineno - node.lineno + 1 > LINES or len(parameters) > PARAMETERS:
                yield f"{name}:{node.name}"


def test_functions_and_files_are_small():
    files = [path for folder in ("pathflip_jax", "data_prep") for path in (ROOT / folder).rglob("*.py")]
    found = {name for path in files for name in _above(path)}
    assert found - EXCEPTIONS.keys() == set(), "cut them: sizes are those of this file"
    assert EXCEPTIONS.keys() - found == set(), "no longer above the figures: take them off the list"


def test_what_is_too_large_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "x.py"
    body = "\n".join(["    x = 1"] * LINES)
    path.write_text(f"def long():\n{body}\n\n\ndef wide(a, b, c, d, *, e, f, g, h, i): ...\n" + "\n" * FILE_LINES)
    assert list(_above(path)) == ["x.py", "x.py:long", "x.py:wide"]
    path.write_text(f"class A:\n    def wide(self, a, b, c, d, *, e, f, g, h): ...\n\n\ndef long():\n{body[10:]}\n")
    assert list(_above(path)) == []

"""docs/architecture.md: every file and function that it names exists, and its floors are those of `make lint`."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|toml|md|sh)|(?:[\w-]+/)+)(?::([\w.]+))?`", PAGE)))


def find(place: str) -> Path | None:
    """A file or folder below the library or the top level; the library's if both exist."""
    return next((found for base in (ROOT / "pathflip_jax", ROOT) if (found := base / place).exists()), None)


def names(tree: ast.Module | ast.ClassDef) -> dict[str, ast.stmt]:
    """Definitions of a module or class by name."""
    found = {}
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {
                name.id: statement for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    return found


def test_the_page_names_enough_to_find_the_way():
    assert len(NAMED) > 50


@pytest.mark.parametrize(("place", "name"), NAMED)
def test_what_the_page_names_exists(place, name):
    path = find(place)
    assert path is not None, f"docs/architecture.md names {place}, which does not exist"
    inside = ast.parse(path.read_text()) if name else None
    for part in name.split(".") if name else ():
        assert part in names(inside), f"docs/architecture.md names {place}:{name}, which does not exist"
        inside = names(inside)[part]


def test_the_floors_of_the_page_are_those_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (floors,) = (contract["layers"] for contract in contracts if contract["name"].startswith("Floors"))
    wanted = [{module.split(".")[-1] for module in floor.split(" | ")} for floor in floors]
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", PAGE, flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(len(floors)))[::-1]
    assert [set(re.findall(r"`(\w+)(?:/|\.py)`", rooms)) for _, rooms in rows] == wanted


def test_the_library_has_the_rooms_of_the_page_and_nothing_else():
    rooms = {
        name for row in re.findall(r"^\| \d+ \| ([^|]+) \|", PAGE, flags=re.M) for name in row.replace("`", "").split()
    }
    library = (ROOT / "pathflip_jax").iterdir()
    found = {path.name + "/" * path.is_dir() for path in library if path.name != "__pycache__"}
    assert found == rooms - {"data_prep/"} | {"__init__.py"}

"""The migration guide names only existing settings, commands and options."""

import contextlib
import re
from pathlib import Path

import pytest

from pathflip_jax import cli
from pathflip_jax.commands import COMMANDS
from pathflip_jax.training.settings import load_config

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ["migrate.md", "weights.md"]


def settings(name: str) -> set[str]:
    config = load_config(name)
    return {f"{section}.{key}" for section in config for key in config[section]}


def test_every_setting_is_one():
    known = {"PathFLIP": settings("align_base") | settings("lm_stage1"), "PathFLIP2": settings("pathflip2")}
    text = (DOCS / "migrate.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (PathFLIP2?): .*?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 6
    named = 0
    for family, part in found:
        for setting in re.findall(r"\b((?:data|model|loss|optim|train|lm|mesh)\.[a-z_0-9]+)\b(?!\.\w)", part):
            if setting.partition(".")[2] in ("json", "bin"):
                continue
            assert setting in known[family] | settings("lm_stage1"), (family, setting)
            named += 1
    assert named > 50


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_is_one(page, capsys):
    text = (DOCS / page).read_text(encoding="utf-8")
    commands = re.findall(r"`?pathflip (\w+)([^`\n]*)", text)
    assert len(commands) > 8
    for name, rest in commands:
        if name not in COMMANDS:
            assert name in ("on", "and"), name
            continue
        with contextlib.suppress(SystemExit):
            cli.main([name, "--help"])
        told = capsys.readouterr().out
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", rest):
            assert option in told, (name, option)


@pytest.mark.parametrize("page", PAGES)
def test_every_page_that_is_linked_is_there(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert link.startswith("https://") or (DOCS / link).exists(), link

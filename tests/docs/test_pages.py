"""README and docs: every command is accepted by its parser, and every link and anchor has a target."""

import argparse
import ast
import importlib.util
import re
import sys
from pathlib import Path

import pages
import pytest

from pathflip_jax.cli import build_parser
from pathflip_jax.runtime.config_files import bundled_configs, flat_settings
from pathflip_jax.training.settings import load_config, parse

ROOT = pages.ROOT
TEXTS = {pages.name_of(page): page.read_text(encoding="utf-8") for page in pages.PAGES}
SETTING = re.compile(r"(?:--config\.)?((?:data|model|loss|optim|train|mesh|lm)\.[a-z]\w*)(?:=.*)?")
FILE = re.compile(r"\.(json|jsonl|bin|py|md|h5|pt)$")
# Options in sentences that belong to other programs, and scripts of the released code.
OTHERS = {"--shm-size"}
RELEASED = ("train_pathflip_align.py", "train_pathflip_finetune.py")


def commands_of(text: str) -> list[pages.Command]:
    """The commands of a page that belong to this project."""
    return [command for command in pages.commands(text) if command.arguments[0] not in RELEASED]


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    (found,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


class Parsed(Exception):
    """Raised when the command line of a script has been parsed, before the script runs."""


@pytest.fixture(scope="module")
def parse_script():
    """parse_script(arguments) parses `python ARGUMENTS` with the script's own parser and returns its options."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        read = argparse.ArgumentParser.parse_args

        def parse_args(parser, args=None, namespace=None):
            read(parser, args, namespace)
            raise Parsed(parser)

        def run(arguments):
            if arguments[0] == "-m":
                module, rest = importlib.import_module(arguments[1]), arguments[2:]
            else:
                path, rest = ROOT / arguments[0], arguments[1:]
                assert path.is_file(), f"no script {arguments[0]}"
                if "parse_args()" not in (text := path.read_text()) and "parse_args(argv)" not in text:
                    return set()
                patch.syspath_prepend(path.parent)
                module = importlib.import_module(path.stem)
            patch.setattr(sys, "argv", [arguments[0], *rest])
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
            try:
                module.main()
            except Parsed as done:
                (parser,) = done.args
                return set(parser._option_string_actions)
            finally:
                patch.setattr(argparse.ArgumentParser, "parse_args", read)
            raise AssertionError(f"{arguments[0]} read no options")

        yield run
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith((f"{ROOT}/benchmarks", f"{ROOT}/tests/parity")):
            del sys.modules[name]


def check_train(arguments: tuple[str, ...], whole: bool) -> None:
    """Parse the arguments of `pathflip train`; required options are added to a command that leaves some out."""
    whole = whole and "--help" not in arguments  # --help needs only a config
    arguments = [argument for argument in arguments if argument not in ("--dry-run", "--help")]
    given = " ".join(arguments)
    if not whole:
        arguments += ["--config=align_base"] * ("--config " not in given and "--config=" not in given)
        arguments += ["--workdir=run"] * ("--workdir" not in given)
    parse(list(arguments))


def check_command(arguments: tuple[str, ...], whole: bool, parsers) -> None:
    """Parse the arguments of `pathflip`: a whole command completely, of an abridged one only the options."""
    name, *rest = arguments
    if name == "train":
        return check_train(tuple(rest), whole)
    if name.startswith("-"):
        assert name in ("--help", "--version")
        return None
    assert name in parsers, f"no command {name}"
    if whole:
        # Clients of buckets are extras; fsspec's memory:// is a URL that needs none.
        build_parser().parse_args([name, *(word.replace("gs://", "memory://") for word in rest)])
        return None
    for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
        assert option in parsers[name]._option_string_actions, f"{name} has no option {option}"
    return None


def cases():
    return [
        pytest.param(command, id=f"{page}: {command}"[:90])
        for page, text in TEXTS.items()
        for command in dict.fromkeys(commands_of(text))
    ]


@pytest.mark.parametrize("command", cases())
def test_every_command_parses(command, parsers, parse_script, capsys):
    try:
        if command.program == "pathflip":
            check_command(command.arguments, command.whole, parsers)
        elif command.program.startswith("python"):
            plain, _, settings = (" ".join(command.arguments)).partition(" -- ")
            if command.arguments[0] not in ("-c",):
                try:
                    parse_script(command.arguments)
                except SystemExit as error:
                    if "torch is missing" in str(error):
                        pytest.importorskip("torch")
                    raise
            if settings:
                check_train(tuple(settings.split()), False)
            assert plain
        else:
            assert (ROOT / command.program).is_file(), f"no script {command.program}"
            check_train(command.arguments, False)
    except (SystemExit, ValueError) as error:
        pytest.fail(f"`{command}`: {capsys.readouterr().err.strip() or error}")


def test_enough_commands_are_read():
    found = [command for text in TEXTS.values() for command in commands_of(text)]
    assert sum(command.program == "pathflip" and command.whole for command in found) > 40
    assert sum(command.program == "python" for command in found) > 30
    assert sum(command.program.startswith("launch/") for command in found) >= 1


@pytest.mark.parametrize("page", TEXTS)
def test_every_setting_in_a_sentence_is_one(page):
    known = {key for name in bundled_configs() for key in flat_settings(load_config(name))}
    named = [found[1] for code in pages.inline_code(TEXTS[page]) if (found := SETTING.fullmatch(code))]
    assert [name for name in named if name not in known and not FILE.search(name)] == []


def test_every_option_in_a_sentence_is_one(parsers):
    known = {option for parser in parsers.values() for option in parser._option_string_actions} | OTHERS
    for script in [*(ROOT / "benchmarks").glob("*.*"), *(ROOT / "launch").glob("*.sh")]:
        known |= set(re.findall(r"--[a-z][\w-]*", script.read_text(encoding="utf-8")))
    unknown = {}
    for page, text in TEXTS.items():
        if page == "docs/migrate.md":  # it lists the options of the released code; test_migrate.py reads ours
            continue
        options = [re.split("[= ]", code)[0] for code in pages.inline_code(text) if code.startswith("--")]
        if missing := [option for option in options if option not in known and not option.startswith("--config")]:
            unknown[page] = missing
    assert unknown == {}


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page):
    folder, broken = (ROOT / page).parent, []
    for link in pages.links(TEXTS[page]):
        target, _, anchor = link.partition("#")
        if target.startswith(("https://", "http://")):
            continue
        path = (folder / target).resolve() if target else ROOT / page
        if not path.is_relative_to(ROOT) or not path.exists():
            broken.append(f"{link}: no such file")
        elif anchor and anchor not in pages.anchors(path.read_text(encoding="utf-8")):
            broken.append(f"{link}: no such heading; {path.name} has {sorted(pages.anchors(path.read_text()))}")
    assert broken == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_that_a_page_names_is_there(page):
    path = re.compile(r"(?:[\w.-]+/)+[\w-]+\.(?:py|sh|json|md|png)")
    named = {code for code in pages.inline_code(TEXTS[page]) if path.fullmatch(code)}
    ours = ("benchmarks/", "configs/", "tests/", "docs/", "launch/", "pathflip_jax/", "notebooks/", "requirements/")
    assert [name for name in named if name.startswith(ours) and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_python_on_a_page_imports_what_there_is(page):
    for code in (code for language, code in pages.FENCED.findall(TEXTS[page]) if language == "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_index_lists_every_page_and_the_readme_leads_to_each():
    listed = set(pages.links(TEXTS["docs/README.md"]))
    others = {Path(name).name for name in TEXTS if name.startswith("docs/")} - {"README.md"}
    assert listed == others
    assert {f"docs/{name}" for name in others} <= {link.partition("#")[0] for link in pages.links(TEXTS["README.md"])}


@pytest.mark.parametrize(
    ("text", "whole", "right"),
    [
        ("```\npathflip import a --out b\n```", True, True),
        ("```\npathflip import a --out b --questions c\n```", True, False),
        ("```\npathflip import a\n```", True, False),
        ("```\npathflip train ... --config.mesh.fsdp=4\n```", False, True),
        ("```\npathflip train ... --config.mesh.fspd=4\n```", False, False),
        ("say `pathflip embed --regions` once", False, True),
        ("say `pathflip embed --region` once", False, False),
    ],
)
def test_what_is_wrong_is_found(text, whole, right, parsers, parse_script, capsys):
    (command,) = pages.commands(text)
    assert command.whole == whole
    if right:
        test_every_command_parses(command, parsers, parse_script, capsys)
    else:
        with pytest.raises((pytest.fail.Exception, AssertionError)):
            test_every_command_parses(command, parsers, parse_script, capsys)

"""Cures that messages name: every option in a text of the package is one that its command takes."""

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathflip_jax.cli import build_parser
from pathflip_jax.runtime.config_files import bundled_configs
from pathflip_jax.training.settings import load_config

ROOT = Path(__file__).parents[1]
OPTION = re.compile(r"(?<![\w-])--([a-z]\w*(?:[.-]\w+)*)")
TRAIN = {"config", "workdir", "profile", "coordinator", "num_processes", "process_id"}
# Options of other programs, by what names the program in the same text.
OTHERS = {
    "vips tiffsave": {"tile", "pyramid", "compression"},
    "hf download": {"local-dir"},
    "git lfs": {"include"},
    "xprof": {"logdir"},
    "docker run": {"shm-size"},
    "Runner": {
        "runner", "flink_master", "project", "region", "temp_location", "environment_type", "environment_config",
        "sdk_container_image", "number_of_worker_harness_threads",
    },
    "direct_": {"direct_running_mode", "direct_num_workers"},
    "environment_": {"environment_type", "environment_config"},
    "sdk_container": {"sdk_container_image", "number_of_worker_harness_threads"},
}  # fmt: skip


def _parsers() -> dict[str, set[str]]:
    """The options of each command."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    found = {
        name: {text.removeprefix("--") for action in parser._actions for text in action.option_strings}
        for name, parser in commands.choices.items()
    }
    return found | {"train": found["train"] | TRAIN}


def _settings() -> set[str]:
    """The dotted names of all settings of the bundled configs, and a placeholder of the usage."""
    found = {"config.section.name", "config.section.setting"}
    for config in map(load_config, bundled_configs()):
        for section, values in config.items():
            found |= {f"config.{section}.{name}" for name in values}
    return found


COMMANDS, SETTINGS = _parsers(), _settings()


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """The texts in a module that are no docstrings, f-strings as one with {} for what is put in.

    A literal that is an option and nothing else is an argument for a parser or another program, not a text.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside | documents:
            if not re.fullmatch(r"--[\w-]+=?", node.value):
                yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)


def _allowed(path: Path, text: str) -> set[str]:
    """The options that a text of this module may name outside of a whole command."""
    every = set().union(*COMMANDS.values()) | SETTINGS
    if path.parts[0] == "data_prep":
        every = COMMANDS["prepare"] | COMMANDS["import"]
    own = re.findall(r'add_argument\(\s*"--([a-z-]+)"', (ROOT / path).read_text()) if (ROOT / path).is_file() else []
    return every.union(own, *(options for program, options in OTHERS.items() if program in text))


def _unknown(path: Path, texts) -> list[str]:
    found = []
    for line, text in texts:
        rest = text
        for command, name in re.findall(r"(`pathflip ([a-z]+)[^`]*`)", text):
            takes = COMMANDS.get(name, set()) | (SETTINGS if name == "train" else set())
            found += [f"{path}:{line}: {name} --{option}" for option in OPTION.findall(command) if option not in takes]
            rest = rest.replace(command, "")
        allowed = _allowed(path, text)
        found += [f"{path}:{line}: --{option}" for option in OPTION.findall(rest) if option not in allowed]
    return found


MODULES = sorted(
    path.relative_to(ROOT) for name in ("pathflip_jax", "data_prep") for path in (ROOT / name).rglob("*.py")
)


def test_every_option_that_a_message_names_exists():
    named = {path: list(_texts(ROOT / path)) for path in MODULES}
    assert sum("--" in text for texts in named.values() for _, text in texts) > 100
    assert [fault for path, texts in named.items() for fault in _unknown(path, texts)] == []


@pytest.mark.parametrize(
    ("path", "text", "faults"),
    [
        ("data_prep/jobs.py", "pass `--dtype bfloat16`", 0),
        ("data_prep/jobs.py", "pass --questions", 1),
        ("pathflip_jax/data/records/index.py", "pass --questions or --mpp", 0),
        ("pathflip_jax/x.py", "set --config.train.batch_size=8 or --config.train.size=8", 1),
        ("pathflip_jax/x.py", "run `pathflip import --mpp 0.5`, not `pathflip import --questions q`", 1),
        ("pathflip_jax/x.py", "try --no-such-thing", 1),
    ],
)
def test_what_does_not_exist_is_found(path, text, faults):
    assert len(_unknown(Path(path), [(1, text)])) == faults

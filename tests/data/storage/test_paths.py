"""Paths: `~` and environment variables wherever a path is given, and bytes that are not text."""

import argparse
import importlib
import os
import pkgutil

import pytest

from pathflip_jax import cli, commands
from pathflip_jax.commands import options
from pathflip_jax.data.storage import paths
from pathflip_jax.evaluate.benchmark_file import read_benchmark
from pathflip_jax.training import settings

# Of options that take a path; PATH is a part of a URL as well.
METAVARS = ("FOLDER", "DIR", "FILE", "RUN", "RECORDS", "SLIDE", "SLIDES", "CHECKPOINT", "WEIGHTS", "CSV", "JSON")
METAVARS += ("GEOJSON", "TABLE", "YAML", "SCORES")


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    "text, expanded",
    [
        ("~/runs", "/home/ada/runs"),
        ("~", "/home/ada"),
        ("$SCRATCH/runs", "/scratch/runs"),
        ("${SCRATCH}_2/~", "/scratch_2/~"),
        ("gs://$SCRATCH/~/runs", "gs://$SCRATCH/~/runs"),
        ("s3://bucket/$NOWHERE", "s3://bucket/$NOWHERE"),
        ("a$$b$5 $", "a$b$5 $"),
        ("runs/~ada", "runs/~ada"),
        ("", ""),
    ],
)
def test_expansion(text, expanded):
    assert paths.expand(text) == expanded


@pytest.mark.parametrize(
    "text, message",
    [
        ("$NOWHERE/x", "NOWHERE is not set"),
        ("x/${NOWHERE}", "NOWHERE is not set"),
        ("~nobody-is-called-so/x", "no user is called nobody-is-called-so"),
    ],
)
def test_what_cannot_be_expanded_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        paths.expand(text)


def test_settings_are_expanded_from_the_command_line_and_from_files(tmp_path, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pathflip_jax.configs import lm_stage1\n\n\ndef get_config(argument=''):\n"
        "    config = lm_stage1.get_config(argument)\n    config.data.records = '~/records'\n"
        "    config.data.slides = '$NOWHERE/slides.csv'\n    return config\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("STEPS", "7")
    argv = [
        "--config=~/mine.py",
        "--workdir=~/run",
        "--config.data.slides=$SCRATCH/s.csv",
        "--config.train.steps=$STEPS",
    ]
    config, given = settings.parse([*argv, "--config.data.texts=~/a.jsonl,gs://b/c*2,$SCRATCH/d.csv*3"])
    assert (config.data.records, config.data.slides) == (f"{tmp_path}/records", "/scratch/s.csv")
    assert config.data.texts == f"{tmp_path}/a.jsonl,gs://b/c*2,/scratch/d.csv*3"
    assert config.train.steps == 7 and given["workdir"] == f"{tmp_path}/run"
    with pytest.raises(ValueError, match=r"mine\.py: data\.slides: \$NOWHERE/slides\.csv: .*NOWHERE is not set"):
        settings.load_config(str(path))
    with pytest.raises(ValueError, match="--workdir: .*NOWHERE is not set"):
        settings.parse([argv[0], "--workdir=$NOWHERE/x"])


def test_every_option_that_takes_a_path_expands_it():
    """No command reads a path by pathlib alone; the others read a number, a text or a choice."""
    parser = cli.build_parser()
    (subparsers,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    names = (f"pathflip_jax.commands.{module.name}" for module in pkgutil.iter_modules(commands.__path__))
    assert len(subparsers) == sum(hasattr(importlib.import_module(name), "add") for name in names)
    paths_of = set()
    for name, command in subparsers.items():
        for action in command._actions:
            kind = action.type
            assert kind is not int and kind is not float and not (isinstance(kind, type)), (name, action.dest)
            if action.metavar in METAVARS:
                assert str(kind("~/x")).startswith("/home/ada"), (name, action.dest)
                paths_of.add(action.dest)
    assert {"out", "records", "slide", "checkpoint", "decoder", "aligner", "cache", "within"} <= paths_of
    assert {"slides", "tables", "scores", "tissue_from", "source", "check", "run_folders"} <= paths_of


@pytest.mark.parametrize(
    "module, kind, given, expanded",
    [
        ("split", "_table", "test=~/t.csv", "test=/home/ada/t.csv"),
        ("prepare", "_encoder", "hf:~/phikon", "hf:/home/ada/phikon"),
        ("prepare", "_encoder", "stain_texture", "stain_texture"),
    ],
)
def test_paths_behind_a_word_are_expanded(module, kind, given, expanded):
    assert getattr(importlib.import_module(f"pathflip_jax.commands.{module}"), kind)(given) == expanded


def test_a_variable_that_is_not_set_ends_a_command(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", "--records=$NOWHERE/records"])
    assert end.value.code == 2 and "NOWHERE is not set" in capsys.readouterr().err


def test_paths_of_a_file_of_tasks_are_expanded(tmp_path):
    (tmp_path / "tasks.yaml").write_text("records: $SCRATCH/records\noutlines: ~/outlines\ntexts: texts.csv\n")
    task = read_benchmark(tmp_path / "tasks.yaml")[""]
    assert [str(task[name]) for name in ("records", "outlines")] == ["/scratch/records", "/home/ada/outlines"]
    assert task["texts"] == tmp_path / "texts.csv"
    (tmp_path / "tasks.yaml").write_text("records: $NOWHERE/records\n")
    with pytest.raises(ValueError, match="tasks.yaml: records: .*NOWHERE is not set"):
        read_benchmark(tmp_path / "tasks.yaml")


@pytest.mark.parametrize("argv", [["doctor", "--records={}"], ["train", "--config=demo", "--workdir", "{}"]])
def test_bytes_that_are_no_text_are_refused_at_the_start(argv, capsys):
    bad = os.fsdecode(b"runs/\xfc\xff")
    assert cli.main([argument.format(bad) for argument in argv]) == cli.WRONG_INPUT
    said = capsys.readouterr().err
    assert r"runs/\xfc\xff: not valid UTF-8" in said and "rename" in said


def test_a_current_folder_that_is_no_text_is_refused(tmp_path, monkeypatch, capsys):
    os.mkdir(bad := os.fsencode(tmp_path) + b"/\xff")
    monkeypatch.chdir(bad)
    assert cli.main(["doctor"]) == cli.WRONG_INPUT and r"/\xff: not valid UTF-8" in capsys.readouterr().err


def test_text_of_other_letters_is_text():
    paths.refuse_undecodable(["--workdir=läufe/第一"])


@pytest.mark.parametrize(
    "option, text", [("seed", "-1"), ("draws", "0"), ("mpp", "nan"), ("quality", "96"), ("mpp", "x")]
)
def test_numbers_of_options_have_bounds(option, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}: expected a "):
        options.number(option)(text)
    assert options.number("port")("0") == 0 and options.number("clear")("0.4") == 0.4

"""Command line: every option has help, every example in a --help parses, wrong input is reported in one line."""

import contextlib
import errno
import shlex
import subprocess
import sys

import pytest

from pathflip_jax import cli


def _commands() -> dict:
    parser = cli.build_parser()
    return next(action for action in parser._actions if hasattr(action, "choices") and action.choices).choices


@pytest.mark.parametrize("name", sorted(_commands()))
def test_every_command_has_an_example_that_parses(name):
    command = _commands()[name]
    for line in command.epilog.split("\n")[1:]:
        example = shlex.split(line)
        assert example[:2] == ["pathflip", name]
        if name != "train":  # its options are settings of the config, read by ml_collections
            cli.build_parser().parse_args(example[1:])


@pytest.mark.parametrize("name", sorted(_commands()))
def test_every_option_is_explained(name):
    unexplained = [action.dest for action in _commands()[name]._actions if not action.help]
    assert unexplained == []


@pytest.mark.parametrize("shard", ["8/8", "-1/2", "1", "a/b"])
def test_shard_outside_its_range_is_refused(shard, capsys):
    with pytest.raises(SystemExit):
        cli.main(["import", "features", "--out", "records", f"--shard={shard}"])
    assert shard in capsys.readouterr().err


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    missing = tmp_path / "nothing"
    assert cli.main(["import", str(missing), "--out", str(tmp_path / "records")]) == cli.WRONG_INPUT
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and str(missing) in lines[0]


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("Too many open files")])
def test_a_limit_of_the_process_is_one_line_with_its_cure(error, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr("pathflip_jax.monitoring.goodput.summarise", fail)
    assert cli.main(["goodput", "run"]) == cli.WRONG_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "ulimit -n" in said


@pytest.mark.parametrize(("line", "code"), [("goodput nothing", 2), ("goodput --help", 0)])
def test_output_that_is_lost_is_an_error(line, code, monkeypatch, capsys):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device", "standard output")

    monkeypatch.setattr(cli.streams, "flush", fail)
    with contextlib.suppress(SystemExit):
        assert cli.main(line.split()) == cli.WRONG_INPUT
    assert "pathflip: [Errno 28] No space left on device: 'standard output'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("evaluate runs --recrods x --out o", ["usage: pathflip evaluate", "--records RECORDS", "mean --records?"]),
        ("evaluate runs --recrods x --ouput o", ["usage: pathflip evaluate", "required: --out", "mean --out?"]),
        ("import feats --out r --sldies=s.csv", ["usage: pathflip import", "--sldies=s.csv", "mean --slides?"]),
        ("doctor extra", ["usage: pathflip doctor", "pathflip doctor: error: unrecognized arguments: extra\n"]),
        ("trian --config demo", ["usage: pathflip", "'trian'", "mean pathflip train?"]),
        ("--verison doctor", ["usage: pathflip", "unrecognized arguments: --verison\n"]),
    ],
)
def test_a_wrong_option_shows_the_usage_of_its_command(line, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(line))
    assert ended.value.code == cli.WRONG_INPUT
    said = capsys.readouterr().err
    assert all(text in said for text in expected), said


def test_beams_own_options_are_not_guessed_at(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prepare", "slides", "--beam", "--slids"])
    assert "mean" not in capsys.readouterr().err


@pytest.mark.parametrize(("option", "meant"), [("--confg", "--config"), ("--wrkdir=w", "--workdir")])
def test_a_wrong_option_of_train_shows_its_usage(option, meant, capsys):
    assert cli.main(["train", option, "demo"]) == cli.WRONG_INPUT
    said = capsys.readouterr().err
    assert f"did you mean {meant}?" in said and "usage: pathflip train --config" in said


def _imported_by(argv: list[str]) -> set[str]:
    """Modules that a command line has imported when it ends, in a process of its own."""
    code = f"import sys, pathflip_jax.cli as c\ntry: c.main({argv!r})\nexcept SystemExit: pass\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    ("argv", "unwanted"),
    [
        (["--help"], {"numpy", "jax", "pathflip_jax.commands.options"}),
        (["grond"], {"numpy", "jax", "pathflip_jax.commands.options"}),
        (["ground", "--help"], {"jax", "scipy", "matplotlib", "h5py", "pathflip_jax.commands.serve"}),
    ],
    ids=["help", "no-command", "help-of-a-command"],
)
def test_only_what_a_command_line_needs_is_imported(argv, unwanted):
    assert _imported_by(argv) & unwanted == set()


def test_the_command_line_starts_without_heavy_imports():
    """`pathflip --help` is fast; training does not load PyTorch, which TensorBoard's writer would."""
    code = (
        "import sys, pathflip_jax.cli as c; c.build_parser(); heavy = {'torch', 'tensorflow'}; "
        "assert not {'jax', 'scipy'} & set(sys.modules); "
        "import pathflip_jax.training.loop; print(heavy & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("out", [["--out", "gs://bucket/x.parquet"], ["--out=gs://bucket/x.parquet"]])
def test_a_url_where_only_a_path_works_makes_no_folder_of_that_name(tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["embed", "memory://bucket/records", "--checkpoint", "run", *out]) == cli.WRONG_INPUT
    assert "gs://bucket/x.parquet: a local path is needed here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_url_of_no_known_protocol(capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--records", "nothing://bucket/records"])
    assert "nothing://bucket/records: " in capsys.readouterr().err

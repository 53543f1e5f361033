"""Config files that are wrong: one line that names the file and where in it, whatever Python thinks of it."""

import pytest

from pathflip_jax.cli import WRONG_INPUT, main
from pathflip_jax.settings.kinds import flat
from pathflip_jax.training import loop, settings

BODY = (
    "from pathflip_jax.configs import align_base\n\n\n"
    "def get_config(argument=''):\n    config = align_base.get_config()\n"
)


@pytest.fixture
def write(tmp_path):
    """The text of a config file -> its path."""

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    "text, message",
    [
        ("x = = 1\n", "mine.py, line 1: invalid syntax in 'x = = 1'"),
        (BODY + "  return config\n", "mine.py, line 6: unindent"),
        ("import no_such_module\n", "mine.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("from pathflip_jax.configs import aling\n", "mine.py, line 1: ImportError: cannot import name 'aling'"),
        (BODY + "    assert config.data.records, 'records first'\n", "mine.py, line 6: AssertionError: records first"),
        (BODY + "    assert False\n", "mine.py, line 6: AssertionError: no reason given"),
        (BODY + "    return confg\n", "mine.py, line 6: NameError: name 'confg' is not defined"),
        (BODY + "    return 1 / 0\n", "mine.py, line 6: ZeroDivisionError"),
        (BODY + "    config.data.update(regions=[1])\n", "mine.py, line 6: TypeError"),
        ("import sys\nsys.exit(3)\n", "mine.py, line 2: the config exits the program \\(exit 3\\)"),
        (BODY + "    exit()\n", "mine.py, line 6: the config exits the program"),
        ("x = 1\n", "mine.py: no function get_config"),
        ("get_config = 1\n", "mine.py: no function get_config"),
        (BODY, "mine.py: get_config returns NoneType, expected the settings; end it with `return config`"),
        (BODY + "    return config.to_dict()\n", "mine.py: get_config returns dict"),
        (BODY + "    config.data = 3\n    return config\n", "mine.py"),
        ("def get_config(a, b):\n    pass\n", "mine.py: TypeError: get_config\\(\\) missing 2 required"),
        ("\0", "mine.py"),
    ],
)
def test_a_faulty_config_is_one_line_with_file_and_line(write, text, message):
    with pytest.raises(ValueError, match=message) as error:
        settings.load_config(write(text))
    assert "\n" not in str(error.value)


def test_a_config_of_the_current_folder_is_named_alike(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("x = = 1\n", "import no_such_module\n"):
        write(text)
        with pytest.raises(ValueError, match="^mine.py, line 1: "):
            settings.load_config("mine.py")
    (tmp_path / "demo").mkdir()  # what `pathflip demo` makes
    assert settings.load_config("demo").train.steps == 300


def test_a_config_that_prints_prints_to_stderr(write, capsys):
    settings.load_config(write("print('hello')\n" + BODY + "    print('there')\n    return config\n"))
    assert capsys.readouterr() == ("", "hello\nthere\n")


def test_an_argument_that_a_config_does_not_take_is_named(write):
    path = write(
        "from pathflip_jax.configs import align_base\n\n\ndef get_config():\n    return align_base.get_config()\n"
    )
    settings.load_config(path)
    with pytest.raises(ValueError, match="takes no argument, but :smoke is given"):
        settings.load_config(f"{path}:smoke")


def test_what_is_no_python_file_is_named(write, tmp_path):
    for name in ("mine.yaml", "config.json", "mine"):
        with pytest.raises(ValueError, match=f"{name}: expected a Python file"):
            settings.load_config(write("train: 1\n", name))
    with pytest.raises(OSError, match="is a folder"):
        settings.load_config(str(tmp_path))


def test_the_command_ends_without_a_traceback(write, capsys):
    assert main(["train", f"--config={write('import nothing_such')}", "--workdir=w"]) == WRONG_INPUT
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "mine.py, line 1: ModuleNotFoundError" in said
    assert loop.main(["--help"]) == 0


NONE = ("model.logit_bias_init", "loss.negatives_per_slide", "loss.negatives_at_once")


@pytest.mark.parametrize("key", NONE)
def test_none_is_none_from_a_file_and_from_the_command_line(write, key):
    given = ["--config.data.records=r", "--config.data.texts=t", "--config.data.tokenizer=v", "--workdir=w"]
    path = write(BODY + f"    config.{key} = 5\n    return config\n")
    section, name = key.split(".")

    def parsed(*more):
        found, _ = settings.parse([f"--config={path}", *given, *more])
        return flat(found)[key]

    assert parsed() == 5
    for none in ("None", "none"):
        assert parsed(f"--config.{key}={none}") is None
    assert parsed(f"--config.{key}=None", f"--config.{key}=7") == 7
    assert settings.load_config(write(BODY + f"    config.{key} = None\n    return config\n"))[section][name] is None


@pytest.mark.parametrize(
    "key", ["train.batch_size", "optim.clip", "data.slides", "data.resident", "train.deterministic"]
)
def test_none_where_no_config_documents_it_is_refused_by_name(write, key):
    with pytest.raises(ValueError, match=f"{key}=None: expected"):
        settings.parse(["--config=demo", "--workdir=w", f"--config.{key}=None"])
    config = settings.load_config(write(BODY + f"    config.{key} = None\n    return config\n"))
    with pytest.raises(ValueError, match=f"{key}=None: expected"):
        settings.freeze(config)

"""Settings: files, names and overrides; whatever is wrong is named with what was meant."""

import shutil

import pytest

from pathflip_jax.runtime import config_files
from pathflip_jax.settings import kinds
from pathflip_jax.training import loop, settings

REQUIRED = ["--config.data.records=r", "--config.data.texts=t", "--config.data.tokenizer=v", "--workdir", "w"]


def test_overrides_reach_the_config_and_keep_their_type():
    config, options = settings.parse(
        ["--config", "demo", *REQUIRED, "--config.train.steps", "7", "--config.model.logit_bias_init=-10"]
    )
    assert (config.train.steps, config.data.records, options["workdir"]) == (7, "r", "w")
    assert config.model.logit_bias_init == -10.0 and isinstance(config.model.logit_bias_init, float)
    assert config.optim.learning_rate == settings.load_config("demo").optim.learning_rate


def test_a_file_and_a_bundled_name_are_one_config(tmp_path):
    copy = str(shutil.copy(config_files.bundled_configs()["align_large"], tmp_path / "mine.py"))
    assert settings.load_config(copy).to_dict() == settings.load_config("align_large").to_dict()
    smoke = settings.load_config(f"{copy}:smoke")
    assert smoke.train.steps == 4 and smoke.model.hidden == 32


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config=demo", "--config.data.recods=x", "--workdir=w"], r"demo\.py has no setting data\.recods; did you "
         r"mean data\.records\?"),
        (["--config=demo", "--config.train.learning_rate=1", "--workdir=w"], r"did you mean optim\.learning_rate\?"),
        (["--config=align_bse", "--workdir=w"], r"bundled configs are align_base, align_large, demo, lm_demo, "
             r"lm_joint, lm_stage1, lm_stage2, pathflip2, small_cohort; did you mean "
         r"align_base\?"),
        (["--config=demo:tiny", "--workdir=w"], "argument 'smoke' or none, not 'tiny'"),
        (["--config=demo", "--config.train.steps=many", "--workdir=w"], "train.steps=many: invalid literal"),
        (["--config=demo"], "--workdir is not given"),
        (["--workdir=w"], "give one --config, a file or one of align_base"),
        (["--config=demo", "--workdir=w", "--steps=3"], "steps"),
        (["--config=demo", "--workdir=w", "data.records=x"], "data.records=x: not an option"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(argv, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        settings.parse(argv)


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "config.optim.learnin_rate = 1.0",
            "called optim.learnin_rate; did you mean optim.learning_rate",
        ),
        ("config.optim.learning_rate = 'high'", "mine.py, line 6: TypeError: .*high is of .*str.* cannot be"),
        (
            "with config.ignore_type(): config.optim.learning_rate = 'high'",
            "learning_rate is 'high', expected float as in 0.0001",
        ),
        ("del config.loss.temperature", "loss.temperature is missing"),
        ("config.optim = config.optmi", "mine.py, line 6: .*optmi"),
        ("config.train.batch_size = = 8", "mine.py, line 6: invalid syntax in 'config.train.batch_size = = 8'"),
    ],
)
def test_wrong_config_files_are_named(tmp_path, line, message):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pathflip_jax.configs import align_base\n\n\ndef get_config(argument=''):\n"
        f"    config = align_base.get_config(argument)\n    {line}\n    return config\n"
    )
    with pytest.raises(ValueError, match=message) as raised:
        settings.load_config(str(path))
    assert str(path) in str(raised.value)


def test_missing_settings_and_paths_say_what_belongs_there(tmp_path):
    config = settings.freeze(settings.load_config("demo"))
    with pytest.raises(ValueError, match=r"data\.records is not set: add --config\.data\.records=.*pathflip prepare"):
        settings.require(config)
    given = {"data.records": str(tmp_path), "data.texts": "no/reports.jsonl", "data.tokenizer": str(tmp_path)}
    config = config.with_changes(given)
    with pytest.raises(FileNotFoundError, match=r"data\.texts=no/reports\.jsonl: no such file or folder; expected"):
        settings.require(config)


def test_help_shows_an_example_and_explains_the_settings_of_a_config(capsys):
    assert loop.main(["--help"]) == 0
    assert "pathflip train --config align_base" in capsys.readouterr().out
    assert loop.main(["--config", "lm_stage2", "--help"]) == 0
    said = capsys.readouterr().out
    for key, found in kinds.fields(kinds.LanguageSettings).items():
        assert f"--config.{key}=" in said and found.help.split()[0] in said
    assert "--config.lm.trains=projector,lora\n" in said and "a whole number of at least 1 and at most 1024" in said


def test_a_config_of_an_earlier_version_does_what_that_did(tmp_path, caplog):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pathflip_jax.configs import align_base\n\n\ndef get_config(argument=''):\n"
        "    config = align_base.get_config(argument)\n    del config.data.max_unknown_share\n    return config\n"
    )
    assert settings.load_config(str(path)).data.max_unknown_share == 1.0
    assert "mine.py: written for an earlier version" in caplog.text and "data.max_unknown_share=1.0" in caplog.text

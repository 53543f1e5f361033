"""Settings: every field has help and bounds; values out of bounds are refused by name, with value and cure."""

import dataclasses
import math
from dataclasses import dataclass

import pytest

from pathflip_jax.losses.pathflip2 import SigmoidLossConfig
from pathflip_jax.model.config import CONFIGS
from pathflip_jax.settings import kinds
from pathflip_jax.settings.fields import CURRENT_VALUE, Range, Unrestricted, Words, setting
from pathflip_jax.settings.kinds import KINDS, AlignmentSettings, LanguageSettings, PathFLIP2Settings
from pathflip_jax.settings.networks import LossConfig
from pathflip_jax.settings.sections import TrainSettings
from pathflip_jax.training import resume, settings
from pathflip_jax.training.alignment import count_parameters

REQUIRED = ["--config.data.records=r", "--config.data.texts=t", "--config.data.tokenizer=v", "--workdir=w"]
FIELDS = [(kind, key) for kind in KINDS for key in kinds.fields(kind)]
NUMBERS = [(kind, key) for kind, key in FIELDS if isinstance(kinds.fields(kind)[key].bounds, Range)]


@pytest.mark.parametrize(("kind", "key"), FIELDS, ids=str)
def test_every_setting_has_a_help_and_bounds_that_hold_its_default(kind, key):
    found, value = kinds.fields(kind)[key], kinds.defaults(kind)[key]
    assert found.help and found.objection(key, value) == ""
    if isinstance(value, bool | str):
        assert isinstance(found.bounds, Words | Unrestricted)
    elif value is not None and value != ():
        assert isinstance(found.bounds, Range) and found.bounds.whole == isinstance(value, int)
    if isinstance(found.bounds, Unrestricted):
        assert found.bounds.reason


@pytest.mark.parametrize(("kind", "key"), NUMBERS, ids=str)
def test_no_number_takes_what_is_no_number_or_absurd(kind, key):
    found = kinds.fields(kind)[key]
    for value in (math.nan, math.inf, -math.inf, -(10.0**9), True, "8", 10**400):
        assert key in found.objection(key, value, 1), value
    assert (found.objection(key, None) == "") == (None in found.bounds.besides)


def test_the_kinds_agree_on_the_settings_that_they_share():
    """Bounds and compatibility (resuming, earlier versions) agree; help texts may differ."""
    seen = {}
    for kind, key in FIELDS:
        found = kinds.fields(kind)[key]
        facts = found.bounds, found.may_change, found.before
        assert seen.setdefault(key, facts) == facts, key


def test_the_model_takes_each_setting_that_is_called_one():
    """The model config has all settings of a model but two, which concern the start of training."""
    for kind, family in ((AlignmentSettings, "pathflip"), (PathFLIP2Settings, "pathflip2")):
        section = kinds.fields(kind)
        names = {key.removeprefix("model.") for key in section if key.startswith("model.")}
        taken = {field.name for field in dataclasses.fields(CONFIGS[family])}
        assert names - taken - {"family"} <= {"bert", "freeze_text_encoder"}
        assert taken - names <= {"patch_hidden"}  # only in converted weights


def test_settings_are_frozen_checked_and_go_to_plain_values_and_back():
    for kind in KINDS:
        changed = kind().with_changes({"train.steps": 7, "optim.clip": 2, "train.seed": 3})
        assert changed.train.steps == 7 and isinstance(changed.optim.clip, float)
        assert kind.from_dict(changed.to_dict()) == changed != kind() and hash(changed) != hash(kind())
        with pytest.raises(dataclasses.FrozenInstanceError):
            changed.train.steps = 8
        with pytest.raises(ValueError, match="train.keep=0: expected a whole number of at least 1, such as"):
            dataclasses.replace(kind(), train=TrainSettings(keep=0))
    assert AlignmentSettings.from_dict({"data": {"text_rows": [1, 2]}}).data.text_rows == (1, 2)


def test_a_kind_is_known_by_its_sections():
    for kind in KINDS:
        assert kinds.kind_of(kind().to_dict()) is kind
    assert kinds.kind_of({"data": {}, "model": 3}) is AlignmentSettings
    with pytest.raises(ValueError, match="model.family=pathflip3: expected one of pathflip2, such as --config.model"):
        settings.parse(["--config=pathflip2", *REQUIRED, "--config.model.family=pathflip3"])
    with pytest.raises(ValueError, match="model.tokens, lm.trains: no such setting; known settings are data.records, "):
        AlignmentSettings.from_dict({"model": {"layers": 2, "tokens": 1}, "lm": {"trains": "lora"}})
    assert isinstance(AlignmentSettings().loss, LossConfig) and isinstance(PathFLIP2Settings().loss, SigmoidLossConfig)


def test_a_new_setting_is_one_line(monkeypatch, tmp_path):
    """One field is enough for bounds, resuming and runs of earlier versions."""

    @dataclass(frozen=True)
    class Train(TrainSettings):
        pace: float = setting(0.5, Range(0, 1), "made up", before=0.25)

    @dataclass(frozen=True)
    class Made(LanguageSettings):
        train: Train = Train()

    assert Made().with_changes({"train.pace": 1}).train.pace == 1.0
    with pytest.raises(ValueError, match="train.pace=2.0: expected a finite number .* at most 1, such as"):
        Made().with_changes({"train.pace": 2})
    monkeypatch.setitem(kinds.LEGACY_VALUES, "train.pace", dict(kinds.fields(Made))["train.pace"].before)
    monkeypatch.setattr(resume, "kind_of", lambda begun: Made)
    begun = LanguageSettings().to_dict()
    assert resume.resume_as(Made(), begun, tmp_path).train.pace == 0.25
    assert kinds.LEGACY_VALUES["data.row_step"] is CURRENT_VALUE and "train.seed" not in kinds.LEGACY_VALUES


@pytest.mark.parametrize(
    "setting",
    "train.save_every=0 train.eval_every=0 train.batch_size=0 train.batch_size=-4 train.steps=-1 "
    "train.accumulate=0 train.keep=0 train.keep_every=-5 train.seed=-1 train.seed=4294967296 "
    "train.hang_seconds=-1 train.epochs=-1 train.heartbeat_seconds=0 data.threads=0 data.regions=0 "
    "data.subcaptions=0 data.patch_slots=-1 data.resident=gpu data.caption_length=0 data.caption_share=0 "
    "data.max_unknown_share=1.5 optim.learning_rate=-1 optim.learning_rate=0 optim.learning_rate=nan "
    "optim.warmup_steps=-1 optim.b1=1 optim.eps=0 optim.clip=inf mesh.data=0 mesh.fsdp=-2 model.dropout=1 "
    "model.layers=0 model.hidden=-1 loss.temperature=0 loss.negatives_at_once=0 loss.slide_weight=-1 "
    "train.preemptions_per_day=-1 train.select_margin=-0.1 model.compute_dtype=float16".split(),
)  # fmt: skip
def test_a_setting_out_of_bounds_is_refused_by_name_value_and_cure(setting):
    name = setting.partition("=")[0]
    with pytest.raises(ValueError) as error:
        settings.parse(["--config=demo", *REQUIRED, f"--config.{setting}"])
    said = str(error.value)
    assert f"{name}=" in said and "expected" in said and "\n" not in said


@pytest.mark.parametrize(
    "given, message",
    [
        (["model.heads=3"], "model.hidden=128 is not a multiple of model.heads=3"),
        (["model.region_heads=5"], "model.embed_dim=64 is not a multiple of model.region_heads=5"),
        (["train.accumulate=5"], "train.batch_size=48 is not a multiple of train.accumulate=5"),
        (["data.text_groups=5"], "train.batch_size=48 is not a multiple of data.text_groups=5"),
        (["data.caption_length=600"], "data.caption_length=600 is more than model.max_positions=512"),
        (["train.local_every=5"], "train.local_checkpoints and train.local_every: .*set both or neither"),
        (["train.local_checkpoints=ram"], "train.local_checkpoints and train.local_every: .*set both or neither"),
        (["train.epochs=0", "train.steps=0"], "train.steps=0 and train.epochs=0: there is nothing to do"),
        (["data.text_rows=(1,-1)"], "data.text_rows=.*: expected a whole number of at least 0"),
        (["train.save_every=0", "data.regions=0"], "data.regions=0: .*; train.save_every=0: .*saves only at the end"),
    ],
)
def test_settings_that_contradict_each_other_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        settings.parse(["--config=demo", *REQUIRED, *(f"--config.{one}" for one in given)])


def test_zero_where_it_means_something_is_taken():
    given = ("train.steps=0", "data.patch_slots=0", "optim.clip=0", "train.keep_every=0", "train.hang_seconds=0")
    found, _ = settings.parse(["--config=demo", *REQUIRED, *(f"--config.{one}" for one in given)])
    assert [kinds.flat(found)[one.partition("=")[0]] for one in given] == [0] * len(given)


def test_a_run_from_python_and_doctor_check_as_well(tmp_path):
    config = settings.load_config("demo")
    config.train.save_every = 0
    with pytest.raises(ValueError, match="train.save_every=0: expected a whole number of at least 1.*such as"):
        settings.freeze(config)
    path = tmp_path / "mine.py"
    path.write_text(
        "from pathflip_jax.configs import demo\n\n\ndef get_config(argument=''):\n"
        "    config = demo.get_config(argument)\n    config.train.batch_size = None\n    return config\n"
    )
    with pytest.raises(ValueError, match="train.batch_size=None: expected a whole number"):
        count_parameters(settings.freeze(settings.load_config(str(path))))

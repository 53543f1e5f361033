"""Bounds of settings: each setting has one, and what is outside is refused by name, with value and cure."""

import math

import pytest

from pathflip_jax.runs import bounds
from pathflip_jax.runtime import config_files
from pathflip_jax.training import settings
from pathflip_jax.training.alignment import check_config

REQUIRED = ["--config.data.records=r", "--config.data.texts=t", "--config.data.tokenizer=v", "--workdir=w"]
REFERENCES = ("align_base", "pathflip2", "lm_stage1")


def defaults():
    """Every setting of the reference configs with its default."""
    found = {}
    for name in REFERENCES:
        found |= config_files.defaults(name)
    return found


def test_every_setting_has_bounds_and_every_bound_a_setting():
    assert set(bounds.BOUNDS) == set(defaults())
    for name, value in defaults().items():
        bound = bounds.BOUNDS[name]
        assert bounds.objection(name, value) == "", name
        if isinstance(value, bool | str):
            assert isinstance(bound, bounds.Words | bounds.Free), name
        elif value is not None and value != ():
            assert isinstance(bound, bounds.Range) and bound.whole == isinstance(value, int), name
        if isinstance(bound, bounds.Free):
            assert bound.reason


@pytest.mark.parametrize("name", [name for name, bound in bounds.BOUNDS.items() if isinstance(bound, bounds.Range)])
def test_no_number_takes_what_is_no_number_or_absurd(name):
    for value in (math.nan, math.inf, -math.inf, -(10.0**9), True, "8", 10**400):
        assert name in bounds.objection(name, value, 1), value
    assert (bounds.objection(name, None) == "") == (None in bounds.BOUNDS[name].besides)


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
        (["model.heads=3"], "model.hidden=128 is no multiple of model.heads=3"),
        (["model.region_heads=5"], "model.embed_dim=64 is no multiple of model.region_heads=5"),
        (["train.accumulate=5"], "train.batch_size=48 is no multiple of train.accumulate=5"),
        (["data.text_groups=5"], "train.batch_size=48 is no multiple of data.text_groups=5"),
        (["data.caption_length=600"], "data.caption_length=600 is more than model.max_positions=512"),
        (["train.epochs=0", "train.steps=0"], "train.steps=0 and train.epochs=0: there is nothing to do"),
        (["data.text_rows=(1,-1)"], "data.text_rows=.*: expected a whole number of at least 0"),
        (["train.save_every=0", "data.regions=0"], "data.regions=0: .*; train.save_every=0: .*saves at the end alone"),
    ],
)
def test_settings_that_contradict_each_other_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        settings.parse(["--config=demo", *REQUIRED, *(f"--config.{one}" for one in given)])


def test_zero_where_it_means_something_is_taken():
    given = ("train.steps=0", "data.patch_slots=0", "optim.clip=0", "train.keep_every=0", "train.hang_seconds=0")
    settings.parse(["--config=demo", *REQUIRED, *(f"--config.{one}" for one in given)])


def test_a_run_from_python_and_doctor_check_as_well(tmp_path):
    config = settings.load_config("demo")
    config.train.save_every = 0
    with pytest.raises(ValueError, match="train.save_every=0: expected a whole number of at least 1.*such as"):
        settings.require(config)
    path = tmp_path / "mine.py"
    path.write_text(
        "from pathflip_jax.configs import demo\n\n\ndef get_config(argument=''):\n"
        "    config = demo.get_config(argument)\n    config.train.batch_size = None\n    return config\n"
    )
    with pytest.raises(ValueError, match="train.batch_size=None: expected a whole number"):
        check_config(str(path))

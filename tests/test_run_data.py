"""What a run trains on: splits, batch sizes that devices can share, and what is said about data that do not fit."""

import pytest

from pathflip_jax import settings
from pathflip_jax.run_data import choose_groups, open_data


@pytest.fixture
def config(tiny_cohort):
    """Settings by their dotted names -> the config of a small run on the tiny cohort."""

    def with_settings(**changes):
        given = {"data.regions": 2, "data.patch_slots": 4, "train.batch_size": 4} | changes
        options = [f"--config.{name}={value}" for name, value in given.items()]
        return settings.parse(["--config=demo:smoke", *tiny_cohort.settings(), *options, "--workdir=w"])[0]

    return with_settings


def test_each_split_of_the_slide_table_has_its_batches(config):
    data = open_data(config(), 1)
    assert data.train.slides == [(f"S{i:02d}",) for i in range(12)]
    assert data.validation.slides == [(f"S{i:02d}",) for i in range(12, 18)]
    assert data.train.steps_per_epoch == 3 and data.train.batch(0).patches.shape == (4, 2, 4, 16)
    assert data.validation.steps_per_epoch == 2 and data.validation.batch(0).patches.shape == (3, 2, 4, 16)
    assert data.tokenizer.vocab_size > 5 and data.facts["encoder"] == "tiny" and data.facts["feature_dim"] == 16


def test_without_a_slide_table_all_slides_train(config):
    data = open_data(config(**{"data.slides": ""}), 1)
    assert len(data.train.slides) == 24 and data.validation is None


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("data.split", "nightly", "no slide of split 'nightly'"),
        ("train.batch_size", 400, "make no batch of 400"),
        ("train.accumulate", 3, "batch of 4 slides cannot be cut evenly into 3"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_named(config, setting, value, message):
    with pytest.raises(ValueError, match=message):
        open_data(config(**{setting: value}), 1)


def test_records_that_are_not_finished_are_refused(config, tiny_cohort):
    records = tiny_cohort.copy_records()
    (records / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.json: no such file, so the records are not finished"):
        open_data(config(**{"data.records": records}), 1)


def test_groups_divide_over_devices_and_microbatches():
    assert choose_groups(64, 1) == 4 and choose_groups(64, 32) == 32 and choose_groups(64, 64) == 64
    assert choose_groups(6, 1) == 3 and choose_groups(7, 7) == 7
    with pytest.raises(ValueError, match="batch of 6 slides cannot be cut evenly into 4"):
        choose_groups(6, 4)

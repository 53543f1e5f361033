"""Every bundled config: it loads, its model builds without computing, and it agrees with DESIGN section 6."""

import pytest

from pathflip_jax.losses.pathflip import LossConfig
from pathflip_jax.losses.pathflip2 import SigmoidLossConfig
from pathflip_jax.model.config import PathFLIP2Config
from pathflip_jax.runtime.config_files import bundled_configs
from pathflip_jax.settings.sections import OptimConfig
from pathflip_jax.training.alignment import count_parameters, family_of, model_config
from pathflip_jax.training.data import choose_groups
from pathflip_jax.training.language import check_language_settings
from pathflip_jax.training.settings import freeze, load_config

NAMES = ["align_base", "align_large", "demo", "pathflip2", "small_cohort"]
LANGUAGE = ["lm_demo", "lm_joint", "lm_stage1", "lm_stage2"]


def test_all_bundled_configs_are_tested():
    assert sorted(bundled_configs()) == sorted(NAMES + LANGUAGE)


@pytest.mark.parametrize("argument", ["", ":smoke"])
@pytest.mark.parametrize("name", NAMES)
def test_config_builds(name, argument):
    config = freeze(load_config(name + argument))
    parameters = count_parameters(config)
    assert parameters > 0 and (parameters < 2_000_000 if argument else True)
    choose_groups(config.train.batch_size, config.train.accumulate)
    longest = max(config.data.caption_length, config.data.subcaption_length)
    assert longest <= config.model.max_positions


@pytest.mark.parametrize("argument", ["", ":smoke"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_config_of_the_language_stage_is_sound(name, argument):
    config = freeze(load_config(name + argument))
    check_language_settings(config)
    assert config.lm.random_decoder == ("decoder" in config.lm.trains)


def test_the_stages_train_what_they_are_named_for():
    trains = {name: load_config(name).lm.trains for name in LANGUAGE}
    assert trains["lm_stage1"] == "projector" and trains["lm_stage2"] == "projector,lora"
    assert trains["lm_joint"] == "aligner,projector,lora"
    stage2 = load_config("lm_stage2").lm
    assert (stage2.lora_rank, stage2.lora_alpha, stage2.lora_dropout) == (16, 32.0, 0.05)
    assert load_config("lm_stage1").optim.learning_rate == 1e-3


@pytest.mark.parametrize("name", NAMES + LANGUAGE)
def test_config_is_an_experiment_record(name):
    text = bundled_configs()[name].read_text()
    for heading in ("Command ", "Hardware ", "Hours ", "Result "):
        assert f"\n{heading}" in text, heading


def test_align_base_is_the_released_code():
    config = freeze(load_config("align_base"))
    model = model_config(config)
    assert (model.layers, model.hidden, model.heads, model.num_queries, model.embed_dim) == (12, 768, 12, 8, 256)
    assert (model.vocab_size, model.feature_dim, model.cross_attention_freq, model.dropout) == (30523, 512, 2, 0.1)
    assert config.optim == OptimConfig(preset="released", clip=0.0)
    assert config.loss == LossConfig()
    data = config.data
    assert (data.regions, data.subcaptions, data.caption_length, data.subcaption_length) == (24, 8, 384, 192)


def test_pathflip2_is_the_published_network():
    config = freeze(load_config("pathflip2"))
    model = model_config(config, vocab_size=28997)  # Bio_ClinicalBERT's words, and [DEC]
    published = PathFLIP2Config(compute_dtype="bfloat16")
    assert model == published and published.vocab_size == 28996
    assert config.loss == SigmoidLossConfig()
    with pytest.raises(ValueError, match="mean_padded"):
        config = config.with_changes({"model.text_pooling": "mean_padded"})
        family_of(config).stage(config, model_config(config), None)


def test_a_small_cohort_is_sampled_anew_at_every_step():
    ours, demo = freeze(load_config("small_cohort")), freeze(load_config("demo"))
    assert ours.data.patch_slots < demo.data.patch_slots and ours.data.caption_share < demo.data.caption_share
    assert ours.data.standardise and ours.train.steps > demo.train.steps and ours.model == demo.model


def test_a_small_cohort_pools_regions_without_weights_and_spares_captions_alike():
    ours = freeze(load_config("small_cohort"))
    assert ours.loss.region_pooling == "cosine" and ours.loss.soft_targets > 0 and ours.optim.weight_average > 0.9


def test_align_large_loss_does_not_grow_with_the_batch():
    config = freeze(load_config("align_large"))
    assert config.loss.normaliser == "per_slide"
    assert (model_config(config).logit_scale_init, model_config(config).logit_bias_init) == (10.0, -10.0)

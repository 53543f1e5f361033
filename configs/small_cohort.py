"""Alignment of cohorts of hundreds of slides."""

from ml_collections import ConfigDict
from pathflip_jax.configs import demo


def get_config(argument: str = "") -> ConfigDict:
    config = demo.get_config()
    config.data.update(regions=8, patch_slots=2)
    config.optim.update(learning_rate=5e-4)
    config.train.update(steps=400, eval_every=50)
    config.train.update(select_margin=0.0, select_tie="earliest")
    return demo.align_base.adapt(config, argument)

"""Aligner, projector and low-rank adapters trained together, as the released code trains its language model.

Command    pathflip train --config lm_joint ... (as lm_stage1) --workdir runs/lm
Hardware   not run at scale yet
Hours      not measured
Result     not measured

Only the slide branch of the aligner is trained; its text branch gets no gradient. LoRA rank 16, as released.
"""

from ml_collections import ConfigDict
from pathflip_jax.configs import lm_stage1


def get_config(argument: str = "") -> ConfigDict:
    config = lm_stage1.get_config()
    config.lm.trains = "aligner,projector,lora"
    config.data.template = "plain"
    config.optim.update(learning_rate=1e-4, warmup_steps=200, final_learning_rate=5e-6, weight_decay=0.05)
    return lm_stage1.adapt(config, argument)

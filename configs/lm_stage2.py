"""The language stage, second part: low-rank adapters in the decoder are trained with the projector of the first part.

Command    pathflip train --config lm_stage2 --config.lm.start=runs/lm1 ... (as lm_stage1) --workdir runs/lm2
Hardware   not run at scale yet
Hours      not measured
Result     not measured

Rank and alpha of the follow-up; for a decoder of 4B parameters it takes 64 and 128.
"""

from ml_collections import ConfigDict
from pathflip_jax.configs import lm_stage1


def get_config(argument: str = "") -> ConfigDict:
    config = lm_stage1.get_config()
    config.lm.trains = "projector,lora"
    config.optim.update(learning_rate=2e-4)
    return lm_stage1.adapt(config, argument)

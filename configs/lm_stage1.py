"""The language stage, first part: a projector learns to map slides into the token space of a frozen decoder.

Command    pathflip train --config lm_stage1 --config.data.records=RECORDS --config.data.slides=SLIDES.csv \\
               --config.data.texts="reports.jsonl,vqa.csv*2" --config.lm.aligner=runs/base \\
               --config.lm.decoder=Qwen3-0.6B --workdir runs/lm1
Hardware   not run at scale yet
Hours      not measured
Result     not measured

Learning rate of the follow-up's first stage (1e-3). `lm_stage1:smoke` shrinks the batch and runs four steps;
`pathflip train --config lm_stage1 --help` lists every setting, and a config with any other setting is refused.
"""

from ml_collections import ConfigDict
from pathflip_jax.configs import align_base

from pathflip_jax.runtime.config_files import as_config
from pathflip_jax.settings.kinds import LanguageSettings

SMOKE = {
    "data": {"regions": 4, "patch_slots": 16, "threads": 2},
    "lm": {"dtype": "float32", "compute_dtype": "float32", "remat": False},
    "train": align_base.SMOKE["train"] | {"batch_size": 4},
    "optim": align_base.SMOKE["optim"],
}


def get_config(argument: str = "") -> ConfigDict:
    return adapt(as_config(LanguageSettings()), argument)


def adapt(config: ConfigDict, argument: str) -> ConfigDict:
    """Apply the argument of --config, as `align_base.adapt` does."""
    return align_base.adapt(config, argument, SMOKE)

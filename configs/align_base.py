"""PathFLIP alignment with the released code's settings: the reference for every other config.

Command    pathflip train --config align_base --config.data.records=RECORDS --config.data.texts=REPORTS.jsonl \\
               --config.data.slides=SLIDES.csv --config.data.tokenizer=BERT --config.model.bert=BERT \\
               --workdir runs/base
Hardware   the paper names 8 RTX 4090; here: not run at scale yet
Hours      not measured
Result     not measured

`align_base:smoke` shrinks everything to a few seconds on a laptop, to check data and paths.
`pathflip train --config align_base --help` lists every setting; a config with any other setting is refused.
"""

from ml_collections import ConfigDict

from pathflip_jax.runtime.config_files import as_config
from pathflip_jax.settings.kinds import AlignmentSettings

SMOKE = {  # a run that ends within seconds
    "data": {
        "regions": 4, "subcaptions": 2, "caption_length": 64, "subcaption_length": 32, "row_step": 32, "threads": 2,
        "patch_slots": 16,
    },
    "model": {
        "embed_dim": 32, "hidden": 32, "layers": 2, "heads": 2, "intermediate": 64, "num_queries": 2,
        "region_layers": 1, "region_heads": 2, "text_region_heads": 2, "compute_dtype": "float32", "bert": "",
    },
    "train": {"batch_size": 8, "accumulate": 1, "steps": 4, "eval_every": 2, "save_every": 2},
    "optim": {"warmup_steps": 2},
}  # fmt: skip


def get_config(argument: str = "") -> ConfigDict:
    return adapt(as_config(AlignmentSettings()), argument)


def adapt(config: ConfigDict, argument: str, smoke: dict[str, dict] = SMOKE) -> ConfigDict:
    """Apply the argument after the colon of --config: none, or `smoke`, which shrinks everything."""
    if argument == "smoke":
        config.update(smoke)
    elif argument:
        raise ValueError(f"a config takes the argument 'smoke' or none, not {argument!r}")
    return config

"""PathFLIP2, the authors' follow-up network, on the same records and texts.

Command    pathflip train --config pathflip2 --config.data.records=RECORDS --config.data.texts=REPORTS.jsonl \\
               --config.data.slides=SLIDES.csv --config.data.tokenizer=BERT --config.model.bert=BERT \\
               --workdir runs/pathflip2
Hardware   the published script names 4 GPUs; here: not run at scale yet
Hours      not measured
Result     not measured

`pathflip2:smoke` shrinks everything to a few seconds on a laptop. `pathflip train --config pathflip2 --help` lists
every setting: the published values, and those of align_base for what was not published.
"""

from ml_collections import ConfigDict
from pathflip_jax.configs import align_base

from pathflip_jax.runtime.config_files import as_config
from pathflip_jax.settings.kinds import PathFLIP2Settings

SMOKE = align_base.SMOKE | {
    "model": {
        "embed_dim": 32, "hidden": 32, "layers": 2, "heads": 2, "intermediate": 64, "tokens": 8, "token_heads": 2,
        "text_region_heads": 2, "top_k": 8, "compute_dtype": "float32", "bert": "",
    },
}  # fmt: skip


def get_config(argument: str = "") -> ConfigDict:
    return align_base.adapt(as_config(PathFLIP2Settings()), argument, SMOKE)

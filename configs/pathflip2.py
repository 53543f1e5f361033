"""PathFLIP2, the authors' follow-up network, on the same records and texts.

Command    pathflip train --config pathflip2 --config.data.records=RECORDS --config.data.texts=REPORTS.jsonl \\
               --config.data.slides=SLIDES.csv --config.data.tokenizer=BERT --config.model.bert=BERT \\
               --workdir runs/pathflip2
Hardware   the published script names 4 GPUs; here: not run at scale yet
Hours      not measured
Result     not measured

`pathflip2:smoke` shrinks everything to a few seconds on a laptop. This file lists every setting of this family; those
of data, optimizer, mesh and run are those of align_base, with the published values where they differ.
"""

from ml_collections import ConfigDict
from pathflip_jax.configs import align_base


def get_config(argument: str = "") -> ConfigDict:
    config = align_base.get_config()

    config.data.regions = 16  # with regions of 16 x 16 patches up to 4,096 patches of a slide a step, as published
    config.data.caption_length = 512
    config.data.subcaption_length = 512

    config.model = ConfigDict()
    config.model.family = "pathflip2"
    config.model.feature_dim = 0  # 0: as the records say
    config.model.embed_dim = 512
    config.model.tokens = 128  # learned tokens that read the patches, beside the one that becomes the slide
    config.model.token_layers = 1
    config.model.token_heads = 8
    config.model.token_dropout = 0.2
    config.model.hidden = 768
    config.model.layers = 12
    config.model.heads = 12
    config.model.intermediate = 3072
    config.model.vocab_size = 0  # 0: as the tokenizer says
    config.model.max_positions = 512
    config.model.dropout = 0.1  # of BERT and of the projections
    config.model.text_pooling = "mean"  # of a text's own tokens; or "cls", the published default
    config.model.text_lora_rank = 0  # above 0: LoRA in a text encoder that itself stays as it was; published: 16
    config.model.text_lora_alpha = 64.0
    config.model.freeze_text_encoder = False
    config.model.region_head = "soft_topk"  # or "attention"
    config.model.text_region_heads = 8  # of the attention head
    config.model.top_k = 128
    config.model.topk_temperature = 0.5
    config.model.scale_init = 10.0
    config.model.bias_init = -10.0
    config.model.init = "bert"
    config.model.compute_dtype = "bfloat16"
    config.model.remat = False
    config.model.bert = ""  # Hugging Face BERT folder whose weights start the text encoder; "": random

    config.loss = ConfigDict()
    config.loss.slide = "sigmoid"  # SigLIP's; or "infonce", with temperature and label smoothing
    config.loss.region = "pairs"  # all texts against all text-conditioned embeddings; or "flair"
    config.loss.slide_weight = 1.0
    config.loss.region_weight = 1.0
    config.loss.temperature = 0.1
    config.loss.label_smoothing = 0.1
    # 0: all; else texts of so many slides are compared at a time, so that the largest array of the region loss takes
    # 4 * slides of a device * slides_at_once * subcaptions**2 bytes.
    config.loss.slides_at_once = 0

    config.optim.weight_decay = 0.01
    config.train.batch_size = 64  # slides per step over all devices; published: 16 on each of 4

    return adapt(config, argument)


def adapt(config: ConfigDict, argument: str) -> ConfigDict:
    """Apply what stands after the colon of --config: nothing, or `smoke`, which shrinks everything."""
    if argument == "smoke":
        config.data.update(regions=4, subcaptions=2, caption_length=64, subcaption_length=32, row_step=32, threads=2)
        config.data.patch_slots = 16
        config.model.update(embed_dim=32, hidden=32, layers=2, heads=2, intermediate=64, tokens=8, token_heads=2)
        config.model.update(text_region_heads=2, top_k=8, compute_dtype="float32", bert="")
        config.train.update(batch_size=8, accumulate=1, steps=4, eval_every=2, save_every=2)
        config.optim.warmup_steps = 2
    elif argument:
        raise ValueError(f"a config takes the argument 'smoke' or none, not {argument!r}")
    return config

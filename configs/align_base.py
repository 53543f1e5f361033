"""PathFLIP alignment with the released code's settings: the reference for every other config.

Command    pathflip train --config align_base --config.data.records=RECORDS --config.data.texts=REPORTS.jsonl \\
               --config.data.slides=SLIDES.csv --config.data.tokenizer=BERT --config.model.bert=BERT \\
               --workdir runs/base
Hardware   the paper names 8 RTX 4090; here: not run at scale yet
Hours      not measured
Result     not measured

`align_base:smoke` shrinks everything to a few seconds on a laptop, to see that data and paths are right.
This file lists every setting; a config that names another one is refused.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(argument: str = "") -> ConfigDict:
    config = ConfigDict()

    config.data = ConfigDict()
    config.data.records = ""  # folder of records: `pathflip prepare` or `pathflip import`; gs:// and s3:// too
    config.data.texts = ""  # text table: reports by slide id; it, slide table and tokenizer may be URLs too
    config.data.slides = ""  # slide table with split train|val|test; without one, all slides train and none validate
    config.data.tokenizer = ""  # BERT folder, or one of `pathflip vocabulary`; released: BioBERT cased v1.2
    config.data.split = "train"
    config.data.val_split = "val"  # "": no validation
    config.data.regions = 24  # drawn per slide and step
    config.data.patch_slots = 0  # patches of a region; 0: as many as a full region holds
    config.data.subcaptions = 8
    config.data.merge_sentences = 3  # a subcaption drawn from a report merges 1 to this many of its sentences
    config.data.caption_length = 384
    config.data.subcaption_length = 192
    config.data.caption_share = 1.0  # of a report's sentences in a training caption, drawn anew; 1: the whole report
    config.data.max_unknown_share = 0.2  # of the pieces of the texts, unknown to the vocabulary: more is an error
    config.data.row_step = 128  # texts are packed into rows of 1, 2, 3, ... times so many tokens
    config.data.text_rows = ()  # rows of a text group, the shortest first; (): measured on the table
    config.data.text_groups = 0  # 0: up to sixteen slides to a group
    config.data.threads = 16  # reading ahead
    config.data.resident = ""  # read features once: "host" keeps them in memory, "device" on the devices

    config.model = ConfigDict()
    config.model.feature_dim = 0  # 0: as the records say
    config.model.embed_dim = 256
    config.model.hidden = 768
    config.model.layers = 12
    config.model.heads = 12
    config.model.intermediate = 3072
    config.model.num_queries = 8
    config.model.cross_attention_freq = 2
    config.model.vocab_size = 0  # 0: as the tokenizer says
    config.model.max_positions = 512
    config.model.patch_projection = "linear"
    config.model.region_layers = 2
    config.model.region_heads = 8
    config.model.text_region_heads = 8
    config.model.dropout = 0.1
    config.model.logit_scale_init = 2.6592600369327783  # ln(1 / 0.07), not exponentiated
    config.model.logit_bias_init = placeholder(float)  # None: no bias
    config.model.init = "bert"
    config.model.compute_dtype = "bfloat16"
    config.model.remat = False
    config.model.bert = ""  # Hugging Face BERT folder whose weights start the Q-Former; "": random

    config.loss = ConfigDict()
    config.loss.slide_weight = 1.0
    config.loss.region_weight = 1.0
    config.loss.temperature = 0.1
    config.loss.label_smoothing = 0.1
    # `released`, to repeat the published run: it is the released code's arithmetic at its batch of 8 slides, where the
    # region loss starts at 5.5. It grows with the batch (44 at 64): with a larger one take `per_slide` (align_large).
    config.loss.normaliser = "released"
    config.loss.negative_weight = 1.0
    config.loss.negatives_per_slide = placeholder(int)  # None: all other slides
    # None: all; else so many are scored at a time, so that the largest arrays of the region loss take no more than
    # 4 * slides of a device * negatives_at_once * max(embed_dim, text_region_heads * regions) bytes each.
    config.loss.negatives_at_once = placeholder(int)

    config.optim = ConfigDict()
    config.optim.preset = "released"  # all decays, cosine per epoch; "ours": no decay on biases, norms; per step
    config.optim.learning_rate = 1e-4
    config.optim.warmup_steps = 200
    config.optim.warmup_learning_rate = 1e-6
    config.optim.final_learning_rate = 5e-6
    config.optim.weight_decay = 0.05
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.eps = 1e-8
    config.optim.clip = 0.0  # global norm; 0: none, as released

    config.mesh = ConfigDict()
    config.mesh.data = -1  # -1: all devices that the others leave
    config.mesh.fsdp = 1  # devices that share one copy of the parameters
    config.mesh.region = 1  # devices that share the regions of a slide: for slides of very many, or batches of few

    config.train = ConfigDict()
    config.train.batch_size = 8  # slides per step over all devices; released: 8 on each
    config.train.accumulate = 1  # microbatches of a step; the loss still sees the whole batch
    config.train.epochs = 10  # not published; the released default of 1 is a placeholder
    config.train.steps = 0  # above 0: counts instead of epochs
    config.train.seed = 0
    config.train.eval_every = 500
    config.train.save_every = 500
    config.train.keep = 3  # checkpoints kept besides the best
    config.train.keep_every = 0  # those of every so many steps are kept for good; 0: none
    config.train.preemptions_per_day = 0.0  # stops a day to reckon with: a save_every is recommended; 0: not stated
    config.train.deterministic = False  # the same bits from run to run on GPUs too, slower there
    config.train.wandb_project = ""  # Weights & Biases project that gets the metrics too (extra [wandb]); "": none
    config.train.hang_seconds = 1800  # without progress, compilation aside: exit with 75 and say where; 0: never
    config.train.heartbeat_seconds = 60  # without a sign of a host: it is lost, and the others exit with 75
    config.train.checkpoints = ""  # local folder or gs://bucket/run that they go to; "": the workdir, with the logs
    config.train.select = "val/mean_reciprocal_rank"  # decides the best; smaller is better where the name says loss
    config.train.select_margin = 0.0  # the best is the latest within this of the top: what few slides cannot tell apart

    return adapt(config, argument)


def adapt(config: ConfigDict, argument: str) -> ConfigDict:
    """Apply what stands after the colon of --config: nothing, or `smoke`, which shrinks everything."""
    if argument == "smoke":
        config.data.update(regions=4, subcaptions=2, caption_length=64, subcaption_length=32, row_step=32, threads=2)
        config.data.patch_slots = 16
        config.model.update(embed_dim=32, hidden=32, layers=2, heads=2, intermediate=64, num_queries=2)
        config.model.update(region_layers=1, region_heads=2, text_region_heads=2, compute_dtype="float32", bert="")
        config.train.update(batch_size=8, accumulate=1, steps=4, eval_every=2, save_every=2)
        config.optim.warmup_steps = 2
    elif argument:
        raise ValueError(f"a config takes the argument 'smoke' or none, not {argument!r}")
    return config

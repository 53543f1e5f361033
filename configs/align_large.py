"""PathFLIP alignment with large batches: per-slide region loss with SigLIP's initial scale and bias, our optimizer.

Command    pathflip train --config align_large --config.data.records=RECORDS --config.data.texts=REPORTS.jsonl \\
               --config.data.slides=SLIDES.csv --config.data.tokenizer=BERT --config.model.bert=BERT \\
               --workdir runs/large
Hardware   meant for a TPU v5e-256 or 64 GPUs of 80 GB; not run at scale yet
Hours      not measured
Result     not measured
"""

from ml_collections import ConfigDict
from pathflip_jax.configs import align_base


def get_config(argument: str = "") -> ConfigDict:
    config = align_base.get_config()
    config.train.batch_size = 1024
    config.train.epochs = 100
    config.train.eval_every = 50
    config.train.save_every = 100
    config.model.remat = True
    # A loss of the same size at any batch size. Most pairs are negatives, so the bias starts where sigmoid(z) is near 0
    # (SigLIP).
    config.loss.normaliser = "per_slide"
    config.loss.negatives_at_once = 512  # the largest arrays of the region loss: 0.5 MB for each slide of a device
    config.model.logit_scale_init = 10.0
    config.model.logit_bias_init = -10.0
    config.optim.preset = "ours"
    config.optim.learning_rate = 3e-4
    config.optim.b2 = 0.98  # large batches: a shorter memory recovers from spikes sooner
    config.optim.clip = 1.0
    return align_base.adapt(config, argument)

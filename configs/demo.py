"""The demo: a small model on the embedded cohort, trained on two cores.

Command    make demo
Hardware   2 CPU cores
Hours      `make demo` prints the time of every step and of the whole
Result     three seeds, about 150 held-out slides (benchmarks/results/cohort.json): R@1 of 100 9.7% and 11.2% (chance
           1%), zero-shot balanced accuracy 1.00, grounding AUC 0.85, 0.78 without the region loss
"""

from ml_collections import ConfigDict
from pathflip_jax.configs import align_base


def get_config(argument: str = "") -> ConfigDict:
    config = align_base.get_config()
    # Nearly all regions of such a small slide: a sentence about a region that was not sampled teaches nothing. Half of
    # a report's sentences at a time: otherwise the model memorises the 250 reports. Subcaptions of one sentence: merged
    # ones tie a finding to its neighbours, and 250 slides are too few to separate them again.
    config.data.update(regions=16, patch_slots=16, caption_length=192, subcaption_length=96)
    config.data.update(subcaptions=6, merge_sentences=1)
    config.data.update(row_step=64, caption_share=0.5, threads=2, resident="host")
    config.model.update(embed_dim=64, hidden=128, layers=2, heads=4, intermediate=256, num_queries=4)
    config.model.update(region_layers=1, region_heads=4, text_region_heads=4, compute_dtype="float32")
    config.model.update(cross_attention_freq=1, init="fan_in", dropout=0.0)  # at 0.02 a model this small does not learn
    config.model.logit_scale_init = 10.0
    config.loss.update(normaliser="per_slide", region_weight=1.0)
    config.optim.update(preset="ours", learning_rate=1e-3, warmup_steps=20, warmup_learning_rate=1e-5)
    config.optim.update(final_learning_rate=1e-5, b2=0.95)
    config.train.update(batch_size=48, steps=300, eval_every=50, save_every=100)
    # About the standard error of the mean reciprocal rank of 38 validation slides; late steps have low learning rates.
    config.train.update(select_margin=0.05, select_tie="latest")
    return align_base.adapt(config, argument)

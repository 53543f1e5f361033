"""The language stage of the demo: a tiny decoder, trained from scratch on the cohort's own reports.

Command    make demo
Hardware   2 CPU cores
Hours      0.03 (0.14 for the whole demo, of which this is a part, on two cores of 0.16 TFLOP/s, not quiet)
Result     seed 0, 151 held-out slides: captions name the concepts that the reports assert with F1 0.74 (0.72 to 0.76);
           0.58 without the slide, 0.53 with the caption of another patient's slide
"""

from ml_collections import ConfigDict
from pathflip_jax.configs import lm_stage1


def get_config(argument: str = "") -> ConfigDict:
    config = lm_stage1.get_config()
    # A tenth of the examples without their slide: the same model then learns what can be said without one.
    config.data.update(template="plain", no_slide_share=0.1, sentence_orders=32, threads=2, resident="host")
    # Few regions and patches, drawn anew at every step, so without `data.embeddings`: a decoder that always sees the
    # same embedding of a slide recognises the slide and recites its report.
    config.data.update(regions=8, patch_slots=2)
    config.lm.update(trains="projector,decoder", random_decoder=True)
    config.lm.update(dtype="float32", compute_dtype="float32", remat=False)
    config.optim.update(learning_rate=4e-3, warmup_steps=20, weight_decay=0.1, b2=0.95)
    # Many small steps: the model learns late, after the language itself, that the slide predicts the next words.
    config.train.update(batch_size=16, steps=1500, eval_every=250, save_every=500)
    # The latest checkpoint: much of a report (sizes, margins, nodes) is random, and memorising it raises the loss on
    # other reports while findings are still being learned.
    config.train.update(select_margin=1.0, select_tie="latest")
    return lm_stage1.adapt(config, argument)

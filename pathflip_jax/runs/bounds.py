"""Bounds of every setting, as data: what is zero, negative, absurd or not a number is refused before anything is read.

One entry for each setting of the reference configs: a range, a choice of words, or why there is neither. What a
setting means stands in configs/align_base.py, configs/pathflip2.py and configs/lm_stage1.py.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pathflip_jax.model.config import LARGEST_SIZE

COUNT = 2**31 - 1  # steps and the like are counted in 32 bits


class Range(NamedTuple):
    """Numbers from `least` to `most`; `open_least` and `open_most` leave the end itself out.

    `besides` is a value below the range that stands for something else, `meaning`; None is one that may be given too.
    """

    least: float
    most: float = math.inf
    whole: bool = False
    open_least: bool = False
    open_most: bool = False
    besides: tuple = ()
    meaning: str = ""

    def holds(self, value: object) -> bool:
        """Whether a value is one of these."""
        if value is None:
            return None in self.besides
        if not isinstance(value, int if self.whole else int | float) or isinstance(value, bool):
            return False
        if value in self.besides:
            return True
        above = value > self.least if self.open_least else value >= self.least
        below = value < self.most if self.open_most else value <= self.most
        return above and below and math.isfinite(value)  # of NaN nothing is true

    def words(self, value: object = None) -> str:
        """What is expected, for a message about this value."""
        ends = [f"{'above' if self.open_least else 'of at least'} {self.least:.10g}"]
        if self.most not in (math.inf, COUNT) or (isinstance(value, int | float) and value > self.most):
            ends.append(f"{'below' if self.open_most else 'at most'} {self.most:.10g}")
        besides = f", or {self.besides[0]} {self.meaning}" if self.besides else ""
        return f"a {'whole ' if self.whole else 'finite '}number {' and '.join(ends)}{besides}"


class Words(NamedTuple):
    """One of some words."""

    choices: tuple[str | bool, ...]

    def holds(self, value: object) -> bool:
        """Whether a value is one of these."""
        return value in self.choices

    def words(self, value: object = None) -> str:
        """What is expected, for a message about this value."""
        return "one of " + ", ".join(str(choice) or '""' for choice in self.choices)


class Free(NamedTuple):
    """Any value of its type, for a reason."""

    reason: str
    optional: bool = False  # None stands for ""

    def holds(self, value: object) -> bool:
        """Whether a value is one of these."""
        return value is not None or self.optional

    def words(self, value: object = None) -> str:
        """What is expected, for a message about this value."""
        return f"{self.reason}; leave it empty for none"


def whole(least: int, most: int = COUNT, *, zero: str = "", minus: str = "", none: str = "") -> Range:
    """Whole numbers from `least` on; `zero`, `minus` (-1) and `none` say what these stand for, where they may be."""
    value, meaning = next(((v, text) for v, text in ((0, zero), (-1, minus), (None, none)) if text), (0, ""))
    return Range(least, most, True, besides=(value,) if meaning else (), meaning=meaning)


def share(most_itself: bool = False, zero: bool = True) -> Range:
    """Shares and probabilities: from 0 (without `zero` above it) to below 1, or to 1 itself."""
    return Range(0, 1, open_least=not zero, open_most=not most_itself)


def above_zero(most: float = math.inf) -> Range:
    """Numbers above 0."""
    return Range(0, most, open_least=True)


PATH = Free("a file, a folder or a URL")
NAME = Free("checked where its names are known")
UNKNOWN = Free("a setting of no config, which is refused where configs are read", optional=True)
FLAG = Words((False, True))
FLOATS = Words(("float32", "bfloat16"))
LAYERS, WIDTH, LENGTH = whole(1, 1024), whole(1, LARGEST_SIZE), whole(1, 2**20)
DRAWN = whole(1, 10**6)
SEED = whole(0, 2**32 - 1)
RATE, WEIGHT, SCALE = Range(0, 1), Range(0, 1e6), above_zero(1e6)

BOUNDS: dict[str, Range | Words | Free] = {
    "data.records": PATH,
    "data.texts": PATH,
    "data.slides": PATH,
    "data.tokenizer": PATH,
    "data.embeddings": PATH,
    "data.split": NAME,
    "data.val_split": Free("a split of the slide table", optional=True),
    "data.regions": DRAWN,
    "data.patch_slots": DRAWN._replace(besides=(0,), meaning="for as many as a full region holds"),
    "data.subcaptions": DRAWN,
    "data.merge_sentences": DRAWN,
    "data.caption_length": whole(3, 2**20),  # [CLS], a word, [SEP]
    "data.subcaption_length": whole(3, 2**20),
    "data.caption_share": share(most_itself=True, zero=False),
    "data.max_unknown_share": share(most_itself=True),
    "data.row_step": LENGTH,
    "data.text_rows": whole(0),  # of each
    "data.text_groups": whole(1, zero="for up to sixteen slides to a group"),
    "data.threads": whole(1, 1024),
    "data.resident": Words(("", "host", "device")),
    "data.length": whole(1, 2**24, zero="for as long as the longest needs"),
    "data.template": Words(("", "chat", "plain")),
    "data.no_slide_share": share(),
    "data.sentence_orders": whole(1, 10**4),
    "model.family": NAME,
    "model.feature_dim": WIDTH._replace(besides=(0,), meaning="for what the records say"),
    "model.embed_dim": WIDTH,
    "model.hidden": WIDTH,
    "model.layers": LAYERS,
    "model.heads": WIDTH,
    "model.intermediate": WIDTH,
    "model.num_queries": WIDTH,
    "model.cross_attention_freq": WIDTH,
    "model.vocab_size": WIDTH._replace(besides=(0,), meaning="for what the tokenizer says"),
    "model.max_positions": WIDTH,
    "model.patch_projection": Words(("linear", "mlp")),
    "model.region_layers": whole(0, 1024),
    "model.region_heads": WIDTH,
    "model.text_region_heads": WIDTH,
    "model.dropout": share(),
    "model.logit_scale_init": SCALE,
    "model.logit_bias_init": Range(-1e6, 1e6, besides=(None,), meaning="for no bias"),
    "model.init": Words(("bert", "fan_in")),
    "model.compute_dtype": FLOATS,
    "model.remat": FLAG,
    "model.bert": PATH,
    "model.tokens": whole(0, LARGEST_SIZE),
    "model.token_layers": LAYERS,
    "model.token_heads": WIDTH,
    "model.token_dropout": share(),
    "model.text_pooling": Words(("mean", "cls", "mean_padded")),
    "model.text_lora_rank": whole(0, LARGEST_SIZE),
    "model.text_lora_alpha": SCALE,
    "model.freeze_text_encoder": FLAG,
    "model.region_head": Words(("soft_topk", "attention")),
    "model.top_k": WIDTH,
    "model.topk_temperature": SCALE,
    "model.scale_init": SCALE,
    "model.bias_init": Range(-1e6, 1e6),
    "loss.slide": Words(("sigmoid", "infonce")),
    "loss.region": Words(("pairs", "flair")),
    "loss.slide_weight": WEIGHT,
    "loss.region_weight": WEIGHT,
    "loss.temperature": SCALE,
    "loss.label_smoothing": share(),
    "loss.normaliser": Words(("released", "per_slide", "per_positive")),
    "loss.negative_weight": WEIGHT,
    "loss.negatives_per_slide": whole(1, none="for all other slides"),
    "loss.negatives_at_once": whole(1, none="for all at once"),
    "loss.slides_at_once": whole(1, zero="for all at once"),
    "lm.aligner": PATH,
    "lm.decoder": PATH,
    "lm.start": PATH,
    "lm.trains": NAME,
    "lm.random_decoder": FLAG,
    "lm.dtype": FLOATS,
    "lm.compute_dtype": FLOATS,
    "lm.remat": FLAG,
    "lm.lora_rank": whole(1, LARGEST_SIZE),
    "lm.lora_alpha": SCALE,
    "lm.lora_dropout": share(),
    "lm.lora_targets": NAME,
    "optim.preset": Words(("ours", "released")),
    "optim.learning_rate": above_zero(1),
    "optim.warmup_steps": whole(0),
    "optim.warmup_learning_rate": RATE,
    "optim.final_learning_rate": RATE,
    "optim.weight_decay": Range(0, 100),
    "optim.b1": share(),
    "optim.b2": share(),
    "optim.eps": above_zero(1),
    "optim.clip": Range(0, 1e6),
    "mesh.data": whole(1, minus="for all devices that the others leave"),
    "mesh.fsdp": whole(1, minus="for all devices that the others leave"),
    "mesh.region": whole(1, minus="for all devices that the others leave"),
    "train.batch_size": whole(1, 10**7),
    "train.accumulate": whole(1, 10**7),
    "train.epochs": whole(0),
    "train.steps": whole(1, zero="for as many as train.epochs takes"),
    "train.seed": SEED,
    "train.eval_every": whole(1),
    "train.save_every": whole(1),
    "train.keep": whole(1),
    "train.keep_every": whole(1, zero="for none"),
    "train.preemptions_per_day": Range(0, 86400),
    "train.deterministic": FLAG,
    "train.wandb_project": Free("a name of its user's choice"),
    "train.hang_seconds": whole(1, 10**8, zero="for never"),
    "train.heartbeat_seconds": whole(1, 10**8),
    "train.checkpoints": PATH,
    "train.select": NAME,
    "train.select_margin": Range(0, 1e6),
}
OPTIONS = {  # of the other commands
    "seed": SEED,
    "slides": whole(1, 10**6),
    "workers": whole(1, 10**4),
    "slides-per-shard": whole(1),
    "edge-um": above_zero(),
    "override-mpp": above_zero(),
    "assume-mpp": above_zero(),
    "mpp": above_zero(),
    "patch-size": whole(1),
    "min-tissue": share(most_itself=True),
    "batch-size": whole(1),
    "draws": whole(1),
    "clear": Range(0, 0.5, open_most=True),
    "window": whole(1),
    "smooth": Range(0),
    "threshold": Range(-1e6, 1e6),
    "min-patches": Range(0),
    "top": whole(1),
    "max-tokens": whole(1),
    "min-tokens": whole(0),
    "beams": whole(1),
    "length-penalty": Range(-1e3, 1e3),
    "repetition-penalty": above_zero(),
    "temperature": Range(0),
    "top-k": whole(1),
    "top-p": share(most_itself=True, zero=False),
    "heads": whole(1),
    "lora-alpha": above_zero(),
    "preemptions-per-day": Range(0, 86400),
    "most-slides": whole(1),
    "max-pixels": whole(1),
    "quality": whole(1, 95),
    "port": whole(0, 2**16 - 1),
    "shares": above_zero(),
    "folds": whole(2),
    "size": whole(1, LARGEST_SIZE),
    "decoder": whole(1, LARGEST_SIZE),
}
DIVIDES = (  # the second must divide the first
    ("model.hidden", "model.heads"),
    ("model.embed_dim", "model.region_heads"),
    ("model.embed_dim", "model.text_region_heads"),
    ("model.embed_dim", "model.token_heads"),
    ("train.batch_size", "train.accumulate"),
    ("train.batch_size", "data.text_groups"),  # where these are given
)
FITS = (  # the first is at most the second
    ("data.caption_length", "model.max_positions"),
    ("data.subcaption_length", "model.max_positions"),
)
CURES = {
    "train.eval_every": "; --config.data.val_split= trains without validation",
    "train.save_every": "; a number above train.steps saves at the end alone",
}


def check(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError listing the settings (by dotted name) that are out of bounds; `defaults` are cures by name."""
    faults = [fault for name, value in values.items() if (fault := objection(name, value, defaults.get(name)))]
    faults = faults or list(_contradictions(values))
    if faults:
        raise ValueError("; ".join(faults))


def objection(name: str, value: object, default: object = None) -> str:
    """Why a setting cannot have this value, with the cure; "" where it can."""
    bound = BOUNDS.get(name, UNKNOWN)
    parts = value if isinstance(value, tuple | list) else (value,)
    if all(bound.holds(part) for part in parts):
        return ""
    such_as = f", such as --config.{name}={default}" if default not in (None, "", ()) else ""
    return f"{name}={value}: expected {bound.words(value)}{such_as}{CURES.get(name, '')}"


def _contradictions(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with settings together, each of which is in its bounds."""
    for one, other in DIVIDES:
        if values.get(one) and values.get(other) and values[one] % values[other]:
            yield f"{one}={values[one]} is no multiple of {other}={values[other]}; change one of them"
    for one, other in FITS:
        if one in values and other in values and values[one] > values[other]:
            yield f"{one}={values[one]} is more than {other}={values[other]}; lower the one or raise the other"
    if values.get("train.steps") == values.get("train.epochs") == 0:
        yield "train.steps=0 and train.epochs=0: there is nothing to do; set one of them"

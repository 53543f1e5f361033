"""Sections of settings common to all runs (data, optimizer, mesh, loop), and the data settings of alignment."""

from dataclasses import dataclass
from typing import Literal

from pathflip_jax.settings.fields import (
    AS_NOW,
    DRAWN,
    FLAG,
    LENGTH,
    NAME,
    PATH,
    RATE,
    SEED,
    Range,
    Section,
    Unrestricted,
    Words,
    above_zero,
    setting,
    share,
    whole,
)

_AXIS = whole(1, minus="for all devices that the others leave")


@dataclass(frozen=True)
class DataSettings(Section):
    """Records, texts, the split of the slides, and the sampling of each slide in a step."""

    section = "data"

    records: str = setting(
        "", PATH, "folder of records: `pathflip prepare` or `pathflip import`; gs:// and s3:// too",
        required="a folder of records, made by `pathflip prepare` or `pathflip import`", may_change=True, exists=True,
    )  # fmt: skip
    texts: str = setting(
        "", PATH, "text table: reports by slide id; it, slide table and tokenizer may be URLs too",
        required="a table of reports by slide id (JSONL, CSV or JSON)", may_change=True, exists=True,
    )  # fmt: skip
    slides: str = setting(
        "", PATH, "slide table with split train|val|test; without one, all slides train and none validate",
        may_change=True, exists=True,
    )  # fmt: skip
    split: str = setting("train", NAME, "split of the slide table that is trained on")
    val_split: str = setting(
        "val", Unrestricted("a split of the slide table", optional=True), 'the same; "": no validation'
    )
    regions: int = setting(
        24,
        DRAWN,
        "drawn per slide and step; a new draw each step is augmentation: fewer help a run that memorises its slides",
    )
    patch_slots: int = setting(
        0,
        DRAWN._replace(besides=(0,), meaning="for as many as a full region holds"),
        "patches drawn of a region, anew each step: augmentation, as data.regions; try 4 for hundreds of slides",
    )
    threads: int = setting(16, whole(1, 1024), "threads that read ahead", may_change=True)
    resident: Literal["", "host", "device"] = setting(
        "", Words(("", "host", "device")), 'read features once: "host" keeps them in memory, "device" on the devices',
        may_change=True,
    )  # fmt: skip


@dataclass(frozen=True)
class AlignmentDataSettings(DataSettings):
    """Data settings of alignment: additionally, captions and subcaptions drawn from reports."""

    tokenizer: str = setting(
        "", PATH, "BERT folder, or one of `pathflip vocabulary`; released: BioBERT cased v1.2",
        required="a Hugging Face BERT folder, or one made by `pathflip vocabulary`", may_change=True, exists=True,
    )  # fmt: skip
    subcaptions: int = setting(8, DRAWN, "drawn per slide and step")
    merge_sentences: int = setting(3, DRAWN, "a subcaption drawn from a report merges 1 to this many of its sentences")
    caption_length: int = setting(384, whole(3, 2**20), "tokens with [CLS] and [SEP]", at_most="model.max_positions")
    subcaption_length: int = setting(192, whole(3, 2**20), "the same", at_most="model.max_positions")
    caption_share: float = setting(
        1.0, share(most_itself=True, zero=False),
        "of a report's sentences in a training caption, drawn for every batch; 1: the whole report", before=1.0,
    )  # fmt: skip
    max_unknown_share: float = setting(
        0.2, share(most_itself=True), "of the pieces of the texts, unknown to the vocabulary: more is an error",
        may_change=True, before=1.0,  # earlier versions trained on such texts
    )  # fmt: skip
    row_step: int = setting(
        128, LENGTH, "texts are packed into rows of 1, 2, 3, ... times so many tokens", before=AS_NOW
    )
    text_rows: tuple[int, ...] = setting(
        (), whole(0), "rows of a text group, the shortest first; (): measured on the table", may_change=True
    )
    text_groups: int = setting(
        0, whole(1, zero="for up to sixteen slides to a group"), "groups of slides whose texts are packed together",
        may_change=True, divides=("train.batch_size",),
    )  # fmt: skip


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW with warm-up and cosine decay.

    `preset="released"` follows the released code: weight decay on every parameter, a cosine schedule that advances once
    per epoch, and a warm-up of at most one epoch.
    """

    section = "optim"

    preset: Literal["ours", "released"] = setting(
        "ours", Words(("ours", "released")),
        '"ours": no decay on biases and norms, cosine per step; "released": all decays, cosine per epoch',
    )  # fmt: skip
    learning_rate: float = setting(1e-4, above_zero(1), "after the warm-up")
    warmup_steps: int = setting(200, whole(0), "over which the learning rate rises")
    warmup_learning_rate: float = setting(1e-6, RATE, "of the first step")
    final_learning_rate: float = setting(5e-6, RATE, "of the last step")
    weight_decay: float = setting(0.05, Range(0, 100), "of AdamW")
    b1: float = setting(0.9, share(), "of Adam: how long the mean of gradients remembers")
    b2: float = setting(0.999, share(), "of Adam: how long the mean of their squares remembers")
    eps: float = setting(1e-8, above_zero(1), "of Adam: added to the root of that mean")
    clip: float = setting(1.0, Range(0, 1e6), "global norm of the gradient; 0: none, as released")


@dataclass(frozen=True)
class MeshSettings(Section):
    """Sizes of the three mesh axes; their product is the number of devices."""

    section = "mesh"

    data: int = setting(-1, _AXIS, "devices that share a batch", may_change=True)
    fsdp: int = setting(1, _AXIS, "devices that share one copy of the parameters", may_change=True)
    region: int = setting(
        1, _AXIS, "devices that share the regions of a slide: for slides of very many, or batches of few",
        may_change=True, before=AS_NOW,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainSettings(Section):
    """Length, batch size, checkpoints and monitors of the training loop."""

    section = "train"

    batch_size: int = setting(8, whole(1, 10**7), "slides (conversations) per step over all devices")
    accumulate: int = setting(
        1, whole(1, 10**7), "microbatches of a step; the loss still sees the whole batch", divides=("train.batch_size",)
    )
    epochs: int = setting(10, whole(0), "passes over the training slides", may_change=True)
    steps: int = setting(
        0, whole(1, zero="for as many as train.epochs takes"), "above 0: counts instead of epochs", may_change=True
    )
    seed: int = setting(0, SEED, "of parameters, batches and dropout")
    eval_every: int = setting(
        500, whole(1), "steps between validations", cure="; --config.data.val_split= trains without validation"
    )
    save_every: int = setting(
        500, whole(1), "steps between checkpoints", may_change=True,
        cure="; a number above train.steps saves at the end alone",
    )  # fmt: skip
    keep: int = setting(3, whole(1), "checkpoints kept besides the best", may_change=True)
    keep_every: int = setting(
        0, whole(1, zero="for none"), "the checkpoints of every so many steps are kept for good", may_change=True,
        before=0,
    )  # fmt: skip
    preemptions_per_day: float = setting(
        0.0, Range(0, 86400), "expected preemptions per day; only used to recommend save_every", may_change=True,
        before=0.0,
    )  # fmt: skip
    deterministic: bool = setting(
        False, FLAG, "the same bits from run to run on GPUs too, slower there", may_change=True, before=AS_NOW
    )
    wandb_project: str = setting(
        "", Unrestricted("a name of its user's choice"),
        'Weights & Biases project that gets the metrics too (extra [wandb]); "": none', may_change=True,
        before="",
    )  # fmt: skip
    hang_seconds: int = setting(
        1800, whole(1, 10**8, zero="for never"), "without progress, compilation aside: exit with 75 and say where",
        may_change=True,
    )  # fmt: skip
    heartbeat_seconds: int = setting(
        60, whole(1, 10**8), "without a sign of a host: it is lost, and the others exit with 75", may_change=True
    )
    checkpoints: str = setting(
        "", PATH, 'local folder or gs://bucket/run that they go to; "": the workdir, with the logs', may_change=True
    )
    local_checkpoints: str = setting(
        "", PATH, 'folder on a disk or in memory of each host, saved to in between; "": none', may_change=True,
        before="",
    )  # fmt: skip
    local_every: int = setting(
        0, whole(1, zero="for none"), "steps between those; a restart takes the newer of the two", may_change=True,
        before=0,
    )  # fmt: skip
    select: str = setting(
        "val/mean_reciprocal_rank", NAME, "decides the best checkpoint; smaller is better where the name says loss"
    )
    select_margin: float | None = setting(
        None, Range(0, 1e6, besides=(None,), meaning="for the standard error of the score, where it has one"),
        "validation scores that differ by no more count as equal: few slides cannot tell them apart", before=0.0,
    )  # fmt: skip
    select_tie: Literal["earliest", "latest"] = setting(
        "earliest", Words(("earliest", "latest")),
        'the best checkpoint among equal scores: "earliest" has memorised least, "latest" has the lowest learning rate',
        before="latest",
    )  # fmt: skip

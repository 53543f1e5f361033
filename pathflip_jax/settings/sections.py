"""Sections of settings common to all runs (data, optimizer, mesh, loop), and the data settings of alignment."""

from dataclasses import dataclass
from typing import Literal

from pathflip_jax.settings.fields import (
    CURRENT_VALUE,
    FLAG,
    LENGTH,
    NAME,
    PATH,
    RATE,
    SAMPLE_SIZE,
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

_AXIS = whole(1, minus="for all devices left by the other axes")


@dataclass(frozen=True)
class DataSettings(Section):
    """Records, texts, the split of the slides, and the patches sampled from each slide in a step."""

    section = "data"

    records: str = setting(
        "", PATH, "folder of records, local or at gs:// or s3://",
        required="a folder of records, made by `pathflip prepare` or `pathflip import`", may_change=True, exists=True,
    )  # fmt: skip
    texts: str = setting(
        "", PATH, "text table: reports by slide id; may be a URL, as may data.slides and data.tokenizer",
        required="a table of reports by slide id (JSONL, CSV or JSON)", may_change=True, exists=True,
    )  # fmt: skip
    slides: str = setting(
        "", PATH,
        "slide table with a column split (train, val, test); without it, all slides are trained on and none validated",
        may_change=True, exists=True,
    )  # fmt: skip
    fold: str = setting(
        "", Unrestricted("a fold of the slide table", optional=True),
        'fold of a slide table that holds several, as k=all.tsv of Patho-Bench does: 0 or fold_0; "": it holds one',
        before="",
    )  # fmt: skip
    split: str = setting("train", NAME, "split of the slide table to train on")
    val_split: str = setting(
        "val", Unrestricted("a split of the slide table", optional=True), 'split to validate on; "": no validation'
    )
    regions: int = setting(
        24,
        SAMPLE_SIZE,
        "regions drawn per slide and step; each step draws anew, which acts as augmentation: draw fewer if a run "
        "memorises its slides",
    )
    patch_slots: int = setting(
        0,
        SAMPLE_SIZE._replace(besides=(0,), meaning="for as many as the largest region holds"),
        "patches drawn per region, anew each step: augmentation, as with data.regions; try 4 for cohorts of hundreds "
        "of slides",
    )
    threads: int = setting(16, whole(1, 1024), "threads that prepare batches in advance", may_change=True)
    resident: Literal["", "host", "device"] = setting(
        "", Words(("", "host", "device")),
        'read all features once and keep them: "host" in main memory, "device" on the devices; "": read them as needed',
        may_change=True,
    )  # fmt: skip


@dataclass(frozen=True)
class AlignmentDataSettings(DataSettings):
    """Data settings of alignment: also the tokenizer, and the captions and subcaptions drawn from reports."""

    tokenizer: str = setting(
        "", PATH, "BERT folder, or folder of `pathflip vocabulary`; the released model has BioBERT cased v1.2",
        required="a Hugging Face BERT folder, or one made by `pathflip vocabulary`", may_change=True, exists=True,
    )  # fmt: skip
    subcaptions: int = setting(8, SAMPLE_SIZE, "subcaptions drawn per slide and step")
    merge_sentences: int = setting(
        3, SAMPLE_SIZE, "a subcaption drawn from a report merges 1 to this many of its sentences"
    )
    caption_length: int = setting(
        384, whole(3, 2**20), "maximum tokens of a caption, [CLS] and [SEP] included", at_most="model.max_positions"
    )
    subcaption_length: int = setting(
        192, whole(3, 2**20), "maximum tokens of a subcaption, [CLS] and [SEP] included", at_most="model.max_positions"
    )
    standardise: bool = setting(
        False, FLAG,
        "start with a patch projection that standardises features, to mean 0 and standard deviation 1 over a sample of "
        "training slides: a small cohort learns faster if an encoder's features are not centred", before=False,
    )  # fmt: skip
    feature_dropout: float = setting(
        0.0, share(),
        "fraction of the features that are set to 0 in a training step, the same ones in all patches of a slide: "
        "augmentation for small cohorts", before=0.0,
    )  # fmt: skip
    feature_noise: float = setting(
        0.0, Range(0, 10),
        "standard deviation of the normal noise that shifts the features of a slide in a training step, all patches "
        "alike, as another stain or scanner would; relative to that of each feature: augmentation for small cohorts",
        before=0.0,
    )  # fmt: skip
    caption_share: float = setting(
        1.0, share(most_itself=True, zero=False),
        "fraction of a report's sentences in a training caption, drawn anew for every batch; 1: the whole report",
        before=1.0,
    )  # fmt: skip
    max_unknown_share: float = setting(
        0.2, share(most_itself=True),
        "maximum fraction of the word pieces of the texts that may be unknown to the vocabulary; more is an error",
        may_change=True, before=1.0,  # earlier versions did not check
    )  # fmt: skip
    row_step: int = setting(
        128, LENGTH, "texts are packed into rows of 1, 2, 3, ... times this many tokens", before=CURRENT_VALUE
    )
    text_rows: tuple[int, ...] = setting(
        (),
        whole(0),
        "rows of each length in a text group, shortest rows first; (): determined from the lengths of the texts",
        may_change=True,
    )
    text_groups: int = setting(
        0, whole(1, zero="for up to sixteen slides per group"), "groups of slides whose texts are packed together",
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
        '"ours": no weight decay on biases and norms, cosine schedule per step; "released": weight decay on all '
        "parameters, cosine schedule per epoch, warm-up of at most one epoch",
    )  # fmt: skip
    learning_rate: float = setting(1e-4, above_zero(1), "peak learning rate, reached after the warm-up")
    warmup_steps: int = setting(200, whole(0), "steps over which the learning rate rises linearly")
    warmup_learning_rate: float = setting(1e-6, RATE, "learning rate of the first step")
    final_learning_rate: float = setting(5e-6, RATE, "learning rate of the last step")
    weight_decay: float = setting(0.05, Range(0, 100), "weight decay of AdamW")
    b1: float = setting(0.9, share(), "Adam: decay rate of the running mean of gradients")
    b2: float = setting(0.999, share(), "Adam: decay rate of the running mean of squared gradients")
    eps: float = setting(1e-8, above_zero(1), "Adam: added to the root of the mean of squared gradients")
    clip: float = setting(1.0, Range(0, 1e6), "maximum global norm of the gradient; 0: no clipping, as released")
    weight_average: float = setting(
        0.0, share(),
        "decay per step of an exponential moving average of the weights, which is validated and saved in their place; "
        "0: no average", before=0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class MeshSettings(Section):
    """Sizes of the three mesh axes; their product is the number of devices."""

    section = "mesh"

    data: int = setting(-1, _AXIS, "devices that the slides of a batch are divided among", may_change=True)
    fsdp: int = setting(1, _AXIS, "devices that one copy of the parameters is sharded over", may_change=True)
    region: int = setting(
        1, _AXIS,
        "devices that the regions of each slide are divided among: for slides of very many regions, or small batches",
        may_change=True, before=CURRENT_VALUE,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainSettings(Section):
    """Length, batch size, checkpoints and monitors of the training loop."""

    section = "train"

    batch_size: int = setting(8, whole(1, 10**7), "slides (language stage: conversations) per step, over all devices")
    accumulate: int = setting(
        1,
        whole(1, 10**7),
        "microbatches per step; the loss still covers the whole batch",
        divides=("train.batch_size",),
    )
    epochs: int = setting(10, whole(0), "passes over the training slides", may_change=True)
    steps: int = setting(
        0,
        whole(1, zero="for as many as train.epochs takes"),
        "training steps; above 0, it replaces train.epochs",
        may_change=True,
    )
    seed: int = setting(0, SEED, "seed of initial parameters, batches and dropout")
    eval_every: int = setting(
        500, whole(1), "steps between validations", cure="; --config.data.val_split= trains without validation"
    )
    save_every: int = setting(
        500, whole(1), "steps between checkpoints", may_change=True,
        cure="; a number above train.steps saves only at the end",
    )  # fmt: skip
    keep: int = setting(3, whole(1), "latest checkpoints kept, in addition to the best", may_change=True)
    keep_every: int = setting(
        0, whole(1, zero="for none"), "checkpoints at multiples of this many steps are kept permanently",
        may_change=True, before=0,
    )  # fmt: skip
    preemptions_per_day: float = setting(
        0.0, Range(0, 86400), "expected preemptions per day; only used to recommend save_every", may_change=True,
        before=0.0,
    )  # fmt: skip
    deterministic: bool = setting(
        False,
        FLAG,
        "make runs reproducible bit by bit on GPUs too; slower there",
        may_change=True,
        before=CURRENT_VALUE,
    )
    wandb_project: str = setting(
        "", Unrestricted("a project name of your choice"),
        'Weights & Biases project to also send the metrics to (needs the extra [wandb]); "": none', may_change=True,
        before="",
    )  # fmt: skip
    hang_seconds: int = setting(
        1800, whole(1, 10**8, zero="for never"),
        "seconds without progress, not counting compilation, after which the run reports where it hangs and exits with "
        "code 75",
        may_change=True,
    )  # fmt: skip
    heartbeat_seconds: int = setting(
        60,
        whole(1, 10**8),
        "seconds without a heartbeat of a host after which it counts as lost and the others exit with code 75",
        may_change=True,
    )
    checkpoints: str = setting(
        "", PATH, 'folder of the checkpoints, local or gs://bucket/run; "": the workdir, with the logs', may_change=True
    )
    local_checkpoints: str = setting(
        "", PATH,
        'folder on a disk or in memory of each host for further checkpoints between those of the run; "": none',
        may_change=True, before="",
    )  # fmt: skip
    local_every: int = setting(
        0, whole(1, zero="for none"),
        "steps between local checkpoints; a restart takes the newest checkpoint, local or of the run",
        may_change=True, before=0,
    )  # fmt: skip
    select: str = setting(
        "val/mean_reciprocal_rank",
        NAME,
        "metric that selects the best checkpoint; lower is better if its name contains loss, else higher",
    )
    select_margin: float = setting(
        0.0, Range(0, 1e6),
        "validation scores that differ by no more count as equal: few slides cannot tell them apart; 0: one standard "
        "error of the score, where it has one, or with train.select_tie=latest no margin", before=0.0,
    )  # fmt: skip
    select_tie: Literal["earliest", "latest"] = setting(
        "earliest", Words(("earliest", "latest")),
        'the best checkpoint among equal scores: "earliest" has memorised least, "latest" has the lowest learning rate',
        before="latest",
    )  # fmt: skip

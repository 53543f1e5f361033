"""Settings of networks and losses: both alignment families, and the slide language model."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pathflip_jax.settings.fields import (
    AS_NOW,
    FLAG,
    FLOATS,
    LARGEST_SIZE,
    LAYERS,
    NAME,
    PATH,
    SCALE,
    WEIGHT,
    WIDTH,
    Range,
    Section,
    Words,
    setting,
    share,
    whole,
)
from pathflip_jax.settings.sections import DataSettings

_AS_RECORDS = WIDTH._replace(besides=(0,), meaning="for what the records say")
_AS_TOKENIZER = WIDTH._replace(besides=(0,), meaning="for what the tokenizer says")


@dataclass(frozen=True)
class ModelSettings(Section):
    """Network settings common to both families; `model.config.ModelConfig` takes them, with the sizes of the data."""

    section = "model"

    feature_dim: int = setting(0, _AS_RECORDS, "width of a patch feature")
    embed_dim: int = setting(256, WIDTH, "width of the space that slides and texts share")
    hidden: int = setting(768, WIDTH, "width of BERT")
    layers: int = setting(12, LAYERS, "layers of BERT")
    heads: int = setting(12, WIDTH, "attention heads of BERT", divides=("model.hidden",))
    intermediate: int = setting(3072, WIDTH, "width inside BERT's feed-forward layers")
    vocab_size: int = setting(0, _AS_TOKENIZER, "words of BERT")
    max_positions: int = setting(512, WIDTH, "positions of BERT: the longest text that it can read")
    dropout: float = setting(0.1, share(), "of BERT and of the projections")
    init: Literal["bert", "fan_in"] = setting("bert", Words(("bert", "fan_in")), "how random weights are drawn")
    compute_dtype: Literal["float32", "bfloat16"] = setting("bfloat16", FLOATS, "of activations")
    remat: bool = setting(False, FLAG, "compute the layers again for the gradient: less memory, slower")
    bert: str = setting(
        "", PATH, 'Hugging Face BERT folder whose weights start what reads text; "": random', may_change=True,
        exists=True, local=True,
    )  # fmt: skip


@dataclass(frozen=True)
class PathFLIPModelSettings(ModelSettings):
    """Settings of the network of the paper."""

    family: ClassVar[str] = "pathflip"

    num_queries: int = setting(8, WIDTH, "learned queries of the Q-Former")
    cross_attention_freq: int = setting(2, WIDTH, "the queries see the patches in every so manieth layer")
    patch_projection: Literal["linear", "mlp"] = setting("linear", Words(("linear", "mlp")), "of patch features")
    region_layers: int = setting(2, whole(0, 1024), "layers that read the regions of a slide")
    region_heads: int = setting(8, WIDTH, "their attention heads", divides=("model.embed_dim",))
    text_region_heads: int = setting(
        8, WIDTH, "attention heads by which a text pools regions", divides=("model.embed_dim",)
    )
    logit_scale_init: float = setting(2.6592600369327783, SCALE, "ln(1 / 0.07), not exponentiated")
    logit_bias_init: float | None = setting(
        None, Range(-1e6, 1e6, besides=(None,), meaning="for no bias"), "start of the region loss's bias"
    )


@dataclass(frozen=True)
class PathFLIP2ModelSettings(ModelSettings):
    """Settings of the authors' follow-up network."""

    family: str = setting("pathflip2", Words(("pathflip2",)), "of networks; without this setting: pathflip")
    embed_dim: int = setting(512, WIDTH, "width of the space that slides and texts share")
    tokens: int = setting(
        128, whole(0, LARGEST_SIZE), "learned tokens that read the patches, beside the one that becomes the slide"
    )
    token_layers: int = setting(1, LAYERS, "layers that read the patches")
    token_heads: int = setting(8, WIDTH, "their attention heads", divides=("model.embed_dim",))
    token_dropout: float = setting(0.2, share(), "in these layers")
    text_pooling: Literal["mean", "cls", "mean_padded"] = setting(
        "mean", Words(("mean", "cls", "mean_padded")), 'of a text\'s own tokens; or "cls", the published default'
    )
    text_lora_rank: int = setting(
        0, whole(0, LARGEST_SIZE), "above 0: LoRA in a text encoder that itself stays as it was; published: 16"
    )
    text_lora_alpha: float = setting(64.0, SCALE, "scale of the LoRA, times its rank")
    freeze_text_encoder: bool = setting(False, FLAG, "the text encoder stays as it was")
    region_head: Literal["soft_topk", "attention"] = setting(
        "soft_topk", Words(("soft_topk", "attention")), "how a text pools patches"
    )
    text_region_heads: int = setting(8, WIDTH, "heads of the attention head", divides=("model.embed_dim",))
    top_k: int = setting(128, WIDTH, "patches that the soft top-k takes")
    topk_temperature: float = setting(0.5, SCALE, "of the soft top-k")
    scale_init: float = setting(10.0, SCALE, "start of the losses' scales")
    bias_init: float = setting(-10.0, Range(-1e6, 1e6), "start of the losses' biases")


@dataclass(frozen=True)
class LossConfig(Section):
    """Weights and settings of PathFLIP's losses; the defaults are the released code's.

    `negative_weight` applies to `per_slide` only. `negatives_per_slide` limits each slide's negatives to that many
    other slides: the next ones in the batch, which is shuffled. `negatives_at_once`, the negatives of each slide scored
    at a time, bounds memory and does not change the loss (`losses.pathflip.region_loss` gives the sizes of the arrays
    in memory).
    """

    section = "loss"

    slide_weight: float = setting(1.0, WEIGHT, "of the loss between slides and captions")
    region_weight: float = setting(1.0, WEIGHT, "of the loss between regions and subcaptions")
    temperature: float = setting(0.1, SCALE, "of the slide loss")
    label_smoothing: float = setting(0.1, share(), "of the slide loss")
    normaliser: Literal["released", "per_slide", "per_positive"] = setting(
        "released", Words(("released", "per_slide", "per_positive")),
        '"released" is the released code\'s arithmetic at its batch of 8 slides, where the region loss starts at 5.5; '
        'it grows with the batch (44 at 64): with a larger one take "per_slide"',
    )  # fmt: skip
    negative_weight: float = setting(1.0, WEIGHT, "of the negatives of the region loss, with per_slide")
    negatives_per_slide: int | None = setting(
        None, whole(1, none="for all other slides"), "other slides that each slide is shown"
    )
    negatives_at_once: int | None = setting(
        None, whole(1, none="for all at once"),
        "so many are scored at a time: the largest arrays of the region loss then take no more than 4 * slides of a "
        "device * negatives_at_once * max(embed_dim, text_region_heads * regions) bytes each",
        may_change=True, before=AS_NOW,
    )  # fmt: skip


@dataclass(frozen=True)
class SigmoidLossConfig(Section):
    """Weights and settings of PathFLIP2's losses; the defaults are the published code's, except for `slide`.

    `slide`: "sigmoid", SigLIP's loss, whose published function does not run, or "infonce" with `temperature` and
    `label_smoothing`, which the published runs had to use. `region`: "pairs", every text against every text-conditioned
    embedding, or "flair", published with the attention head: each slide is pooled separately for its own texts and for
    one text of each other slide. `slides_at_once` bounds memory and does not change the loss: the number of slides
    whose texts are scored against a device's slides at a time; 0: all.
    """

    section = "loss"

    slide: Literal["sigmoid", "infonce"] = setting(
        "sigmoid", Words(("sigmoid", "infonce")), 'SigLIP\'s; or "infonce", with temperature and label smoothing'
    )
    region: Literal["pairs", "flair"] = setting(
        "pairs", Words(("pairs", "flair")), 'all texts against all text-conditioned embeddings; or "flair"'
    )
    slide_weight: float = setting(1.0, WEIGHT, "of the loss between slides and captions")
    region_weight: float = setting(1.0, WEIGHT, "of the loss between patches and subcaptions")
    temperature: float = setting(0.1, SCALE, "of infonce")
    label_smoothing: float = setting(0.1, share(), "of infonce")
    slides_at_once: int = setting(
        0, whole(1, zero="for all at once"),
        "texts of so many slides are compared at a time: the largest array of the region loss then takes 4 * slides "
        "of a device * slides_at_once * subcaptions**2 bytes",
    )  # fmt: skip


@dataclass(frozen=True)
class LanguageDataSettings(DataSettings):
    """Data settings of the language stage: conversations about slides."""

    texts: str = setting(
        "", PATH,
        'tables of reports, questions and conversations, with commas between them; "*N": seen N times in an epoch',
        required="a table of reports by slide id (JSONL, CSV or JSON)", may_change=True,
    )  # fmt: skip
    embeddings: str = setting(
        "", PATH,
        "file of `pathflip embed RECORDS --checkpoint ALIGNER --regions`: slides are then not embedded in every step, "
        "and no feature is read; not where the aligner learns", before="", exists=True,
    )  # fmt: skip
    length: int = setting(
        0, whole(1, 2**24, zero="for as long as the longest needs"), "tokens of a sequence, its slide among them"
    )
    template: Literal["", "chat", "plain"] = setting(
        "", Words(("", "chat", "plain")),
        '"chat" (of the decoder\'s tokenizer), "plain" (the paper\'s); "": chat where there is one',
    )  # fmt: skip
    no_slide_share: float = setting(
        0.0, share(), "of the examples are shown without a slide, so that the text-only score is fair", before=0.0
    )
    sentence_orders: int = setting(
        1, whole(1, 10**4), "of a report that are learnt; above 1 for cohorts so small that they are memorised",
        before=1,
    )  # fmt: skip


@dataclass(frozen=True)
class LanguageModelSettings(Section):
    """Aligner, decoder and the parts of them that are trained."""

    section = "lm"

    aligner: str = setting(
        "", PATH, "run folder of alignment, which embeds slides and regions",
        required="the run folder that slides are embedded by, made by `pathflip train` or `pathflip convert`",
        exists=True, local=True,
    )  # fmt: skip
    decoder: str = setting(
        "", PATH, "Hugging Face folder: Qwen3, Qwen2 or Llama 3; published: Qwen3-0.6B",
        required="a Hugging Face folder of a language model, or one made by `pathflip vocabulary --decoder`",
        exists=True, local=True,
    )  # fmt: skip
    start: str = setting(
        "", PATH, "run of an earlier language stage, whose projector and LoRA this one starts from, or PEFT's",
        exists=True, local=True,
    )  # fmt: skip
    trains: str = setting("projector", NAME, "which of projector, lora, decoder, aligner, with commas")
    random_decoder: bool = setting(False, FLAG, "start a decoder from scratch: the folder then needs no weights")
    dtype: Literal["float32", "bfloat16"] = setting(
        "bfloat16", FLOATS, "that the frozen decoder is stored in; what learns is float32"
    )
    compute_dtype: Literal["float32", "bfloat16"] = setting("bfloat16", FLOATS, "of activations")
    remat: bool = setting(True, FLAG, "compute the decoder's layers again for the gradient")
    lora_rank: int = setting(16, whole(1, LARGEST_SIZE), "of the adapters; as released")
    lora_alpha: float = setting(32.0, SCALE, "their scale, times their rank")
    lora_dropout: float = setting(0.05, share(), "in front of them")
    lora_targets: str = setting(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", NAME, "matrices that have one, with commas"
    )

"""Settings of networks and losses: both alignment families, and the slide language model."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from pathflip_jax.settings.fields import (
    CURRENT_VALUE,
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

_AS_RECORDS = WIDTH._replace(besides=(0,), meaning="to take it from the records")
_AS_TOKENIZER = WIDTH._replace(besides=(0,), meaning="to take it from the tokenizer")


@dataclass(frozen=True)
class ModelSettings(Section):
    """Network settings common to both families; `model.config.ModelConfig` takes them, with the sizes of the data."""

    section = "model"

    feature_dim: int = setting(0, _AS_RECORDS, "width of the patch features")
    embed_dim: int = setting(256, WIDTH, "width of the space that slides and texts share")
    hidden: int = setting(768, WIDTH, "width of BERT")
    layers: int = setting(12, LAYERS, "layers of BERT")
    heads: int = setting(12, WIDTH, "attention heads of BERT", divides=("model.hidden",))
    intermediate: int = setting(3072, WIDTH, "width inside BERT's feed-forward layers")
    vocab_size: int = setting(0, _AS_TOKENIZER, "tokens in BERT's vocabulary")
    max_positions: int = setting(512, WIDTH, "position embeddings of BERT: the most tokens that a text can have")
    dropout: float = setting(
        0.1, share(), "dropout rate of BERT and of the region layers (pathflip) or the projections (pathflip2)"
    )
    init: Literal["bert", "fan_in"] = setting(
        "bert", Words(("bert", "fan_in")),
        'random initialisation: "bert", as released, with standard deviation 0.02 in BERT and PyTorch\'s defaults '
        'elsewhere; "fan_in", LeCun normal, for models too small to learn from 0.02',
    )  # fmt: skip
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "bfloat16", FLOATS, "dtype of activations; parameters are float32"
    )
    remat: bool = setting(False, FLAG, "recompute the layers in the backward pass: less memory, slower")
    bert: str = setting(
        "", PATH,
        "Hugging Face BERT folder whose weights initialise the Q-Former (pathflip) or the text encoder (pathflip2); "
        '"": random initialisation',
        may_change=True, exists=True, local=True,
    )  # fmt: skip


@dataclass(frozen=True)
class PathFLIPModelSettings(ModelSettings):
    """Settings of the network of the paper."""

    family: ClassVar[str] = "pathflip"

    num_queries: int = setting(8, WIDTH, "learned query tokens of the Q-Former")
    cross_attention_freq: int = setting(
        2, WIDTH, "the queries attend to the patches in every layer whose index, from 0, is a multiple of this"
    )
    patch_projection: Literal["linear", "mlp"] = setting(
        "linear", Words(("linear", "mlp")), "projection of the patch features to model.embed_dim"
    )
    region_layers: int = setting(2, whole(0, 1024), "attention layers over a slide and its regions")
    region_heads: int = setting(8, WIDTH, "attention heads of the region layers", divides=("model.embed_dim",))
    text_region_heads: int = setting(
        8, WIDTH, "attention heads with which a text pools the regions", divides=("model.embed_dim",)
    )
    logit_scale_init: float = setting(
        2.6592600369327783, SCALE,
        "initial factor of the cosines in the region loss; as released ln(1 / 0.07), used without exponentiation",
    )  # fmt: skip
    logit_bias_init: float | None = setting(
        None, Range(-1e6, 1e6, besides=(None,), meaning="for no bias"), "initial bias of the logits in the region loss"
    )


@dataclass(frozen=True)
class PathFLIP2ModelSettings(ModelSettings):
    """Settings of the authors' follow-up network."""

    family: str = setting(
        "pathflip2", Words(("pathflip2",)), "family of networks; pathflip where this setting is absent"
    )
    embed_dim: int = setting(512, WIDTH, "width of the space that slides and texts share")
    tokens: int = setting(
        128, whole(0, LARGEST_SIZE), "learned tokens that attend to the patches, in addition to the slide token"
    )
    token_layers: int = setting(1, LAYERS, "layers in which the tokens attend to the patches")
    token_heads: int = setting(
        8, WIDTH, "attention heads of the token layers and of the patch decoder", divides=("model.embed_dim",)
    )
    token_dropout: float = setting(0.2, share(), "dropout rate of the token layers and of the patch decoder")
    text_pooling: Literal["mean", "cls", "mean_padded"] = setting(
        "mean", Words(("mean", "cls", "mean_padded")),
        'text embedding: "mean" of the text\'s own tokens; "cls", the published default; "mean_padded", over padding '
        "too, only for converted checkpoints (refused in training)",
    )  # fmt: skip
    text_lora_rank: int = setting(
        0,
        whole(0, LARGEST_SIZE),
        "rank of LoRA adapters in the text encoder, whose own weights are then frozen; 0: no LoRA; published: 16",
    )
    text_lora_alpha: float = setting(64.0, SCALE, "LoRA alpha: the adapters' output is multiplied by alpha / rank")
    freeze_text_encoder: bool = setting(False, FLAG, "do not train the text encoder")
    region_head: Literal["soft_topk", "attention"] = setting(
        "soft_topk",
        Words(("soft_topk", "attention")),
        'pooling of patches by a text: "soft_topk", softmax over the model.top_k most similar patches; "attention", '
        "multi-head attention",
    )
    text_region_heads: int = setting(8, WIDTH, "heads of model.region_head=attention", divides=("model.embed_dim",))
    top_k: int = setting(128, WIDTH, "patches pooled by soft_topk")
    topk_temperature: float = setting(0.5, SCALE, "softmax temperature of soft_topk")
    scale_init: float = setting(10.0, SCALE, "initial factor of the cosines in both losses")
    bias_init: float = setting(-10.0, Range(-1e6, 1e6), "initial bias of the logits in both losses")


@dataclass(frozen=True)
class LossConfig(Section):
    """Weights and settings of PathFLIP's losses; the defaults are the released code's.

    `negative_weight` applies to `per_slide` only. `negatives_per_slide` limits each slide's negatives to that many
    other slides: the next ones in the batch, which is shuffled. `negatives_at_once`, the negatives of each slide scored
    at a time, limits memory and does not change the loss (`losses.pathflip.region_loss` gives the sizes of its arrays).
    """

    section = "loss"

    slide_weight: float = setting(1.0, WEIGHT, "weight of the loss between slides and captions; 0: not computed")
    region_weight: float = setting(1.0, WEIGHT, "weight of the loss between regions and subcaptions; 0: not computed")
    temperature: float = setting(0.1, SCALE, "temperature of the slide loss")
    label_smoothing: float = setting(0.1, share(), "label smoothing of the slide loss")
    soft_targets: float = setting(
        0.0, share(),
        "fraction of the slide loss's target that goes to captions by their similarity to the slide's own: captions of "
        "the same findings are no full negatives", before=0.0,
    )  # fmt: skip
    region_pooling: Literal["attention", "cosine"] = setting(
        "attention", Words(("attention", "cosine")),
        'how a sentence pools the regions of a slide: by learned attention, as published, or "cosine", by a softmax of '
        "its cosine to each region (multiple-instance pooling)", before="attention",
    )  # fmt: skip
    pooling_temperature: float = setting(0.1, SCALE, "temperature of loss.region_pooling=cosine", before=0.1)
    normaliser: Literal["released", "per_slide", "per_positive"] = setting(
        "released", Words(("released", "per_slide", "per_positive")),
        'normalisation of the region loss: "released", the released code\'s arithmetic at its batch of 8 slides, where '
        'the loss starts at 5.5; it grows with the batch (44 at 64), so use "per_slide", a mean over slides, for '
        'larger batches; "per_positive" divides the sum by the number of matching pairs',
    )  # fmt: skip
    negative_weight: float = setting(
        1.0, WEIGHT, "weight of the negatives in the region loss; only with loss.normaliser=per_slide"
    )
    within_slide_weight: float = setting(
        0.0, WEIGHT,
        "weight of hard negatives of the region loss: the regions pooled for a sentence against the slide's other "
        "sentences; 0: none", before=0.0,
    )  # fmt: skip
    negatives_per_slide: int | None = setting(
        None,
        whole(1, none="for all other slides"),
        "number of other slides that serve as negatives of each slide in the region loss",
    )
    negatives_at_once: int | None = setting(
        None, whole(1, none="for all at once"),
        "negatives of each slide scored at a time: limits memory without changing the loss; the largest arrays of the "
        "region loss then take at most 4 * slides per device * negatives_at_once * max(embed_dim, text_region_heads * "
        "regions) bytes each",
        may_change=True, before=CURRENT_VALUE,
    )  # fmt: skip


@dataclass(frozen=True)
class SigmoidLossConfig(Section):
    """Weights and settings of PathFLIP2's losses; the defaults are the published code's, except for `slide`.

    `slide`: "sigmoid", SigLIP's loss, whose published function fails to run, or "infonce" with `temperature` and
    `label_smoothing`, which the published runs therefore used. `region`: "pairs", every text against every
    text-conditioned embedding, or "flair", published with the attention head: each slide is pooled separately for its
    own texts and for one text of each other slide. `slides_at_once`, the number of slides whose texts are scored
    against a device's slides at a time (0: all), limits memory and does not change the loss.
    """

    section = "loss"

    slide: Literal["sigmoid", "infonce"] = setting(
        "sigmoid",
        Words(("sigmoid", "infonce")),
        'slide loss: "sigmoid", as SigLIP; "infonce", as in the published runs',
    )
    region: Literal["pairs", "flair"] = setting(
        "pairs", Words(("pairs", "flair")),
        'region loss: "pairs", every text against every text-conditioned embedding; "flair", each slide pooled for its '
        "own texts and for one text of each other slide, as published with the attention head",
    )  # fmt: skip
    slide_weight: float = setting(1.0, WEIGHT, "weight of the loss between slides and captions; 0: not computed")
    region_weight: float = setting(1.0, WEIGHT, "weight of the loss between patches and subcaptions; 0: not computed")
    temperature: float = setting(0.1, SCALE, "temperature of loss.slide=infonce")
    label_smoothing: float = setting(0.1, share(), "label smoothing of loss.slide=infonce")
    slides_at_once: int = setting(
        0, whole(1, zero="for all at once"),
        "slides whose texts are compared at a time: limits memory without changing the loss; the largest array of the "
        "region loss then takes 4 * slides per device * slides_at_once * subcaptions**2 bytes",
    )  # fmt: skip


@dataclass(frozen=True)
class LanguageDataSettings(DataSettings):
    """Data settings of the language stage: conversations about slides."""

    texts: str = setting(
        "", PATH,
        'tables of reports, questions and conversations, separated by commas; "TABLE*N" uses a table N times per epoch',
        required="a table of reports by slide id (JSONL, CSV or JSON)", may_change=True,
    )  # fmt: skip
    embeddings: str = setting(
        "", PATH,
        "file written by `pathflip embed RECORDS --checkpoint ALIGNER --regions`; slides are then not embedded in "
        "every step, and features are not read; not possible if lm.trains includes the aligner",
        before="", exists=True,
    )  # fmt: skip
    length: int = setting(
        0, whole(1, 2**24, zero="for the length of the longest example"), "tokens per sequence, slide included"
    )
    template: Literal["", "chat", "plain"] = setting(
        "", Words(("", "chat", "plain")),
        'prompt format: "chat", the chat template of the decoder\'s tokenizer; "plain", the paper\'s; "": chat if the '
        "tokenizer has a template, else plain",
    )  # fmt: skip
    no_slide_share: float = setting(
        0.0, share(),
        "fraction of the training examples without their slide, so that the text-only baseline score is fair",
        before=0.0,
    )  # fmt: skip
    sentence_orders: int = setting(
        1, whole(1, 10**4),
        "orders of a report's sentences to train on, the original included; above 1 for cohorts so small that reports "
        "are memorised",
        before=1,
    )  # fmt: skip


@dataclass(frozen=True)
class LanguageModelSettings(Section):
    """Aligner, decoder and the parts of them that are trained."""

    section = "lm"

    aligner: str = setting(
        "", PATH, "run folder of the alignment model that embeds slides and regions",
        required="the run folder of the aligner, made by `pathflip train` or `pathflip convert`",
        exists=True, local=True,
    )  # fmt: skip
    decoder: str = setting(
        "", PATH, "Hugging Face folder of a language model: Qwen3, Qwen2 or Llama 3; published: Qwen3-0.6B",
        required="a Hugging Face folder of a language model, or one made by `pathflip vocabulary --decoder`",
        exists=True, local=True,
    )  # fmt: skip
    start: str = setting(
        "", PATH,
        "run of an earlier language stage to start the projector and LoRA from, or a PEFT folder to start LoRA from",
        exists=True, local=True,
    )  # fmt: skip
    trains: str = setting("projector", NAME, "parts to train, separated by commas: projector, lora, decoder, aligner")
    random_decoder: bool = setting(False, FLAG, "train the decoder from scratch: its folder then needs no weights")
    dtype: Literal["float32", "bfloat16"] = setting(
        "bfloat16", FLOATS, "dtype in which the frozen decoder is stored; trained parameters are float32"
    )
    compute_dtype: Literal["float32", "bfloat16"] = setting("bfloat16", FLOATS, "dtype of activations")
    remat: bool = setting(True, FLAG, "recompute the decoder's layers in the backward pass: less memory, slower")
    lora_rank: int = setting(16, whole(1, LARGEST_SIZE), "rank of the LoRA adapters; 16 as released")
    lora_alpha: float = setting(32.0, SCALE, "LoRA alpha: the adapters' output is multiplied by alpha / rank")
    lora_dropout: float = setting(0.05, share(), "dropout rate of the adapters' inputs")
    lora_targets: str = setting(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        NAME,
        "matrices that get an adapter, separated by commas",
    )

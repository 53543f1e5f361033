"""PathFLIP as a PyTorch module: for users who take weights from here into PyTorch.

Its `state_dict` has the names of the paper's released model, including the unused ones, so that weights load
in both directions with `strict=True`. Unlike that code it encodes all regions of all slides in one call, with
fused attention, and masks padding. The file is self-contained (it needs torch, and safetensors to load a
folder): an export carries a copy of it, and its users need no JAX.

    model = load("exported")
    slide = model.encode_slides(patches[None])                  # patches [R, S, F]
    ids = tokenizer(texts, padding=True, return_tensors="pt")   # the folder's bert/
    texts = model.encode_texts(ids.input_ids, ids.attention_mask)

Where transformers is installed, importing this file makes the model known to its AutoModel.

Letters: B slides, R regions, S patch slots, F feature width, D embed width, H BERT width, Q queries, T tokens, C texts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

BERT_EPS = 1e-12


class SlideEncoding(NamedTuple):
    """A batch of slides in the joint space; padded regions are zero rows, False in `region_mask`.

    The attention maps are those of the second-to-last Q-Former layer, or of the last one before it with
    cross-attention; they are None unless requested.
    """

    slide: Tensor  # [B, D]
    regions: Tensor  # [B, R, D]
    region_mask: Tensor  # [B, R]
    slide_attention: Tensor | None  # [B, heads, Q, R, S]
    region_attention: Tensor | None  # [B, heads, Q, R, S]


class _Output(nn.Module):
    """Linear, dropout, residual, LayerNorm."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.LayerNorm = nn.LayerNorm(outputs, BERT_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class _Projections(nn.Module):
    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source, width)
        self.value = nn.Linear(source, width)


class _Attention(nn.Module):
    """BERT attention; `source` is the width of the inputs of keys and values."""

    def __init__(self, width: int, source: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.rate = dropout
        self.self = _Projections(width, source)
        self.output = _Output(width, width, dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Self-attention of [n, T, H]."""
        pooled, _ = self.attend(*(self.split(project(x)) for project in self.self.children()), mask)
        return self.output(pooled, x)

    def split(self, x: Tensor) -> Tensor:
        """[n, T, H] -> [n, heads, T, d]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Pooled values [n, T, H] of queries [n, heads, T, d], and the attention weights; zero where `mask` hides all.

        `mask` is [n, N]. Fused kernels do not return probabilities, which are computed again where requested.
        """
        has_keys = None
        if mask is not None:
            mask = mask[:, None, None]
            has_keys = mask.any(-1, keepdim=True)
            mask = mask | ~has_keys  # a softmax over no keys is NaN
        pooled = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=self.rate if self.training else 0.0
        )
        probabilities = None
        if weights:
            scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
            scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
            probabilities = scores.softmax(-1)
        if has_keys is not None:
            pooled = pooled * has_keys
            probabilities = probabilities * mask * has_keys if weights else None
        return pooled.transpose(1, 2).flatten(2), probabilities


class _CrossAttention(_Attention):
    """Cross-attention of the queries of each slide and of its regions to the patches, projected once for both."""

    def forward(
        self, x: Tensor, patches: Tensor, mask: Tensor | None, weights: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[B, 1+R, Q, H], [B, R, S, D] -> [B, 1+R, Q, H], [B, heads, Q, R*S], [B*R, heads, Q, S]."""
        B, R = patches.shape[:2]
        query, key, value = self.self.query(x), self.self.key(patches), self.self.value(patches)
        slide, slide_weights = self.attend(
            self.split(query[:, 0]),
            *(self.split(t.flatten(1, 2)) for t in (key, value)),
            None if mask is None else mask.flatten(1),
            weights,
        )
        regions, region_weights = self.attend(
            *(self.split(t.flatten(0, 1)) for t in (query[:, 1:], key, value)),
            None if mask is None else mask.flatten(0, 1),
            weights,
        )
        pooled = torch.cat([slide[:, None], regions.unflatten(0, (B, R))], dim=1)
        return self.output(pooled, x), slide_weights, region_weights


class _Intermediate(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(self.dense(x))


class _Layer(nn.Module):
    """BERT layer: shared self-attention, cross-attention for queries, separate feed-forward for texts and queries."""

    def __init__(self, config: Mapping[str, Any], reads_patches: bool) -> None:
        super().__init__()
        H, inner, dropout = config["hidden"], config["intermediate"], config["dropout"]
        self.attention = _Attention(H, H, config["heads"], dropout)
        self.crossattention = (
            _CrossAttention(H, config["embed_dim"], config["heads"], dropout) if reads_patches else None
        )
        self.intermediate = _Intermediate(H, inner)
        self.output = _Output(inner, H, dropout)
        self.intermediate_query = _Intermediate(H, inner)
        self.output_query = _Output(inner, H, dropout)

    def read_text(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)

    def read_patches(
        self, x: Tensor, patches: Tensor, mask: Tensor | None, weights: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x = self.attention(x.flatten(0, 1)).view_as(x)
        slide_weights = region_weights = None
        if self.crossattention is not None:
            x, slide_weights, region_weights = self.crossattention(x, patches, mask, weights)
        return self.output_query(self.intermediate_query(x), x), slide_weights, region_weights


class _Embeddings(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config["vocab_size"], config["hidden"])
        self.position_embeddings = nn.Embedding(config["max_positions"], config["hidden"])
        self.LayerNorm = nn.LayerNorm(config["hidden"], BERT_EPS)
        self.dropout = nn.Dropout(config["dropout"])
        self.register_buffer("position_ids", torch.arange(config["max_positions"])[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.LayerNorm(x))


class _Encoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        freq = config["cross_attention_freq"]
        self.layer = nn.ModuleList(_Layer(config, index % freq == 0) for index in range(config["layers"]))


class _Bert(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)


class _Transform(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, BERT_EPS)


class _Predictions(nn.Module):
    """BERT's language-model head, part of the released `state_dict` although no loss or embedding uses it."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        rows, width = words.weight.shape
        # One less than the vocabulary: the released code adds [DEC] to the tables after it has created this bias.
        self.bias = nn.Parameter(torch.zeros(rows - 1))
        self.transform = _Transform(width)
        self.decoder = nn.Linear(width, rows)
        self.decoder.weight = words.weight


class _Head(nn.Module):
    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.predictions = _Predictions(words)


class _QFormer(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.bert = _Bert(config)
        self.cls = _Head(self.bert.embeddings.word_embeddings)


class _TextRegionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.w_q = nn.Linear(width, width)
        self.w_k = nn.Linear(width, width)
        self.w_v = nn.Linear(width, width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, texts: Tensor, regions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        has_regions = mask.any(1)[:, None, None]
        hidden = ~(mask[:, None] | ~has_regions)[:, 0]
        pooled, weights = self.attn(self.w_q(texts), self.w_k(regions), self.w_v(regions), key_padding_mask=hidden)
        return torch.where(has_regions, pooled, self.attn.out_proj.bias), weights * has_regions


class PathFLIP(nn.Module):
    """The alignment model, built from the dict in an export's config.json.

    With `logit_bias_init` in the config the `state_dict` has one entry that the released model lacks, `logit_bias`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.cross_attention_freq = config["cross_attention_freq"]
        F, D, H = config["feature_dim"], config["embed_dim"], config["hidden"]
        if config["patch_projection"] == "mlp":
            inner = config.get("patch_hidden") or D
            self.path_encoder = nn.Sequential(
                nn.Linear(F, inner), nn.LayerNorm(inner), nn.ReLU(), nn.Linear(inner, D), nn.LayerNorm(D)
            )
        else:
            self.path_encoder = nn.Linear(F, D)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config["num_queries"], H))
        self.Qformer = _QFormer(config)
        self.path_proj = nn.Linear(H, D)
        self.text_proj = nn.Linear(H, D)
        layer = nn.TransformerEncoderLayer(D, config["region_heads"], 4 * D, config["dropout"], batch_first=True)
        self.path_trans = nn.TransformerEncoder(layer, config["region_layers"], enable_nested_tensor=False)
        self.fg_head = _TextRegionAttention(D, config["text_region_heads"])
        self.logit_scale = nn.Parameter(torch.tensor(float(config["logit_scale_init"])))
        if config.get("logit_bias_init") is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(config["logit_bias_init"])))

    def encode_slides(
        self, patches: Tensor, patch_mask: Tensor | None = None, *, attention: bool = False
    ) -> SlideEncoding:
        """Embed slides [B, R, S, F] and their regions; without `patch_mask` [B, R, S] every slot holds a patch.

        Masked slots have no effect, whatever they hold. A region without a patch is padding.
        """
        dtype = self.query_tokens.dtype
        patches = patches.to(dtype)
        if patch_mask is not None:
            patches = torch.where(patch_mask[..., None], patches, 0)
        B, R, S = patches.shape[:3]
        patches = self.path_encoder(patches)  # [B, R, S, D]
        x = self.Qformer.bert.embeddings(self.query_tokens.expand(B * (1 + R), -1, -1)).unflatten(0, (B, 1 + R))
        layers = self.Qformer.bert.encoder.layer
        shown = max(len(layers) - 2, 0) // self.cross_attention_freq * self.cross_attention_freq
        slide_map = region_map = None
        for index, layer in enumerate(layers):
            wanted = attention and index == shown
            x, slide_weights, region_weights = layer.read_patches(x, patches, patch_mask, wanted)
            if wanted:
                slide_map = slide_weights.unflatten(-1, (R, S))
                region_map = region_weights.unflatten(0, (B, R)).movedim(1, 3)
        x = self.path_proj(x.mean(2))  # [B, 1+R, D]
        if patch_mask is None:
            region_mask = torch.ones(B, R, dtype=torch.bool, device=x.device)
            x = self.path_trans(x)
        else:
            region_mask = patch_mask.any(-1)
            padding = functional.pad(~region_mask, (1, 0), value=False)
            x = self.path_trans(x, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)
        return SlideEncoding(x[:, 0], x[:, 1:], region_mask, slide_map, region_map)

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed texts [n, T], as a BERT tokenizer gives them ([CLS] first), to [n, D]. Token types are not used."""
        embeddings = self.Qformer.bert.embeddings
        positions = embeddings.position_ids[:, : input_ids.shape[1]]
        x = embeddings(embeddings.word_embeddings(input_ids) + embeddings.position_embeddings(positions))
        mask = attention_mask.bool()
        for layer in self.Qformer.bert.encoder.layer:
            x = layer.read_text(x, mask)
        return self.text_proj(x[:, 0])

    def text_region_attention(
        self, texts: Tensor, regions: Tensor, region_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Text-conditioned region embeddings [B, C, D] of texts [B, C, D] over regions [B, R, D].

        Also returns the weights [B, C, R] of the regions, averaged over heads.
        """
        if region_mask is None:
            region_mask = torch.ones(regions.shape[:2], dtype=torch.bool, device=regions.device)
        return self.fg_head(texts, regions, region_mask)


def load(folder: str | Path) -> PathFLIP:
    """Load the model of a folder that `pathflip export` wrote, in eval mode."""
    from safetensors.torch import load_file

    folder = Path(folder)
    model = PathFLIP(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()


try:
    from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
    from transformers.utils import ModelOutput
except ImportError:  # everything above needs torch only
    pass
else:

    class PathFLIPConfig(PretrainedConfig):
        """Config of a model in transformers: the dict that `PathFLIP` takes, and the entries of transformers."""

        model_type = "pathflip"

    @dataclass
    class PathFLIPOutput(ModelOutput):
        """Embeddings of slides and texts in the joint space, None for inputs that were not given."""

        slide_embeds: Tensor | None = None  # [B, D]
        region_embeds: Tensor | None = None  # [B, R, D], padded regions zero
        region_mask: Tensor | None = None  # [B, R]
        text_embeds: Tensor | None = None  # [n, D]

    class PathFLIPModel(PreTrainedModel):
        """`PathFLIP` as a transformers model, with the same weights under the same names and the same methods."""

        config_class = PathFLIPConfig
        main_input_name = "patches"
        _tied_weights_keys = {
            "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight"
        }
        encode_slides = PathFLIP.encode_slides
        encode_texts = PathFLIP.encode_texts
        text_region_attention = PathFLIP.text_region_attention

        def __init__(self, config: PathFLIPConfig) -> None:
            super().__init__(config)
            model = PathFLIP(config.to_dict())
            self.cross_attention_freq = model.cross_attention_freq
            for name, part in (*model.named_children(), *model.named_parameters(recurse=False)):
                setattr(self, name, part)
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Keep the initial values of torch, as in `PathFLIP`."""

        def get_input_embeddings(self) -> nn.Module:
            """Word-embedding table, to which transformers ties the unused language-model head."""
            return self.Qformer.bert.embeddings.word_embeddings

        def forward(
            self,
            patches: Tensor | None = None,
            patch_mask: Tensor | None = None,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            **_,
        ) -> PathFLIPOutput:
            """Embed slides [B, R, S, F], texts [n, T], or both; other outputs of a tokenizer are ignored."""
            found = PathFLIPOutput()
            if patches is not None:
                found.slide_embeds, found.region_embeds, found.region_mask, _, _ = self.encode_slides(
                    patches, patch_mask
                )
            if input_ids is not None:
                mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                found.text_embeds = self.encode_texts(input_ids, mask)
            return found

    AutoConfig.register("pathflip", PathFLIPConfig, exist_ok=True)
    AutoModel.register(PathFLIPConfig, PathFLIPModel, exist_ok=True)

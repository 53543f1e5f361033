"""PathFLIP2 in PyTorch, for a folder that `pathflip export` wrote: needs torch, transformers and safetensors.

    from torch_pathflip2 import load
    from transformers import BertTokenizerFast

    model = load(".")                                             # this folder; in eval mode
    tokenizer = BertTokenizerFast.from_pretrained("bert")
    slide = model.encode_slides(patches[None])                    # patches [N, F]
    captions = tokenizer(["clear cell carcinoma"], padding=True, return_tensors="pt")
    texts = model.encode_texts(captions.input_ids, captions.attention_mask)
    cosine = torch.nn.functional.cosine_similarity(slide.slide, texts)

To locate texts on the slide, `model.text_region(model.encode_texts(ids, mask, level="region")[None], slide.patches)`
pools the patches for each text and returns its weight on each of them.

Parameters have the names of the published class (github.com/cyclexfy/PathFLIP2), whose `load_state_dict` accepts them.
Importing this file makes the model known to the AutoModel of transformers.

    B  slides    N  patches of a slide    F  width of a patch feature    D  joint width    C  texts    T  tokens
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class Encoding(NamedTuple):
    """Slides [B, D] and their patches [B, N, D] in the spaces of captions and subcaptions; tokens [B, 1+tokens, D]."""

    slide: Tensor
    patches: Tensor
    tokens: Tensor
    attention: Tensor  # of each token over the patches, averaged over heads: [B, 1+tokens, N]


def projection(inputs: int, outputs: int, rate: float) -> nn.Sequential:
    """Linear, RMSNorm, dropout."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.RMSNorm(outputs), nn.Dropout(rate))


class Block(nn.Module):
    """Pre-norm attention of x over y, then a feed-forward network."""

    def __init__(self, width: int, heads: int, rate: float, itself: bool = False) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(width, heads, dropout=rate, batch_first=True)
        self.norm_q = nn.RMSNorm(width)
        self.norm_kv = None if itself else nn.RMSNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(rate), nn.Linear(4 * width, width), nn.Dropout(rate)
        )
        self.norm2 = nn.RMSNorm(width)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None, weights: bool = False):
        """x [B, C, D] after attending to y [B, T, D], with the weights [B, C, T] on request; `mask` False: padding."""
        keys = (self.norm_q if self.norm_kv is None else self.norm_kv)(y)
        hidden = None if mask is None else ~mask
        pooled, attention = self.mha(self.norm_q(x), keys, keys, key_padding_mask=hidden, need_weights=weights)
        x = x + pooled
        return x + self.ffn(self.norm2(x)), attention


class SlideEncoder(nn.Module):
    """Encoder in which tokens attend to patches and to each other, then patches attend to the tokens."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        sizes = config["embed_dim"], config["token_heads"], config["token_dropout"]
        self.visual_tokens = nn.Parameter(torch.randn(1, 1 + config["tokens"], config["embed_dim"]))
        self.encoder_layers = nn.ModuleList(
            nn.ModuleDict({"cross": Block(*sizes), "self": Block(*sizes, itself=True)})
            for _ in range(config["token_layers"])
        )
        self.patch_decoder = Block(*sizes)

    def forward(self, patches: Tensor, mask: Tensor | None, weights: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens [B, Q, D], patches [B, N, D], and the last layer's attention [B, Q, N] on request."""
        tokens, attention = self.visual_tokens.expand(len(patches), -1, -1), None
        for layer in self.encoder_layers:
            tokens, attention = layer["cross"](tokens, patches, mask, weights)
            tokens, _ = layer["self"](tokens, tokens)
        return tokens, self.patch_decoder(patches, tokens)[0] + patches, attention


class AttentionPooling(nn.Module):
    """Attention pooling of the patches of each slide for each text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, texts: Tensor, patches: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pool patches [B, N, D] for texts [B, C, D]: returns pooled patches [B, C, D] and weights [B, C, N]."""
        hidden = None if mask is None else ~mask
        return self.attn(self.ln_q(texts), self.ln_k(patches), self.ln_v(patches), key_padding_mask=hidden)


class PathFLIP2(nn.Module):
    """PathFLIP2 model; `config` is the content of config.json."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        self.config = config
        self.text_pooling, self.region_head = config["text_pooling"], config["region_head"]
        self.topk_temperature = config["topk_temperature"]
        # transformers has an option `top_k` and drops it from every config: its folders hold ours as `region_top_k`.
        self.top_k = config["region_top_k"] if "region_top_k" in config else config["top_k"]
        D, H, rate = config["embed_dim"], config["hidden"], config["dropout"]
        self.image_proj = projection(config["feature_dim"], D, rate)
        self.slide_encoder = SlideEncoder(config)
        self.image_projection_global = projection(D, D, rate)
        self.image_projection_local = projection(D, D, rate)
        self.text_encoder = BertModel(
            BertConfig(
                vocab_size=config["vocab_size"], hidden_size=H, num_hidden_layers=config["layers"],
                num_attention_heads=config["heads"], intermediate_size=config["intermediate"],
                max_position_embeddings=config["max_positions"], hidden_dropout_prob=rate,
                attention_probs_dropout_prob=rate,
            )
        )  # fmt: skip
        self.text_projection_global = projection(H, D, rate)
        self.text_projection_local = projection(H, D, rate)
        if config["region_head"] == "attention":
            self.fine_gained_loss_head = AttentionPooling(D, config["text_region_heads"])
        for level in ("global", "local"):
            for name, start in (("scale", config["scale_init"]), ("bias", config["bias_init"])):
                setattr(self, f"{level}_logit_{name}", nn.Parameter(torch.tensor(float(start))))

    def encode_slides(self, patches: Tensor, mask: Tensor | None = None, weights: bool = False) -> Encoding:
        """Embed slides [B, N, F]; `mask` [B, N] is False at padding."""
        tokens, found, attention = self.slide_encoder(self.image_proj(patches), mask, weights)
        slide = self.image_projection_global(tokens[:, 0])
        return Encoding(slide, self.image_projection_local(found), tokens, attention)

    def encode_texts(self, input_ids: Tensor, attention_mask: Tensor, level: str = "slide") -> Tensor:
        """Embed texts [C, T], in the space of slides or of regions (patches)."""
        states = self.text_encoder(input_ids, attention_mask).last_hidden_state
        if self.text_pooling == "cls":
            pooled = states[:, 0]
        else:
            counted = torch.ones_like(attention_mask) if self.text_pooling == "mean_padded" else attention_mask
            counted = counted[..., None].to(states.dtype)
            pooled = (states * counted).sum(1) / counted.sum(1)
        return (self.text_projection_global if level == "slide" else self.text_projection_local)(pooled)

    def text_region(self, texts: Tensor, patches: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pool patches [B, N, D] for texts [B, C, D]: returns pooled patches [B, C, D] and weights [B, C, N]."""
        if self.region_head == "attention":
            return self.fine_gained_loss_head(texts, patches, mask)
        cosine = functional.normalize(texts, dim=-1) @ functional.normalize(patches, dim=-1).mT
        scores = cosine / self.topk_temperature
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        least = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).values[..., -1:]
        kept = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
        return kept @ patches, scores.softmax(-1)


def load(folder: str | Path = ".") -> PathFLIP2:
    """Load the model of an exported folder, in eval mode."""
    from safetensors.torch import load_file

    folder = Path(folder)
    model = PathFLIP2(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


class PathFLIP2Config(PretrainedConfig):
    """Config of a model in transformers: the dict that `PathFLIP2` takes, and the entries of transformers."""

    model_type = "pathflip2"


@dataclass
class PathFLIP2Output(ModelOutput):
    """Embeddings of slides, patches and texts in the joint spaces, None for inputs that were not given."""

    slide_embeds: Tensor | None = None  # [B, D]
    patch_embeds: Tensor | None = None  # [B, N, D], padding zero
    text_embeds: Tensor | None = None  # [C, D]


class PathFLIP2Model(PreTrainedModel):
    """`PathFLIP2` as a transformers model, with the same weights under the same names and the same methods."""

    config_class = PathFLIP2Config
    main_input_name = "patches"
    encode_slides = PathFLIP2.encode_slides
    encode_texts = PathFLIP2.encode_texts
    text_region = PathFLIP2.text_region

    def __init__(self, config: PathFLIP2Config) -> None:
        super().__init__(config)
        model = PathFLIP2(config.to_dict())
        for name in ("text_pooling", "region_head", "topk_temperature", "top_k"):
            setattr(self, name, getattr(model, name))
        for name, part in (*model.named_children(), *model.named_parameters(recurse=False)):
            setattr(self, name, part)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the initial values of torch, as in `PathFLIP2`."""

    def get_input_embeddings(self) -> nn.Module:
        """Word-embedding table."""
        return self.text_encoder.get_input_embeddings()

    def forward(
        self,
        patches: Tensor | None = None,
        patch_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        level: str = "slide",
        **_,
    ) -> PathFLIP2Output:
        """Embed slides [B, N, F], texts [C, T] in the space of `level`, or both; other tokenizer outputs are unused."""
        found = PathFLIP2Output()
        if patches is not None:
            encoded = self.encode_slides(patches.to(self.dtype), patch_mask)
            valid = torch.ones_like(patches[..., 0], dtype=torch.bool) if patch_mask is None else patch_mask
            found.slide_embeds, found.patch_embeds = encoded.slide, encoded.patches.masked_fill(~valid[..., None], 0)
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            found.text_embeds = self.encode_texts(input_ids, mask, level)
        return found


AutoConfig.register("pathflip2", PathFLIP2Config, exist_ok=True)
AutoModel.register(PathFLIP2Config, PathFLIP2Model, exist_ok=True)

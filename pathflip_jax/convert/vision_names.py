"""Weight names of published vision transformers: every parameter, and the tensors that hold it in each layout."""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from pathflip_jax.vision.config import VisionConfig
from pathflip_jax.vision.recipes import Layout

LAYER = "{}"  # stands for the number of the layer
ZEROS = ""  # stands for a tensor that the file does not have, of zeros, as large as the first of its parameter


class Source(NamedTuple):
    """Parameter and its tensors in a file: joined along their first axis, of each layer where the name has `LAYER`.

    `part` is the i-th of n equal parts of the joined tensor. A "convolution" [out, channels, p, p] becomes the kernel
    of a product with the pixels of a patch, row by row; "flat" drops leading axes of 1.
    """

    path: str
    torch: tuple[str, ...]
    form: Literal["same", "transpose", "convolution", "flat"] = "same"
    part: tuple[int, int] | None = None

    @property
    def stacked(self) -> bool:
        """Whether each layer has its own tensors."""
        return LAYER in self.torch[0]

    def of(self, layer: int) -> tuple[str, ...]:
        """Names of the tensors of a layer in the file."""
        return tuple(name.replace(LAYER, str(layer)) for name in self.torch if name != ZEROS)

    def joined_shape(self, parameter: tuple[int, ...], config: VisionConfig) -> tuple[int, ...]:
        """Shape of the joined tensors that become a parameter of this shape; of a "flat" one, without leading 1s."""
        shape = parameter[::-1] if self.form == "transpose" else parameter
        if self.form == "convolution":
            shape = (parameter[1], 3, config.patch, config.patch)
        if self.form == "flat":
            return without_leading_ones(shape)
        rows = shape[0] * (1 if self.part is None else self.part[1]) * len(self.of(0)) // len(self.torch)
        return (rows, *shape[1:])

    def to_jax(self, tensors: list[np.ndarray]) -> np.ndarray:
        """Parameter of one layer from its tensors."""
        if ZEROS in self.torch:
            tensors = [*tensors]
            tensors.insert(self.torch.index(ZEROS), np.zeros_like(tensors[0]))
        tensor = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        if self.part is not None:
            number, parts = self.part
            size = len(tensor) // parts
            tensor = tensor[number * size : (number + 1) * size]
        if self.form == "transpose":
            return tensor.T
        if self.form == "convolution":
            return tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))
        return tensor.reshape(without_leading_ones(tensor.shape)) if self.form == "flat" else tensor


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape without axes of 1 before the first larger one."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


class Names(NamedTuple):
    """Names of a layout: sources of all parameters, tensors that are not used, and old spellings.

    `unused` is a regular expression of tensors of other parts of the model; `spellings` replaces patterns in names.
    """

    sources: list[Source]
    anchor: str
    unused: str
    spellings: tuple[tuple[str, str], ...] = ()


def names_of(layout: Layout, config: VisionConfig) -> Names:
    """Names of the tensors of a published file of this layout."""
    return _LAYOUTS[layout](config)


def _dense(path: str, *torch: str, bias: bool = True, part: tuple[int, int] | None = None) -> Iterator[Source]:
    yield Source(f"{path}/kernel", tuple(f"{name}.weight" for name in torch), "transpose", part)
    if bias:
        yield Source(f"{path}/bias", tuple(f"{name}.bias" for name in torch), "same", part)


def _norm(path: str, torch: str) -> Iterator[Source]:
    yield Source(f"{path}/scale", (f"{torch}.weight",))
    yield Source(f"{path}/bias", (f"{torch}.bias",))


def _embedding(config: VisionConfig, patch: str, tokens: tuple[str, str, str]) -> Iterator[Source]:
    class_token, registers, positions = tokens
    yield Source("patch/kernel", (f"{patch}.weight",), "convolution")
    if not config.pre_norm:
        yield Source("patch/bias", (f"{patch}.bias",))
    yield Source("class_token", (class_token,), "flat")
    if config.registers:
        yield Source("registers", (registers,), "flat")
    if not config.rope:
        yield Source("positions", (positions,), "flat")


def _layers(
    config: VisionConfig, base: str, parts: dict[str, tuple[str, ...]], biases: tuple[str, ...] = ()
) -> Iterator[Source]:
    """Sources of all layers; `parts` are the names within a layer, under `base`.

    `biases` are those of queries, keys and values where they are not in the layers of the same names.
    """
    where = {part: tuple(f"{base}.{name}" for name in names) for part, names in parts.items()}
    yield from _norm("layers/attention_norm", *where["norm1"])
    yield Source("layers/attention/qkv/kernel", tuple(f"{name}.weight" for name in where["qkv"]), "transpose")
    yield Source("layers/attention/qkv/bias", biases or tuple(f"{name}.bias" for name in where["qkv"]))
    yield from _dense("layers/attention/output", *where["output"])
    yield from _norm("layers/feed_forward_norm", *where["norm2"])
    yield from _dense("layers/feed_forward/inner", *where["inner"])
    yield from _dense("layers/feed_forward/outer", *where["outer"])
    if config.layer_scale:
        yield Source("layers/attention_scale", where["scale1"])
        yield Source("layers/feed_forward_scale", where["scale2"])


_TIMM_LAYER: dict[str, tuple[str, ...]] = {
    "norm1": ("norm1",), "qkv": ("attn.qkv",), "output": ("attn.proj",), "norm2": ("norm2",), "inner": ("mlp.fc1",),
    "outer": ("mlp.fc2",), "scale1": ("ls1.gamma",), "scale2": ("ls2.gamma",),
}  # fmt: skip


def _timm_sources(config: VisionConfig, prefix: str = "", registers: str = "reg_token", layer=None) -> list[Source]:
    tokens = (f"{prefix}cls_token", f"{prefix}{registers}", f"{prefix}pos_embed")
    return [
        *_embedding(config, f"{prefix}patch_embed.proj", tokens),
        *_layers(config, f"{prefix}blocks.{LAYER}", layer or _TIMM_LAYER),
        *_norm("norm", f"{prefix}norm"),
    ]


def _timm(config: VisionConfig) -> Names:
    return Names(_timm_sources(config), "cls_token", r"head\.|fc_norm\.")


def _meta(config: VisionConfig) -> Names:
    gated = {"inner": ("mlp.w12",), "outer": ("mlp.w3",)} if config.feed_forward == "swiglu" else {}
    sources = _timm_sources(config, registers="register_tokens", layer=_TIMM_LAYER | gated)
    # Training files nest layers in chunks (blocks.CHUNK.LAYER), and hold the heads of the self-supervised losses.
    chunks = ((r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),)
    return Names(sources, "cls_token", r"mask_token$|(dino|ibot)_head\.|head\.", chunks)


_HF_TOKENS = ("embeddings.cls_token", "embeddings.register_tokens", "embeddings.position_embeddings")
_HF_QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))


def _vit(config: VisionConfig) -> Names:
    layer = {
        "norm1": ("layernorm_before",), "qkv": _HF_QKV, "output": ("attention.output.dense",),
        "norm2": ("layernorm_after",), "inner": ("intermediate.dense",), "outer": ("output.dense",),
    }  # fmt: skip
    return Names(_hf_sources(config, layer), _HF_TOKENS[0], r"pooler\.|classifier\.|.*mask_token$")


def _dinov2(config: VisionConfig) -> Names:
    gated = config.feed_forward == "swiglu"
    layer = {
        "norm1": ("norm1",), "qkv": _HF_QKV, "output": ("attention.output.dense",), "norm2": ("norm2",),
        "inner": ("mlp.weights_in" if gated else "mlp.fc1",), "outer": ("mlp.weights_out" if gated else "mlp.fc2",),
        "scale1": ("layer_scale1.lambda1",), "scale2": ("layer_scale2.lambda1",),
    }  # fmt: skip
    return Names(_hf_sources(config, layer), _HF_TOKENS[0], r".*mask_token$|classifier\.")


def _hf_sources(config: VisionConfig, layer: dict[str, tuple[str, ...]]) -> list[Source]:
    return [
        *_embedding(config, "embeddings.patch_embeddings.projection", _HF_TOKENS),
        *_layers(config, f"encoder.layer.{LAYER}", layer),
        *_norm("norm", "layernorm"),
    ]


def _dinov3(config: VisionConfig) -> Names:
    gated = config.feed_forward == "swiglu"
    layer = {
        "norm1": ("norm1",), "qkv": tuple(f"attention.{name}_proj" for name in "qkv"),
        "output": ("attention.o_proj",), "norm2": ("norm2",),
        "inner": ("mlp.gate_proj", "mlp.up_proj") if gated else ("mlp.up_proj",), "outer": ("mlp.down_proj",),
        "scale1": ("layer_scale1.lambda1",), "scale2": ("layer_scale2.lambda1",),
    }  # fmt: skip
    biases = (f"layer.{LAYER}.attention.q_proj.bias", ZEROS, f"layer.{LAYER}.attention.v_proj.bias")
    sources = [
        *_embedding(config, "embeddings.patch_embeddings", _HF_TOKENS),
        *_layers(config, f"layer.{LAYER}", layer, biases),
        *_norm("norm", "norm"),
    ]
    return Names(sources, _HF_TOKENS[0], r".*mask_token$")


def _clip(config: VisionConfig) -> Names:
    embeddings = "vision_model.embeddings"
    tokens = (f"{embeddings}.class_embedding", "", f"{embeddings}.position_embedding.weight")
    layer = {
        "norm1": ("layer_norm1",), "qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
        "output": ("self_attn.out_proj",), "norm2": ("layer_norm2",), "inner": ("mlp.fc1",), "outer": ("mlp.fc2",),
    }  # fmt: skip
    sources = [
        *_embedding(config, f"{embeddings}.patch_embedding", tokens),
        *_norm("pre_norm", "vision_model.pre_layrnorm"),
        *_layers(config, f"vision_model.encoder.layers.{LAYER}", layer),
        *_norm("norm", "vision_model.post_layernorm"),
        *_dense("head", "visual_projection", bias=False),
    ]
    unused = r"text_model\.|text_projection\.|logit_scale$|.*position_ids$"
    return Names(sources, tokens[0], unused)


def _pooler(base: str) -> Iterator[Source]:
    yield Source("pooler/query", (f"{base}attn_pool_contrast.query",))
    yield from _norm("pooler/query_norm", f"{base}attn_pool_contrast.ln_q")
    yield from _norm("pooler/token_norm", f"{base}attn_pool_contrast.ln_k")
    yield from _norm("pooler/norm", f"{base}ln_contrast")


def _conch(config: VisionConfig) -> Names:
    pooler, sources = "visual.attn_pool_contrast.attn", _timm_sources(config, "visual.trunk.")
    sources += _pooler("visual.")
    for number, (path, letter) in enumerate(zip(("query_projection", "key", "value"), "qkv", strict=True)):
        sources.append(Source(f"pooler/{path}/kernel", (f"{pooler}.{letter}_proj_weight",), "transpose"))
        sources.append(Source(f"pooler/{path}/bias", (f"{pooler}.in_proj_bias",), part=(number, 3)))
    sources += _dense("pooler/output", f"{pooler}.out_proj")
    unused = r"text\.|text_decoder\.|logit_scale$|visual\.(proj_contrast$|attn_pool_caption\.|ln_caption\.)"
    return Names(sources, "visual.trunk.cls_token", unused)


def _conch_v15(config: VisionConfig) -> Names:
    pooler, sources = "attn_pool_contrast", _timm_sources(config, "trunk.")
    sources += _pooler("")
    sources += _dense("pooler/query_projection", f"{pooler}.to_q", bias=False)
    sources += _dense("pooler/key", f"{pooler}.to_kv", bias=False, part=(0, 2))
    sources += _dense("pooler/value", f"{pooler}.to_kv", bias=False, part=(1, 2))
    sources += _dense("pooler/output", f"{pooler}.to_out", bias=False)
    return Names(sources, "trunk.cls_token", r"attn_pool_caption\.|ln_caption\.|proj_contrast$|logit_scale$")


def _keep(config: VisionConfig) -> Names:
    sources = _timm_sources(config, "visual.")
    sources += [*_dense("head/inner", "visual_head.0"), *_dense("head/outer", "visual_head.2")]
    return Names(sources, "visual.cls_token", r"text\.|logit_scale$", ((r"\.ls([12])\.weight$", r".ls\1.gamma"),))


_LAYOUTS = {
    "timm": _timm,
    "meta": _meta,
    "vit": _vit,
    "dinov2": _dinov2,
    "dinov3": _dinov3,
    "clip": _clip,
    "conch": _conch,
    "conch_v15": _conch_v15,
    "keep": _keep,
}


def respelled(name: str, spellings: tuple[tuple[str, str], ...]) -> str:
    """Name of a tensor with old spellings replaced."""
    for pattern, replacement in spellings:
        name = re.sub(pattern, replacement, name)
    return name

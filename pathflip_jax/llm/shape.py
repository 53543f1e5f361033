"""Shapes of a slide-conditioned language model, as stored in its run's model.json."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

import jax
from flax import nnx

from pathflip_jax.llm.adapter import SlideLanguageModel
from pathflip_jax.llm.config import DecoderConfig, LoRAConfig
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.layers import Linear
from pathflip_jax.model.parameters import Params, flatten, unflatten
from pathflip_jax.model.versions import UnknownSettings, before


class Shape(NamedTuple):
    """Shapes of a slide-conditioned language model, and the storage dtype of its decoder's frozen parameters."""

    aligner: PathFLIPConfig
    decoder: DecoderConfig
    lora: LoRAConfig | None
    dtype: str

    def abstract(self, trainable: Callable[[str], bool]) -> dict[str, jax.ShapeDtypeStruct]:
        """Name, shape and dtype of every parameter: float32, except the decoder's frozen ones."""

        def stored(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            frozen = name.startswith("decoder/") and not trainable(name)
            return jax.ShapeDtypeStruct(x.shape, self.dtype if frozen else x.dtype)

        return {name: stored(name, x) for name, x in jax.eval_shape(lambda: flatten(self._new())).items()}

    def projector(self, key: jax.Array) -> Params:
        """Random initial parameters of the projector, as in PyTorch's Linear."""
        linear = Linear(self.aligner.embed_dim, self.decoder.width, "torch", nnx.Rngs(key))
        return {f"projector/{name}": x for name, x in flatten(linear).items()}

    def build(self, params: Params) -> SlideLanguageModel:
        """Build the model with these parameters."""
        return unflatten(jax.eval_shape(self._new), params)

    def _new(self) -> SlideLanguageModel:
        return SlideLanguageModel(self.aligner, self.decoder, self.lora, nnx.Rngs(0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for model.json."""
        lora = None if self.lora is None else vars(self.lora) | {"targets": list(self.lora.targets)}
        parts = {"aligner": self.aligner.to_dict(), "decoder": self.decoder.to_dict()}
        return parts | {"lora": lora, "dtype": self.dtype}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Shape":
        """Inverse of `to_dict`. Raises ValueError for anything but the shape of a language model.

        Entries that an earlier version did not write get the value of its behaviour; UnknownSettings names those of a
        later version.
        """
        _refuse_unknown(values)
        try:
            values = before("lm", set(cls._fields) - values.keys()) | values
            lora = None if values["lora"] is None else _with_earlier_behaviour(LoRAConfig, values["lora"])
            return cls(
                PathFLIPConfig.from_dict(values["aligner"]),
                DecoderConfig.from_dict(_with_earlier_behaviour(DecoderConfig, values["decoder"])),
                None if lora is None else LoRAConfig(**lora | {"targets": tuple(lora["targets"])}),
                values["dtype"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not the shape of a slide-conditioned language model ({error}); restore a copy") from None


def _refuse_unknown(values: dict[str, Any]) -> None:
    """Raise UnknownSettings for names in a model.json that are in no part of the shape."""
    kinds = {"decoder": DecoderConfig, "lora": LoRAConfig}
    unknown = sorted(set(values) - set(Shape._fields))
    for part, kind in kinds.items():
        if isinstance(values.get(part), dict):
            unknown += [f"{part}.{name}" for name in values[part] if name not in {f.name for f in fields(kind)}]
    if unknown:
        raise UnknownSettings(f"unknown entries in the shape of a language model: {', '.join(unknown)}", unknown)


def _with_earlier_behaviour(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values of a dataclass; those missing from an earlier version get that version's behaviour."""
    return before("lm", {field.name for field in fields(kind)} - values.keys()) | values

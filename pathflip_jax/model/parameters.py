"""Conversion between models and flat dicts of parameters by name.

Checkpoints, conversion, sharding rules and masks all use the same names, such as
"qformer/layers/0/self_attention/query/kernel".
"""

import functools
from collections.abc import Iterable, Mapping

import jax
from flax import nnx
from jaxtyping import Array

from pathflip_jax.model.config import ModelConfig
from pathflip_jax.model.families import AlignmentModel, family_of


def make_model(config: ModelConfig, rngs: nnx.Rngs | None = None) -> AlignmentModel:
    """Model of the config's family with randomly initialised parameters, or zeros in their place without `rngs`."""
    return family_of(config).network(config, rngs)


def flatten(model: nnx.Module) -> dict[str, Array]:
    """Flat dict of parameters by name.

    Optimizer moments, which have the same tree structure, flatten in the same way.
    """
    return {_name(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(model))}


def _name(path: Iterable) -> str:
    return "/".join(map(str, path))


def abstract_params(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Name, shape and dtype of every parameter, in order of name; nothing is computed."""
    _, state = _split_abstract(config)
    return dict(sorted((_name(path), variable.get_value()) for path, variable in nnx.to_flat_state(state)))


@functools.cache
def _split_abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Graph definition and abstract state of a config's model; cached, as constructing a model takes a second."""
    return nnx.split(jax.eval_shape(lambda: make_model(config)))


def unflatten(template: nnx.Module | ModelConfig, flat: Mapping[str, Array]):
    """Model of `template` (a config, a model, or its `jax.eval_shape`) with the flat parameters of `flatten`.

    Raises ValueError that lists every name that is missing, unknown or of another shape.
    """
    graph, state = _split_abstract(template) if isinstance(template, ModelConfig) else nnx.split(template)
    wanted = nnx.to_flat_state(state)
    names = {_name(path): (path, variable) for path, variable in wanted}
    faults = [f"missing {name}" for name in names if name not in flat]
    faults += [f"unknown {name}" for name in flat if name not in names]
    faults += [
        f"{name} is {tuple(flat[name].shape)}, expected {tuple(variable.shape)}"
        for name, (_, variable) in names.items()
        if name in flat and tuple(flat[name].shape) != tuple(variable.shape)
    ]
    if faults:
        raise ValueError("parameters do not match this model: " + "; ".join(faults))
    filled = [(path, variable.replace(flat[name])) for name, (path, variable) in names.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


Key = jax.Array
Params = dict[str, jax.Array]

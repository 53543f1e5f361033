"""Tensor names changed by wrappers, and several sets of weights in one checkpoint: read correctly, or refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from pathflip_jax.convert.checkpoint_files import read_checkpoint
from pathflip_jax.convert.weight_sets import WRAPPERS, plain_name, plain_names

NAMES = ("query_tokens", "path_proj.weight", "Qformer.bert.encoder.layer.0.attention.self.query.weight")


def weights(value: float) -> dict[str, np.ndarray]:
    return {name: np.full(3, value, np.float32) for name in NAMES}


def save(torch, path, content):
    def tensors(value):
        if isinstance(value, dict):
            return {name: tensors(x) for name, x in value.items()}
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    torch.save(tensors(content), path)
    return path


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(NAMES), st.lists(st.tuples(st.integers(0, 9), st.sampled_from(sorted(WRAPPERS))), max_size=4))
def test_wrappers_anywhere_in_a_name_are_taken_out(name, inserted):
    parts = name.split(".")
    for place, wrapper in inserted:
        parts.insert(place % len(parts), wrapper)
    assert plain_name(".".join(parts)) == name


def test_two_tensors_of_one_plain_name_are_named():
    with pytest.raises(ValueError, match=r"two tensors of the same name: a\._orig_mod\.b and a\.b are both"):
        plain_names({"a._orig_mod.b": 1, "a.b": 2}, "here")


@pytest.mark.parametrize(
    "prefix",
    ["", "_orig_mod.", "_fsdp_wrapped_module.", "module.model.", "model._orig_mod.module.", "pathflip_align.module."],
)
def test_a_whole_model_behind_any_wrapper(tmp_path, prefix):
    save_file({prefix + name: x for name, x in weights(1).items()}, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path / "model.safetensors").keys() == set(NAMES)


@pytest.mark.parametrize(
    ("average", "label"),
    [
        (lambda x: {f"ema_model.module.{n}": x[n] for n in x}, "ema_model"),
        (lambda x: {f"model_ema.{n}": x[n] for n in x}, "model_ema"),
        (lambda x: {f"model.teacher.{n}": x[n] for n in x}, "teacher"),
    ],
)
def test_sets_by_prefix_are_listed_and_chosen(tmp_path, average, label):
    path = tmp_path / "both.safetensors"
    save_file({f"model.{n}": x for n, x in weights(1).items()} | average(weights(2)), path)
    with pytest.raises(ValueError, match=r"both\.safetensors: holds 2 sets of weights, .*; choose one with --weights"):
        read_checkpoint(path)
    assert read_checkpoint(path, "raw")["query_tokens"][0] == 1
    assert read_checkpoint(path, label)["query_tokens"][0] == 2
    with pytest.raises(ValueError, match=rf"no weights named 'swa', but .*{label} \(3 tensors\)"):
        read_checkpoint(path, "swa")


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        (lambda a, b: {"state_dict": a, "state_dict_ema": b}, ("state_dict", "state_dict_ema")),
        (lambda a, b: {"model": a, "ema": b, "step": 3}, ("model", "ema")),
        (
            lambda a, b: {"state_dict": a, "callbacks": {"EMA": {"ema_state_dict": b, "decay": 0.999}}},
            ("state_dict", "callbacks.EMA.ema_state_dict"),
        ),
        (lambda a, b: {"student": a, "teacher": b, "epoch": 1}, ("student", "teacher")),
    ],
)
def test_sets_by_place_in_the_file_are_listed_and_chosen(tmp_path, content, labels):
    torch = pytest.importorskip("torch")
    path = save(torch, tmp_path / "both.ckpt", content(weights(1), weights(2)))
    with pytest.raises(ValueError, match=rf"holds 2 sets of weights.*{labels[0]} .*{labels[1]} "):
        read_checkpoint(path)
    for label, value in zip(labels, (1, 2), strict=True):
        assert read_checkpoint(path, label)["query_tokens"][0] == value


def test_what_is_one_set_needs_no_choice(tmp_path):
    """Equal numbers under two names, an average alone, an optimizer's state beside the weights."""
    torch = pytest.importorskip("torch")
    moments = {0: {"exp_avg": np.zeros(3, np.float32), "step": np.zeros((), np.float32)}}
    for number, content in enumerate(
        [
            {"model": weights(1), "state_dict": weights(1)},
            {"model_ema": weights(1), "epoch": 2},
            {"state_dict": weights(1), "optimizer": {"state": moments}},
            {f"module.{n}": x for n, x in weights(1).items()},
        ]
    ):
        found = read_checkpoint(save(torch, tmp_path / f"{number}.ckpt", content))
        assert found.keys() == set(NAMES) and found["query_tokens"][0] == 1


def test_a_flattened_model_says_how_to_be_saved(tmp_path):
    save_file({"_fsdp_wrapped_module._flat_param": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: holds FSDP's flattened parameters .*FULL_STATE_DICT"):
        read_checkpoint(tmp_path / "model.safetensors")

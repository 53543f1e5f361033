"""Checkpoint identification by the tensor names of each project."""

import csv
from pathlib import Path

import pytest

from pathflip_jax.convert.checkpoint_files import read_checkpoint
from pathflip_jax.convert.names import why_unused
from pathflip_jax.convert.pytorch import infer_config, torch_shapes
from pathflip_jax.convert.recognise import account, recognise, summary, write_rows

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize(("case", "family"), [("base", "pathflip"), ("pathflip2", "pathflip2")])
def test_released_weights_are_known_by_their_names(case, family):
    names = read_checkpoint(GOLDEN / case / "state_dict.safetensors")
    assert recognise(names) == family
    if family == "pathflip":
        assert recognise([*names, "path_proj_llm.weight", "path_proj_llm.bias"]) == "finetune"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["visual.trunk.blocks.0.attn.qkv.weight", "text.ln_final.weight"], "CLIP-like model"),
        (["embeddings.word_embeddings.weight", "pooler.dense.weight"], "a BERT on its own"),
        (["patch_embed.proj.weight", "cls_token"], "vision transformer"),
        (["layers.0.self_attn.q_proj.weight", "embed_tokens.weight"], "a language model"),
        (["attention_net.0.weight"], "attention MIL"),
        (["x", "y"], "another project: 2 tensors such as x, y"),
        (["image_proj.0.weight"], r"incomplete checkpoint: .* PathFLIP2, but not slide_encoder\.visual_tokens"),
        (["query_tokens", "path_proj.weight"], "incomplete checkpoint"),
    ],
)
def test_what_is_no_pathflip_is_told_what_it_looks_like(names, words):
    with pytest.raises(ValueError, match=words):
        recognise(names)


def test_every_tensor_is_accounted_for(tmp_path):
    state = read_checkpoint(GOLDEN / "pathflip2" / "state_dict.safetensors")
    wanted = torch_shapes(infer_config(state, 4, {"lora_alpha": 12, "num_heads": 4}))
    without = {name: x for name, x in state.items() if name != "global_logit_bias"}
    rows = account(without, wanted, why_unused)
    assert sorted(row.name for row in rows) == sorted(state)
    states = {row.name: row for row in rows}
    assert states["image_proj.0.weight"].state == "used" and states["image_proj.0.weight"].shape == "32x40"
    assert states["global_logit_bias"].state == "filled"
    unused = [row for row in rows if row.state == "unused"]
    assert len(unused) == 2 and all("pooler" in row.name and row.why for row in unused)
    told = summary(rows)
    assert f"tensors used {len(rows) - 3}" in told and "unused 2: BERT's pooler" in told and "filled 1" in told
    write_rows(tmp_path / "tensors.csv", rows)
    with open(tmp_path / "tensors.csv") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [row.name for row in rows]

"""Weights of patch encoders from files as they are published, and the error for each fault."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pathflip_jax.convert import vision
from pathflip_jax.convert.vision import check_vision, find_weights, load_vision
from pathflip_jax.model.parameters import flatten
from pathflip_jax.vision.config import VisionConfig
from pathflip_jax.vision.recipes import RECIPES, Recipe

TINY = VisionConfig(width=8, depth=2, heads=2, hidden=16, patch=4, image=16)
SWIGLU = replace(TINY, feed_forward="swiglu", hidden=12, registers=2, prefix_positions=0)


def tiny(name: str, network: VisionConfig = TINY, **changes) -> Recipe:
    """Recipe with a small network."""
    return replace(RECIPES[name], network=network, **changes)


UNI = tiny("uni_v1")


def timm_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a published file of timm."""
    d, hidden, patch = config.width, config.hidden, config.patch
    gated = 2 if config.feed_forward == "swiglu" else 1
    shapes = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, config.prefix_positions + config.table_side**2, d),
        "patch_embed.proj.weight": (d, 3, patch, patch),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    if config.registers:
        shapes["reg_token"] = (1, config.registers, d)
    layer = {
        "norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "ls1.gamma": (d,), "norm2.weight": (d,),
        "norm2.bias": (d,), "mlp.fc1.weight": (gated * hidden, d), "mlp.fc1.bias": (gated * hidden,),
        "mlp.fc2.weight": (d, hidden), "mlp.fc2.bias": (d,), "ls2.gamma": (d,),
    }  # fmt: skip
    return shapes | {f"blocks.{i}.{name}": shape for i in range(config.depth) for name, shape in layer.items()}


def numbers(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def prefixed(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {prefix + name: tensor for name, tensor in state.items()}


def save(path: Path, content, dtype=None) -> Path:
    """Save as the suffix says; arrays as tensors of torch."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: np.array(tensor, dtype, order="C") for name, tensor in content.items()}, path)
        return path
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    def tensors(value):
        if isinstance(value, dict):
            return {name: tensors(inner) for name, inner in value.items()}
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value

    torch.save(tensors(content), path)
    return path


def parameters(recipe: Recipe, path: Path, **options) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in flatten(load_vision(recipe, path, **options).network).items()}


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def refused(recipe: Recipe, path: Path, *words: str, error=ValueError) -> str:
    """Message of the error, which begins with the path and holds the words; of the check and of the loading alike."""
    said = []
    for function in (check_vision, load_vision):
        with pytest.raises(error) as caught:
            function(recipe, path)
        said.append(str(caught.value))
    assert said[0] == said[1] and said[0].startswith(str(path))
    for word in words:
        assert word in said[0], said[0]
    return said[0]


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    return numbers(timm_shapes(TINY))


@pytest.fixture
def whole(state, tmp_path) -> dict[str, np.ndarray]:
    """Parameters from a whole file."""
    return parameters(UNI, save(tmp_path / "whole" / "model.safetensors", state))


def test_every_tensor_goes_to_its_parameter(state, whole):
    assert sum(array.size for array in whole.values()) == sum(tensor.size for tensor in state.values())
    same = {
        "class_token": state["cls_token"][0, 0],
        "positions": state["pos_embed"][0],
        "patch/bias": state["patch_embed.proj.bias"],
        "norm/scale": state["norm.weight"],
        "norm/bias": state["norm.bias"],
    }
    layer = {
        "attention_norm/scale": "norm1.weight", "attention_norm/bias": "norm1.bias",
        "attention/qkv/kernel": "attn.qkv.weight", "attention/qkv/bias": "attn.qkv.bias",
        "attention/output/kernel": "attn.proj.weight", "attention/output/bias": "attn.proj.bias",
        "attention_scale": "ls1.gamma", "feed_forward_scale": "ls2.gamma",
        "feed_forward_norm/scale": "norm2.weight", "feed_forward_norm/bias": "norm2.bias",
        "feed_forward/inner/kernel": "mlp.fc1.weight", "feed_forward/inner/bias": "mlp.fc1.bias",
        "feed_forward/outer/kernel": "mlp.fc2.weight", "feed_forward/outer/bias": "mlp.fc2.bias",
    }  # fmt: skip
    for path, name in layer.items():
        same[f"layers/{path}"] = np.stack([state[f"blocks.{i}.{name}"].T for i in range(2)])
    kernel = whole.pop("patch/kernel").reshape(4, 4, 3, 8)
    assert_same(whole, same)
    np.testing.assert_array_equal(kernel[1, 2, 0], state["patch_embed.proj.weight"][:, 0, 1, 2])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x.pth", "x.pt", "x.ckpt", "other.safetensors"])
@pytest.mark.parametrize("pass_folder", [True, False])
def test_files_of_any_format_and_name_are_read(state, whole, tmp_path, name, pass_folder):
    path = save(tmp_path / "folder" / name, state)
    (path.parent / "config.json").write_text("{}")
    place = path.parent if pass_folder else path
    assert_same(parameters(UNI, place), whole)
    assert check_vision(UNI, place) == find_weights(UNI, place) == path


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: prefixed(state, "module."),
        lambda state: prefixed(state, "model."),
        lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3},
        lambda state: {"model": state, "args": {"lr": 0.1}},
        lambda state: {"teacher": prefixed(state, "backbone."), "iteration": 5},
        lambda state: {"teacher": prefixed(state, "module.backbone."), "student": prefixed(state, "module.backbone.")},
        lambda state: {"state_dict": {"model": state}},
        lambda state: state | {"head.weight": np.ones((3, 8), np.float32), "fc_norm.bias": np.ones(8, np.float32)},
    ],
)
def test_containers_and_prefixes_of_training_scripts_are_known(state, whole, tmp_path, wrap):
    assert_same(parameters(UNI, save(tmp_path / "x.pth", wrap(state))), whole)


def sharded(folder: Path, state: dict[str, np.ndarray], suffix: str, index: str) -> Path:
    names = sorted(state)
    where = {}
    for number, held in enumerate((names[::2], names[1::2]), 1):
        file = f"part-{number}{suffix}"
        save(folder / file, {name: state[name] for name in held})
        where |= dict.fromkeys(held, file)
    (folder / index).write_text(json.dumps({"weight_map": where}))
    return folder


SHARDS = [(".safetensors", "model.safetensors.index.json"), (".bin", "pytorch_model.bin.index.json")]


@pytest.mark.parametrize(("suffix", "index"), SHARDS)
@pytest.mark.parametrize("files", [("model.safetensors", "pytorch_model.bin"), ("other.bin",)])
def test_sets_of_shards_are_read(state, whole, tmp_path, suffix, index, files):
    recipe = replace(UNI, files=files)
    folder = sharded(tmp_path / "set", state, suffix, index)
    assert_same(parameters(recipe, folder), whole)
    (folder / f"part-2{suffix}").unlink()
    refused(recipe, folder, f"part-2{suffix}", index, "missing", error=FileNotFoundError)


def test_published_names_come_first(state, whole, tmp_path):
    folder = save(tmp_path / "folder" / "pytorch_model.bin", state).parent
    save(folder / "model.safetensors", {"x": np.ones(1, np.float32)})
    assert_same(parameters(UNI, folder), whole)
    assert find_weights(replace(UNI, files=("model.safetensors", "pytorch_model.bin")), folder).suffix != ".bin"


def test_keep_spells_layer_scale_in_two_ways(tmp_path):
    recipe = tiny("keep", replace(TINY, head="mlp", head_width=6, unit_length=True))
    shapes = {"0.weight": (6, 8), "0.bias": (6,), "2.weight": (6, 6), "2.bias": (6,)}
    state = prefixed(numbers(timm_shapes(TINY)), "visual.") | prefixed(numbers(shapes), "visual_head.")
    state |= {"text.embeddings.weight": np.ones((5, 4), np.float32), "logit_scale": np.ones((), np.float32)}
    usual = parameters(recipe, save(tmp_path / "a" / "model.safetensors", state))
    other = {name.replace(".gamma", ".weight"): tensor for name, tensor in state.items()}
    assert "visual.blocks.1.ls2.weight" in other
    assert_same(parameters(recipe, save(tmp_path / "b" / "model.safetensors", other)), usual)
    np.testing.assert_array_equal(usual["head/outer/kernel"], state["visual_head.2.weight"].T)


def test_training_files_of_dinov2_have_layers_in_chunks(tmp_path):
    network = replace(SWIGLU, prefix_positions=1)
    recipe = tiny("openmidnight", network)
    renamed = {"reg_token": "register_tokens", ".fc1.": ".w12.", ".fc2.": ".w3."}
    state = {}
    for name, tensor in numbers(timm_shapes(network)).items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[name] = tensor
    state["mask_token"] = np.ones((1, 8), np.float32)
    flat = parameters(recipe, save(tmp_path / "a" / "model.safetensors", state))
    chunks = {
        "backbone." + name.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): tensor
        for name, tensor in state.items()
    }
    chunks |= {"dino_head.mlp.0.weight": np.ones((4, 8), np.float32), "ibot_head.mlp.0.bias": np.ones(4, np.float32)}
    assert "backbone.blocks.1.1.mlp.w12.weight" in chunks
    path = save(tmp_path / "b.pth", {"teacher": chunks})
    assert_same(parameters(recipe, path), flat)


def test_parts_of_a_joined_tensor_go_to_their_layers(tmp_path):
    network = replace(TINY, pooling="attention", head_width=16)
    pooler = {
        "query": (1, 16), "ln_q.weight": (16,), "ln_q.bias": (16,), "ln_k.weight": (8,), "ln_k.bias": (8,),
        "attn.q_proj_weight": (16, 16), "attn.k_proj_weight": (16, 8), "attn.v_proj_weight": (16, 8),
        "attn.in_proj_bias": (48,), "attn.out_proj.weight": (16, 16), "attn.out_proj.bias": (16,),
    }  # fmt: skip
    norm = prefixed(numbers({"weight": (16,), "bias": (16,)}), "visual.ln_contrast.")
    state = prefixed(numbers(timm_shapes(TINY)), "visual.trunk.") | norm
    state |= prefixed(numbers(pooler), "visual.attn_pool_contrast.")
    state |= {"visual.proj_contrast": np.ones((16, 16), np.float32), "text.x": np.ones(1, np.float32)}
    found = parameters(tiny("conch_v1", network), save(tmp_path / "a" / "model.safetensors", state))
    bias = state["visual.attn_pool_contrast.attn.in_proj_bias"]
    for number, part in enumerate(("query_projection", "key", "value")):
        np.testing.assert_array_equal(found[f"pooler/{part}/bias"], bias[16 * number : 16 * number + 16])

    pooler = {name: shape for name, shape in pooler.items() if not name.startswith("attn.")}
    pooler |= {"to_q.weight": (16, 16), "to_kv.weight": (32, 8), "to_out.weight": (16, 16)}
    state = prefixed(numbers(timm_shapes(TINY)), "trunk.") | prefixed(numbers(pooler), "attn_pool_contrast.")
    state |= prefixed(numbers({"weight": (16,), "bias": (16,)}), "ln_contrast.")
    recipe = tiny("conch_v15", replace(network, pooler_bias=False))
    found = parameters(recipe, save(tmp_path / "b" / "model.safetensors", state))
    both = state["attn_pool_contrast.to_kv.weight"]
    np.testing.assert_array_equal(found["pooler/key/kernel"], both[:16].T)
    np.testing.assert_array_equal(found["pooler/value/kernel"], both[16:].T)


@pytest.mark.parametrize(("network", "side"), [(TINY, 7), (SWIGLU, 6), (replace(TINY, grid=9), 4)])
def test_the_position_table_may_be_of_another_grid(tmp_path, network, side):
    state = numbers(timm_shapes(replace(network, grid=side)))
    loaded = load_vision(tiny("uni_v1", network), save(tmp_path / "model.safetensors", state))
    assert loaded.config == replace(network, grid=side)
    np.testing.assert_array_equal(loaded.network.positions[...], state["pos_embed"][0])
    images = np.random.default_rng(0).random((1, 16, 16, 3), np.float32)
    assert np.isfinite(loaded.network(images)).all()


@pytest.mark.parametrize("registers", [1, 2])
def test_registers_keep_their_axis(tmp_path, registers):
    network = replace(SWIGLU, registers=registers)
    state = numbers(timm_shapes(network))
    loaded = load_vision(tiny("uni_v2", network), save(tmp_path / "model.safetensors", state))
    np.testing.assert_array_equal(loaded.network.registers[...], state["reg_token"][0])


def test_kernels_are_of_the_dtype_and_the_rest_of_float32(state, tmp_path, whole):
    found = parameters(UNI, save(tmp_path / "model.safetensors", state), dtype=jnp.bfloat16)
    for name, array in found.items():
        wanted = whole[name].astype(ml_dtypes.bfloat16) if name.endswith("/kernel") else whole[name]
        assert array.dtype == wanted.dtype
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_files_of_other_precisions_are_read(state, tmp_path, whole, dtype):
    found = parameters(UNI, save(tmp_path / "model.safetensors", state, dtype))
    assert_same(found, {name: array.astype(dtype).astype(np.float32) for name, array in whole.items()})


def test_the_digest_is_of_the_numbers_not_of_the_file(state, tmp_path):
    def digest(name: str, content) -> str:
        return load_vision(UNI, save(tmp_path / name, content)).sha256

    one = digest("a.safetensors", state)
    assert digest("b.bin", dict(reversed(state.items()))) == one == digest("c.pth", {"model": prefixed(state, "m.")})
    assert load_vision(UNI, tmp_path / "b.bin", jnp.bfloat16).sha256 == one
    changed = state["blocks.1.norm2.bias"].copy()
    changed[3] = np.nextafter(changed[3], np.float32(9))
    others = [state | {"blocks.1.norm2.bias": changed}]
    others += [state | {"norm.weight": state["norm.bias"], "norm.bias": state["norm.weight"]}]
    assert len({one, *(digest("d.bin", other) for other in others)}) == 3


# Faults


@pytest.fixture
def two_recipes(monkeypatch):
    known = {"uni_v1": UNI, "uni_v2": tiny("uni_v2", SWIGLU)}
    monkeypatch.setattr(vision, "RECIPES", known)
    return known


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_of_another_encoder_are_named(two_recipes, tmp_path, suffix):
    path = save(tmp_path / f"x{suffix}", numbers(timm_shapes(SWIGLU)))
    said = refused(two_recipes["uni_v1"], path, "not the weights of uni_v1 (MahmoodLab/UNI)", "They fit uni_v2")
    assert "download" not in said


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """File of safetensors whose numbers are a hole of the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
    return path


def test_the_check_knows_full_size_weights_by_their_shapes(tmp_path):
    path = sparse(tmp_path / "model.safetensors", timm_shapes(RECIPES["hoptimus0"].network))
    assert check_vision(RECIPES["hoptimus0"], path) == check_vision(RECIPES["hoptimus1"], tmp_path) == path
    for name in ("virchow", "gigapath", "uni_v2", "uni_v1", "phikon"):
        with pytest.raises(ValueError, match=f"not the weights of {name} .*They fit hoptimus0 or hoptimus1: is that"):
            check_vision(RECIPES[name], path)


def test_a_missing_tensor_is_named_with_the_download(state, tmp_path):
    del state["blocks.1.mlp.fc2.bias"]
    path = save(tmp_path / "model.safetensors", state)
    refused(UNI, path, "blocks.1.mlp.fc2.bias is missing", "hf download MahmoodLab/UNI", "hf auth login")


def test_an_unknown_tensor_is_named(state, tmp_path):
    path = save(tmp_path / "model.safetensors", state | {"blocks.2.norm1.weight": np.ones(8, np.float32)})
    refused(UNI, path, "blocks.2.norm1.weight is unknown")


def test_most_faults_are_counted(tmp_path):
    said = refused(UNI, save(tmp_path / "model.safetensors", numbers({"x": (1,)})), "missing", "more.")
    assert len(said) < 600


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.0.attn.proj.weight", (4, 16), "[8, 8]"),
        ("blocks.1.mlp.fc1.weight", (8, 16), "[16, 8]"),
        ("patch_embed.proj.weight", (8, 4, 4, 3), "[8, 3, 4, 4]"),
        ("patch_embed.proj.weight", (8, 3, 2, 8), "[8, 3, 4, 4]"),
        ("patch_embed.proj.weight", (8, 48), "[8, 3, 4, 4]"),
        ("blocks.0.norm1.weight", (2, 4), "[8]"),
        ("blocks.0.norm1.weight", (1, 8), "[8]"),
        ("cls_token", (1, 2, 4), "[8]"),
        ("cls_token", (8, 1), "[8]"),
        ("blocks.0.ls1.gamma", (), "[8]"),
        ("pos_embed", (1, 8, 17), "1 rows and a square of patches, 8 wide"),
        ("pos_embed", (1, 16, 8), "1 rows and a square of patches, 8 wide"),
        ("pos_embed", (1, 1, 8), "1 rows and a square of patches, 8 wide"),
        ("pos_embed", (136,), "1 rows and a square of patches, 8 wide"),
        ("pos_embed", (), "1 rows and a square of patches, 8 wide"),
        ("pos_embed", (1, 8, 4, 4), "1 rows and a square of patches, 8 wide"),
    ],
)
def test_other_shapes_of_as_many_numbers_are_refused(state, tmp_path, name, shape, expected):
    path = save(tmp_path / "model.safetensors", state | {name: np.ones(shape, np.float32)})
    refused(UNI, path, f"{name} is {list(shape)}, expected {expected}")


@pytest.mark.parametrize(
    "shapes", [((8, 8), (8, 8), (4, 16)), ((64,), (8, 8), (8, 8)), ((8, 8), (8, 8), (16, 8)), ((), (8, 8), (8, 8))]
)
def test_other_shapes_of_joined_tensors_are_refused(tmp_path, shapes):
    layer = "encoder.layer.0.attention.attention."
    state = numbers(
        {f"{layer}{part}.weight": shape for part, shape in zip(("query", "key", "value"), shapes, strict=True)}
    )
    path = save(tmp_path / "model.safetensors", state | numbers({"embeddings.cls_token": (1, 1, 8)}))
    with pytest.raises(ValueError, match="not the weights of phikon"):
        load_vision(tiny("phikon", replace(TINY, layer_scale=False)), path)
    names = vision.names_of("vit", replace(TINY, layer_scale=False))
    faults = vision._faults(tiny("phikon", replace(TINY, layer_scale=False)), names, state)
    assert f"{layer}query.weight and 2 more are {list(shapes[0])}, expected [24, 8] together" in faults


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("eighth", [0, 1, 4, 7])
def test_half_a_download_is_refused(state, tmp_path, suffix, eighth):
    path = save(tmp_path / f"model{suffix}", state)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * eighth // 8])
    refused(UNI, path, "again")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_told(tmp_path, name):
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1213\n")
    refused(UNI, path, f"Git LFS pointer of {path.stat().st_size} bytes", "git lfs pull")


def test_a_pointer_among_shards_is_told(state, tmp_path):
    folder = sharded(tmp_path / "set", state, *SHARDS[0])
    (folder / "part-2.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1213\n")
    refused(UNI, folder, "part-2.safetensors: a Git LFS pointer")


def test_two_weight_files_of_other_names_are_listed(state, tmp_path):
    for name in ("one.pth", "two.pth"):
        save(tmp_path / name, state)
    refused(
        UNI, tmp_path, "expected pytorch_model.bin of MahmoodLab/UNI, found one.pth, two.pth", error=FileNotFoundError
    )


@pytest.mark.parametrize("place", ["", "absent"])
def test_no_weights_come_with_the_commands_of_the_download(tmp_path, place):
    (tmp_path / "config.json").write_text("{}")
    refused(UNI, tmp_path / place, "hf download MahmoodLab/UNI pytorch_model.bin", error=FileNotFoundError)
    said = refused(tiny("phikon"), tmp_path / place, "hf download owkin/phikon", error=FileNotFoundError)
    assert "login" not in said


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"state_dict": {}}, [1, 2], {"state_dict": {"x": {"y": "z"}}}])
def test_files_without_tensors_are_refused(tmp_path, content):
    refused(UNI, save(tmp_path / "x.pth", content), "holds no tensors by name")


@pytest.mark.parametrize(("suffix", "kind"), [(".pth", "int8"), (".safetensors", "I8")])
def test_numbers_that_are_no_floats_are_refused(state, tmp_path, suffix, kind):
    path = save(tmp_path / f"x{suffix}", state | {"norm.weight": np.ones(8, np.int8)})
    refused(UNI, path, f"norm.weight holds {kind}, not floats")

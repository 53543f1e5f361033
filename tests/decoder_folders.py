"""Tiny random language models in Hugging Face folders, as transformers itself writes them."""

import json
from pathlib import Path

import pytest

SENTENCES = (
    "What does this slide show?",
    "Glands infiltrate the stroma, necrosis is extensive.",
    "The tumor measures 1.8 cm; lymphovascular invasion is not seen (pT2b).",
    "A: adenocarcinoma  B: squamous cell carcinoma  C: normal tissue",
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # padding, and the bounds of a turn, as in Qwen
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = dict(
    vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=256,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
FAMILIES = {
    "qwen3": dict(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 5e6}, tie_word_embeddings=True),
    "qwen2": dict(rope_parameters={"rope_type": "default", "rope_theta": 12345.0}, tie_word_embeddings=False),
    "llama": dict(rope_parameters=LLAMA3, tie_word_embeddings=False),
}


def make_folder(path: Path, family: str, seed: int = 0, shard: str = "5GB", dtype="float32", **overrides) -> Path:
    """A random model of a family with a byte-level tokenizer of 300 tokens; `overrides` are settings of its config.

    Weights are large enough (0.1) that logits differ, biases and norms are off their special values; `shard` is the
    most bytes of a file of weights. The table has 20 rows more than there are tokens, as Qwen's is padded.
    """
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import transformers

    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family] | ends | overrides)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=noise) + float("norm" in name))
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)
    write_tokenizer(path)
    return Path(path)


def write_tokenizer(path: Path) -> None:
    """tokenizer.json and tokenizer_config.json with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(Path(path) / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "chat_template": TEMPLATE,
    }
    (Path(path) / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory):
    """decoder_folder(family, ...) is the folder of `make_folder`, made once a session: tests that change it copy it."""
    made = {}

    def make(family: str, **more) -> Path:
        key = family, json.dumps(more, sort_keys=True)
        if key not in made:
            made[key] = make_folder(tmp_path_factory.mktemp("decoder") / family, family, **more)
        return made[key]

    return make

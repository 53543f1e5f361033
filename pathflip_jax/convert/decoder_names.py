"""Weight names of Hugging Face decoders and PEFT adapters: every tensor, and the parameter it holds."""

from collections.abc import Iterator, Sequence

from pathflip_jax.convert.names import Name
from pathflip_jax.llm.config import TARGETS, DecoderConfig

PARENTS = {"attention": "self_attn", "feed_forward": "mlp"}  # the module of a layer that holds a projection
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
PEFT_PREFIX = "base_model.model."
CLASSES = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}  # of transformers


def names(config: DecoderConfig) -> list[Name]:
    """All parameters of a decoder without adapters, each once."""
    return list(_names(config))


def _names(config: DecoderConfig) -> Iterator[Name]:
    biased = ("q_proj", "k_proj", "v_proj") if config.attention_bias else ()
    biased += ("o_proj",) if config.output_bias else ()
    yield Name("embedding/embedding", TABLE)
    for number in range(config.layers):
        path, torch = f"layers/{number}", f"model.layers.{number}"
        yield Name(f"{path}/attention_norm/scale", f"{torch}.input_layernorm.weight")
        for target in TARGETS:
            yield Name(f"{path}/{TARGETS[target]}/kernel", f"{torch}.{module(target)}.weight", "transpose")
            if target in biased:
                yield Name(f"{path}/{TARGETS[target]}/bias", f"{torch}.{module(target)}.bias")
        if config.query_norm:
            yield Name(f"{path}/attention/query_norm/scale", f"{torch}.self_attn.q_norm.weight")
            yield Name(f"{path}/attention/key_norm/scale", f"{torch}.self_attn.k_norm.weight")
        yield Name(f"{path}/feed_forward_norm/scale", f"{torch}.post_attention_layernorm.weight")
    yield Name("norm/scale", "model.norm.weight")
    if not config.tied:
        yield Name("head/kernel", HEAD, "transpose")


def module(target: str) -> str:
    """Full module name of a `target_modules` entry within a layer: q_proj is self_attn.q_proj."""
    return f"{PARENTS[TARGETS[target].partition('/')[0]]}.{target}"


def adapter_names(layers: int, targets: Sequence[str]) -> list[Name]:
    """All adapter parameters at these projections of all layers, under PEFT's names."""
    return [
        Name(
            f"layers/{number}/{TARGETS[target]}/lora/{ours}",
            f"{PEFT_PREFIX}model.layers.{number}.{module(target)}.lora_{theirs}.weight",
            "transpose",
        )
        for number in range(layers)
        for target in targets
        for ours, theirs in (("a", "A"), ("b", "B"))
    ]


def is_buffer(torch: str) -> bool:
    """Whether a tensor is a buffer of older files, which the config determines and which is not read."""
    return torch.endswith(".rotary_emb.inv_freq")

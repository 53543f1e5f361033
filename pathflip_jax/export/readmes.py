"""README.md of a folder that `pathflip export --to pytorch` writes, for either family."""

from pathflip_jax.model.config import ModelConfig, PathFLIP2Config, PathFLIPConfig


def caption_length(config: ModelConfig, settings: dict) -> int:
    """Token limit of the run's captions; where it is not recorded, the model's number of positions."""
    return min(int(settings.get("data", {}).get("caption_length") or config.max_positions), config.max_positions)


def readme(config: PathFLIPConfig, settings: dict) -> str:
    """README of a PathFLIP."""
    encoder = settings.get("data", {}).get("encoder") or "not recorded"
    length = caption_length(config, settings)
    bias = (
        "\nThis model has a learned bias in its region loss, the entry `logit_bias`. The released class has no such "
        "entry and rejects it; without it, embeddings and attention maps are unchanged, and only the probabilities of "
        "that loss differ.\n"
        if config.logit_bias_init is not None
        else ""
    )
    return f"""# PathFLIP weights for PyTorch

For research use only; not for diagnosis. Patch encoder: {encoder} ({config.feature_dim} features per patch). Its
licence may apply to models that are trained on its features.

`model.safetensors` has the tensor names of the released PyTorch model and loads there with `strict=True`.
`torch_model.py` (needs torch and safetensors, no JAX) is a plain module for the same weights:

```python
from transformers import AutoTokenizer
from torch_model import load

model = load(".")                                  # this folder
tokenizer = AutoTokenizer.from_pretrained("bert")
slides = model.encode_slides(patches, patch_mask)  # [B, R, S, {config.feature_dim}], bool [B, R, S]
ids = tokenizer(texts, padding=True, truncation=True, max_length={length}, return_tensors="pt")
texts = model.encode_texts(ids.input_ids, ids.attention_mask)
pooled, weights = model.text_region_attention(texts[None].expand(len(slides.slide), -1, -1), *slides[1:3])
```

Regions are R groups of up to S patches of a slide. Compare slides with texts by the cosine of `slides.slide` and
`texts`, and regions with texts by the cosine of `pooled` and `texts`; `weights` show where on the slide a text is
found.
{bias}"""


def readme2(config: PathFLIP2Config, settings: dict) -> str:
    """README of a PathFLIP2."""
    encoder = settings.get("data", {}).get("encoder") or "not recorded"
    length = caption_length(config, settings)
    return f"""# PathFLIP2 weights for PyTorch

`model.safetensors` has the tensor names of the published class, with any LoRA of the text encoder merged into it;
`torch_pathflip2.py` is the code of the model and needs torch, transformers and safetensors; `bert/` is its tokenizer.

```python
from torch_pathflip2 import load
from transformers import BertTokenizerFast

model, tokenizer = load("."), BertTokenizerFast.from_pretrained("bert")
slides = model.encode_slides(patches)  # [B, N, {config.feature_dim}]
ids = tokenizer(captions, padding=True, truncation=True, max_length={length}, return_tensors="pt")
texts = model.encode_texts(ids.input_ids, ids.attention_mask)
```

Embeddings are not normalised; compare them by cosine. Patch encoder: {encoder}. Texts are pooled by
`{config.text_pooling}`, regions by `{config.region_head}`.

In the published code: `pathflip_pl(args).model.load_state_dict(load_file("model.safetensors"), strict=False)`, with
`contrast_loss="siglip"` in its arguments; otherwise the entries `global_logit_scale` and `global_logit_bias` are
ignored.
"""

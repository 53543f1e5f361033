"""Our exports in transformers 4 and its PEFT, without this project; files that both write are kept in tests/golden."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

INPUT = Path(os.environ["PEER_INPUT"])
GOLDEN = Path(__file__).parents[2] / "golden"
KEPT = GOLDEN / "transformers4"


@pytest.fixture(params=["base", "pathflip2"])
def family(request):
    return request.param


def load(folder: Path):
    """The model of a folder, loaded with the folder's own code."""
    return transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def check_features(model, family: str) -> None:
    """Compare the model's features with those of the released code in the golden case."""
    with np.load(GOLDEN / family / "io.npz") as case:
        ids, mask = (torch.from_numpy(case[f"caption_{part}"]) for part in ("ids", "mask"))
        with torch.no_grad():
            found = model(torch.from_numpy(case["patches"]), None, ids, mask)
        np.testing.assert_allclose(found.slide_embeds, case["slide_features"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(found.text_embeds, case["caption_features"], rtol=0, atol=1e-4)


def test_auto_model_gives_the_released_features(family):
    check_features(load(INPUT / family), family)


def test_what_it_saves_again_is_the_same_model(family, tmp_path):
    model = load(INPUT / family)
    model.save_pretrained(tmp_path)
    check_features(load(tmp_path), family)


def test_auto_tokenizer_gives_the_ids_of_the_case(family):
    tokenizer = transformers.AutoTokenizer.from_pretrained(INPUT / family)
    captions = json.loads((GOLDEN / family / "meta.json").read_text())["captions"]
    with np.load(GOLDEN / family / "io.npz") as case:
        ids, mask = case["caption_ids"], case["caption_mask"].astype(bool)
    found = tokenizer(captions, truncation=True, max_length=ids.shape[1])["input_ids"]
    assert found == [row[there].tolist() for row, there in zip(ids, mask, strict=True)]


def logits(model) -> np.ndarray:
    """The logits of a decoder for the tokens of the case."""
    with np.load(INPUT / "decoder.npz") as case, torch.no_grad():
        return model(torch.from_numpy(case["tokens"]).long()).logits.float().numpy()


def decoder(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_decoder_and_adapter_give_our_logits():
    with np.load(INPUT / "decoder.npz") as case:
        np.testing.assert_allclose(logits(decoder(INPUT / "decoder")), case["plain"], rtol=0, atol=2e-5)
        adapted = peft.PeftModel.from_pretrained(decoder(INPUT / "decoder"), INPUT / "adapter").eval()
        np.testing.assert_allclose(logits(adapted), case["adapted"], rtol=0, atol=2e-5)
    assert np.abs(logits(adapted) - logits(decoder(INPUT / "decoder"))).max() > 0.01


def test_what_transformers_4_and_peft_write_is_kept(tmp_path):
    """Compare a decoder and an adapter as they save them, and their logits, with the golden files, or create these."""
    model = decoder(INPUT / "decoder")
    model.save_pretrained(tmp_path / "decoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(INPUT / "decoder" / name, tmp_path / "decoder")
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "decoder"}, indent=2))
    (tmp_path / "adapter" / "README.md").unlink()  # a model card without content
    with np.load(INPUT / "decoder.npz") as case:
        tokens, plain = case["tokens"], logits(decoder(tmp_path / "decoder"))
    expected = {"tokens": tokens, "plain": plain, "adapted": logits(adapted)}
    np.savez_compressed(tmp_path / "logits.npz", **expected)
    if not KEPT.exists():
        shutil.copytree(tmp_path, KEPT)
    for name in ("decoder/config.json", "adapter/adapter_config.json"):
        kept, found = (json.loads((folder / name).read_text()) for folder in (KEPT, tmp_path))
        kept, found = ({k: sorted(v) if k == "target_modules" else v for k, v in x.items()} for x in (kept, found))
        assert kept == found
    with np.load(KEPT / "logits.npz") as kept:
        np.testing.assert_allclose(kept["adapted"], expected["adapted"], rtol=0, atol=2e-5)

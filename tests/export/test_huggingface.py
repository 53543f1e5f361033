"""The folder for transformers: loaded by AutoModel with this package and, by remote code, without it; model card."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from pathflip_jax.convert import torch_model, torch_pathflip2  # noqa: E402
from pathflip_jax.convert.exported import read_exported  # noqa: E402
from pathflip_jax.data.texts.tokenizer import TextTokenizer  # noqa: E402
from pathflip_jax.export import from_released, huggingface  # noqa: E402
from pathflip_jax.model.config import PathFLIP2Config, PathFLIPConfig  # noqa: E402
from pathflip_jax.runs.folder import load_run  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
CODE = {"base": torch_model, "pathflip2": torch_pathflip2}
ARGUMENTS = {"num_heads": 4, "text_pooling_type": "mean", "lora_alpha": 12, "top_k": 6, "use_soft_topk": True}
FIGURE = {"value": 0.9, "low": 0.8, "high": 0.95}


@pytest.fixture(scope="module", params=CODE)
def family(request) -> str:
    """The parity cases: a PathFLIP, and a PathFLIP2 with the LoRA of its texts."""
    return request.param


@pytest.fixture(scope="module")
def run(family, tmp_path_factory) -> Path:
    """The released model of the case as a run folder."""
    folder = tmp_path_factory.mktemp("huggingface") / "released"
    two = {"arguments": ARGUMENTS, "keep_lora": True} if family == "pathflip2" else {}
    golden = GOLDEN / family
    from_released.convert(golden / "state_dict.safetensors", folder, bert_folder=golden / "bert", **two)
    return folder


@pytest.fixture(scope="module")
def exported(run) -> Path:
    """Its folder for transformers."""
    out = run.with_name("exported")
    huggingface.export_huggingface(run, out)
    return out


@pytest.fixture(scope="module")
def case(family):
    """Outputs of the released code for the case."""
    with np.load(GOLDEN / family / "io.npz") as archive:
        return {name: archive[name] for name in archive.files}


def test_auto_model_gives_the_released_features(family, exported, case):
    model, loading = transformers.AutoModel.from_pretrained(exported, output_loading_info=True)
    assert type(model).__module__ == CODE[family].__name__ and not model.training
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    ids, mask = (torch.from_numpy(case[f"caption_{part}"]) for part in ("ids", "mask"))
    with torch.no_grad():
        found = model(torch.from_numpy(case["patches"]), None, ids, mask)
    for ours, name in ((found.slide_embeds, "slide_features"), (found.text_embeds, "caption_features")):
        np.testing.assert_allclose(ours, case[name], rtol=0, atol=1e-4)
    if family == "base":
        np.testing.assert_allclose(found.region_embeds, case["region_features"], rtol=0, atol=1e-4)
        assert found.region_mask.all()
    else:
        np.testing.assert_allclose(found.patch_embeds, case["patch_features_local"], rtol=0, atol=1e-4)


def test_auto_model_finds_texts_in_slides(family, exported, case):
    model = transformers.AutoModel.from_pretrained(exported)
    ids, mask = (torch.from_numpy(case[f"subcaption_{part}"]).flatten(0, 1) for part in ("ids", "mask"))
    patches = torch.from_numpy(case["patches"])
    with torch.no_grad():
        if family == "base":
            found = model(patches, None, ids, mask)
            texts = found.text_embeds.unflatten(0, (3, 3))
            _, weights = model.text_region_attention(texts, found.region_embeds)
            np.testing.assert_allclose(weights, case["text_region_attention"], rtol=0, atol=1e-4)
        else:
            found = model(patches, None, ids, mask, level="region")
            texts = found.text_embeds.unflatten(0, (3, 3))
            pooled, weights = model.text_region(texts, found.patch_embeds)
            np.testing.assert_allclose(texts, case["subcaption_features"], rtol=0, atol=1e-4)
            np.testing.assert_allclose(pooled, case["text_conditioned_features"], rtol=0, atol=1e-4)
            np.testing.assert_allclose(weights, case["patch_weights"], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_auto_model_and_the_run_compute_the_same(family, run, exported, case):
    """To 1e-6 of the largest number, padding and all."""
    patches = case["patches"] if family == "base" else case["patches"][:, None]
    mask = np.ones(patches.shape[:3], bool)
    mask[0, -1, -2:] = False
    ours = load_run(run)[0].encode_slides(patches, mask)
    flat = (patches, mask) if family == "base" else (patches[:, 0], mask[:, 0])
    with torch.no_grad():
        theirs = transformers.AutoModel.from_pretrained(exported)(*map(torch.from_numpy, flat))
    np.testing.assert_allclose(theirs[0], ours.slide, rtol=0, atol=1e-6 * np.abs(ours.slide).max())
    there = theirs.region_mask.numpy() if family == "base" else mask[:, 0]
    parts, whole = np.asarray(ours.regions)[there], theirs[1].numpy()
    np.testing.assert_allclose(whole[there], parts, rtol=0, atol=1e-6 * np.abs(parts).max())
    assert not whole[~there].any()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_what_the_models_do_not_support_is_refused_by_name(exported):
    for way in ("sdpa", "flash_attention_2"):
        with pytest.raises(ValueError, match=r"PathFLIP2?Model does not support"):
            transformers.AutoModel.from_pretrained(exported, attn_implementation=way)
    with pytest.raises(ValueError, match=r"PathFLIP2?Model does not support \w+ checkpointing"):
        transformers.AutoModel.from_pretrained(exported).gradient_checkpointing_enable()


def test_half_an_input_gives_half_an_output(exported, case):
    model = transformers.AutoModel.from_pretrained(exported)
    found = model(input_ids=torch.from_numpy(case["caption_ids"]))
    assert found.slide_embeds is None and list(found) == ["text_embeds"]


def test_auto_tokenizer_gives_the_runs_ids(family, exported, run):
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    ours = TextTokenizer(run / "tokenizer")
    captions = json.loads((GOLDEN / family / "meta.json").read_text())["captions"]
    length = {"base": 384, "pathflip2": 512}[family]
    assert theirs(captions)["input_ids"] == [ids.tolist() for ids in ours.encode(captions, length)]
    assert theirs.model_max_length == length and theirs.pad_token_id == 0


def test_it_loads_in_torch_too_and_saves_itself(family, exported, tmp_path):
    """The same folder serves those who want torch alone; what transformers saves is the same folder again."""
    plain = CODE[family].load(exported)
    transformers.AutoModel.from_pretrained(exported).save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    before, after = plain.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    if family == "pathflip2":  # a setting that transformers would drop
        assert plain.top_k == again.top_k == CODE[family].load(tmp_path / "again").top_k == 6


def test_a_setting_under_the_name_that_transformers_keeps_is_compared_too(exported, tmp_path):
    values = json.loads((exported / "config.json").read_text())
    name = "region_top_k" if "region_top_k" in values else "heads"
    (tmp_path / "config.json").write_text(json.dumps(values | {name: 3}))
    with pytest.raises(ValueError, match=rf"contradicts .*{name.removeprefix('region_')} is 3 at the top level"):
        read_exported(tmp_path)


@pytest.mark.slow
def test_remote_code_needs_no_package(family, exported, tmp_path):
    script = f"""
import sys; sys.modules["jax"] = sys.modules["pathflip_jax"] = None
import numpy as np, torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(exported)!r}, trust_remote_code=True)
case = np.load({str(GOLDEN / family / "io.npz")!r})
with torch.no_grad():
    found = model(torch.from_numpy(case["patches"]), None, torch.from_numpy(case["caption_ids"]),
                  torch.from_numpy(case["caption_mask"]))
assert np.abs(found.slide_embeds.numpy() - case["slide_features"]).max() < 1e-4
assert np.abs(found.text_embeds.numpy() - case["caption_features"]).max() < 1e-4
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env=environment, cwd=tmp_path)


def scored(run: Path, folder: Path) -> Path:
    """Output of `pathflip evaluate`, as far as the card reads it."""
    content = {
        "runs": [str(run)], "command": [str(run)], "language": {"run": str(run)},
        "split": "test", "slides": 12, "patients": 11, "interval": "95%, bootstrap by patient",
        "warnings": ["2 patients of split 'test' have slides in other splits too"],
        "retrieval": {"slide_to_text": {"all": {"gallery": 12, "queries": 12, "R@1": FIGURE | {"chance": 0.083}}}},
        "zero_shot": {
            "task": "subtypes", "classes": {"A": 6, "B": 6},
            "metrics": {"balanced_accuracy": FIGURE | {"chance": 0.5, "majority": 0.5}, "auc": FIGURE,
                        "weighted_f1": FIGURE},
        },
        "grounding": {"auc": FIGURE | {"chance": 0.5, "mean_colour": {"value": 0.61, "low": 0.5, "high": 0.7}}},
    }  # fmt: skip
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


def test_the_card_shows_scores_baselines_and_warnings(family, run, tmp_path):
    huggingface.export_huggingface(run, tmp_path / "out", scores=scored(run, tmp_path / "scores"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Retrieval, slide to text, R@1 of 12 | 0.900 | 0.800 to 0.950 | chance 0.083 |" in card
    assert (
        "| Zero-shot subtypes, 2 classes, balanced_accuracy | 0.900 | 0.800 to 0.950 | chance 0.500, majority" in card
    )
    assert set(json.loads((tmp_path / "out" / "scores.json").read_text())) == {
        "split", "slides", "patients", "interval", "warnings", "retrieval", "zero_shot", "grounding",
    }  # fmt: skip
    assert "mean colour 0.610" in card and "> 2 patients of split" in card and "12 slides of 11 patients" in card
    assert "**For research use only.**" in card and "state_dict.safetensors" in card and str(tmp_path) not in card
    two = family == "pathflip2"
    assert ("torch_pathflip2" in card) == ("patch_embeds" in card) == ("# PathFLIP2: slides" in card) == two
    assert ("torch_model" in card) == ("R groups of up to S patches" in card) == (not two) and "{" not in card


def test_the_card_names_encoder_and_licence():
    data = {
        "encoder": "conch_v15",
        "records": "/secret/lab/records",
        "edge_um": 2048.0,
        "hashes": {"records": "ab" * 32},
    }
    settings = {"data": data, "train": {"steps": 100, "batch_size": 16, "seed": 3}}
    card = huggingface.card(PathFLIPConfig(), settings, None)
    link = "[MahmoodLab/conchv1_5](https://huggingface.co/MahmoodLab/conchv1_5)"
    assert f"conch_v15 ({link}), 512 features per patch" in card and "CC-BY-NC-ND-4.0" in card
    assert "Recipe of the features" not in card  # nothing is known of it
    assert "`records`, hash `abababababababab`" in card and "secret" not in card and "100 of 16 slides, seed 3" in card
    assert "not known here" in huggingface.card(PathFLIPConfig(), {"data": {"encoder": "ours"}}, None)
    assert "512 features per patch" in huggingface.card(PathFLIP2Config(), settings, None)
    assert "MIT" in huggingface.card(PathFLIPConfig(), {"data": {"encoder": "ours"}}, None, "MIT")


def test_the_card_says_how_the_features_were_made():
    transform = {"resize": 224, "crop": 224, "filter": "bicubic", "mean": [0.5, 0.5, 0.5]}
    recipe = {"weights": "34cd" * 16, "transform": transform, "pooling": "class", "patch_size": 256, "mpp": 0.5}
    data = {"encoder": "hf:phikon", "recipe": recipe | {"precision": "bfloat16"}}
    card = huggingface.card(PathFLIPConfig(), {"data": data}, None)
    assert (
        f"- **Recipe of the features**: weights with SHA-256 `{'34cd' * 16}`; patches of 256 px at 0.5 um per px; "
        "resize 224, crop 224, filter bicubic, mean 0.5 0.5 0.5; pooling class; computed in bfloat16.\n"
    ) in card
    assert "Licence of the patch encoder**: Owkin non-commercial. " in card


def test_the_card_tells_about_the_training_data_or_asks_for_it(run, tmp_path):
    data = {"data": {"records": "records", "encoder": "uni"}}
    asked = huggingface.card(PathFLIPConfig(), data, None)
    told = huggingface.card(PathFLIPConfig(), data, None, about="Biopsies of 12 patients, CC BY 4.0.")
    line = "describe it here before you share the model"
    assert line in asked and line not in told and "Biopsies of 12 patients, CC BY 4.0." in told
    about = tmp_path / "about.md"
    for content, match in ((None, "no such file"), (b" \n", "empty; describe"), (b"\xff\xfe", "not a text file")):
        if content is not None:
            about.write_bytes(content)
        with pytest.raises((FileNotFoundError, ValueError), match=rf"about\.md: {match}"):
            huggingface.export_huggingface(run, tmp_path / "out", about=about)
        assert not (tmp_path / "out").exists()


def test_scores_of_another_run_are_refused(run, tmp_path):
    folder = scored(tmp_path / "other", tmp_path / "scores")
    with pytest.raises(ValueError, match=r"scores\.json: scores of other, not of released alone"):
        huggingface.export_huggingface(run, tmp_path / "out", scores=folder)
    with pytest.raises(FileNotFoundError, match="give the --out of `pathflip evaluate`"):
        huggingface.export_huggingface(run, tmp_path / "out", scores=tmp_path)
    assert not (tmp_path / "out").exists()

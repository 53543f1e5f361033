"""A checkpoint of the released finetune stage becomes a run that generates the same text as transformers and PEFT."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax import cli
from pathflip_jax.convert.checkpoint_files import read_checkpoint
from pathflip_jax.inference.assistant import load_assistant
from pathflip_jax.llm.tokenizer import train_bpe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BASE = Path(__file__).parents[1] / "golden" / "base"
TARGETS = ["k_proj", "v_proj", "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REPORTS = ["Glands infiltrate the stroma, and necrosis is extensive.", "Fat is seen at the edge of the tissue."] * 8


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Decoder folder, the language model with LoRA, projector, and what the released code saves of all that learns."""
    folder = tmp_path_factory.mktemp("finetune")
    train_bpe(REPORTS, folder / "decoder", 300)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "decoder")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "decoder", dtype=torch.float32)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS)
    model = peft.get_peft_model(model, lora).eval()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    aligner = read_checkpoint(BASE / "state_dict.safetensors")
    width = aligner["path_proj.weight"].shape[0]
    projector = torch.nn.Linear(width, config.hidden_size)
    state = {name: torch.from_numpy(x.copy()) for name, x in aligner.items() if not name.startswith("fg_head.")}
    del state["logit_scale"]
    state |= {f"path_proj_llm.{name}": x.detach() for name, x in projector.named_parameters()}
    learned = {f"llm_model.{name}": x.detach() for name, x in model.named_parameters() if x.requires_grad}
    state = {f"pathflip_finetune.{name}": x for name, x in (state | learned).items()}
    torch.save({"state_dict": state, "epoch": 1}, folder / "epoch1.ckpt")
    return folder, model, projector, width


@pytest.fixture(scope="module")
def run(released):
    folder = released[0]
    command = ["convert", str(folder / "epoch1.ckpt"), "--bert", str(BASE / "bert"), "--decoder"]
    heads = json.loads((BASE / "meta.json").read_text())["config"]["heads"]
    command += [str(folder / "decoder"), "--heads", str(heads), "--out", str(folder / "run")]
    assert cli.main(command) == 0
    return folder / "run"


def test_the_run_gives_pefts_own_logits_behind_the_projector(released, run):
    _, model, projector, width = released
    assistant = load_assistant(run, dtype="float32")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 5, width)).astype(np.float32)
    with torch.no_grad():
        soft = projector(torch.from_numpy(rows))
        expected = model(inputs_embeds=soft).logits.numpy()
    ours = assistant.model.project(jnp.asarray(rows))
    np.testing.assert_allclose(ours, soft.numpy(), atol=1e-5)
    logits = jax.jit(lambda x: assistant.model.decoder(inputs_embeds=x)[0])(ours)
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_slides_are_embedded_as_the_alignment_model_embeds_them(run):
    with np.load(BASE / "io.npz") as archive:
        case = dict(archive)
    from pathflip_jax.inference.load import load

    model = load(run / "aligner").model
    B, R, S, _ = case["patches"].shape
    found = jax.jit(model.encode_slides)(case["patches"], np.ones((B, R, S), bool))
    np.testing.assert_allclose(found.slide, case["slide_features"], atol=1e-4)
    np.testing.assert_allclose(found.regions, case["region_features"], atol=1e-4)
    rows = (run / "tensors.csv").read_text()
    assert "path_proj_llm.weight" in rows and "fg_head" in rows.split("filled")[0]


def test_another_language_model_and_other_stages_are_refused(released, run, tmp_path, capsys):
    folder = released[0]
    given = ["--bert", str(BASE / "bert"), "--out", str(tmp_path / "out")]
    other = Path(shutil.copytree(folder / "decoder", tmp_path / "other"))
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"hidden_size": 64}))
    for command, words in (
        (["convert", str(folder / "epoch1.ckpt"), *given, "--decoder", str(other)], "language model of width 64"),
        (["convert", str(folder / "epoch1.ckpt"), *given], "--decoder FOLDER"),
        (["convert", str(BASE / "state_dict.safetensors"), *given, "--decoder", str(other)], "without --decoder"),
    ):
        assert cli.main(command) == 2
        assert words in capsys.readouterr().err
    (other / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
    assert cli.main(["convert", str(folder / "epoch1.ckpt"), *given, "--decoder", str(other)]) == 2
    assert "does not fit a language model of 3 layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

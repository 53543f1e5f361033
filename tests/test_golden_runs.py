"""Golden runs: output of every released version is read by this one, to the same numbers (tests/golden/runs)."""

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from pathflip_jax import cli
from pathflip_jax.convert import versions
from pathflip_jax.convert.decoder import load_decoder
from pathflip_jax.convert.lora import load_peft, merge
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage import json_files
from pathflip_jax.inference import assistant as assistants
from pathflip_jax.inference import load
from pathflip_jax.inference.embed import checkpoint_hash
from pathflip_jax.inference.embedding_files import open_embeddings
from pathflip_jax.inference.language_run import read_trained
from pathflip_jax.llm.prompts import Prompted, insert_slide
from pathflip_jax.model import versions as model_versions
from pathflip_jax.model.parameters import flatten
from pathflip_jax.monitoring.metrics import read_metrics
from pathflip_jax.settings import kinds
from pathflip_jax.training import loop

RUNS = Path(__file__).parent / "golden" / "runs"
RELEASED = sorted(path for path in RUNS.iterdir() if path.is_dir())
ALIGNMENT = ("pathflip", "pathflip2")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # processors differ in the last bits
LIKELY = 1e-5  # likelihoods of answers; another slide changes them by more


@pytest.fixture(scope="module", params=RELEASED, ids=lambda path: path.name)
def golden(request):
    """The folder of a released version, and the numbers that it had."""
    return request.param, dict(np.load(request.param / "expected.npz"))


@pytest.fixture(scope="module")
def predictors(golden):
    return {name: load.load(golden[0] / name, which="latest") for name in ALIGNMENT}


@pytest.fixture(scope="module")
def assistant(golden):
    """The language run; aligner and decoder, which lie elsewhere now, are known by their hashes."""
    places = {"decoder": str(golden[0] / "decoder"), "aligner": str(golden[0] / "pathflip")}
    return assistants.load_assistant(golden[0] / "language", which="latest", **places)


@pytest.fixture
def copy(golden, tmp_path, monkeypatch):
    """A copy that a test may write into, as the working folder: paths in it are relative."""
    shutil.copytree(golden[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def own_model(folder, monkeypatch):
    """The model of a PyTorch export by the module that came with it, which transformers does not get to know."""
    transformers = pytest.importorskip("transformers")
    for known in (transformers.AutoConfig, transformers.AutoModel):
        monkeypatch.setattr(known, "register", lambda *names, **options: None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (path,) = folder.glob("torch_*.py")
    spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module.load(folder)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_what_a_setting_added_since_meant_before_is_stated(golden):
    for run in (*ALIGNMENT, "language"):
        config = json.loads((golden[0] / run / "config.json").read_text())
        assert not versions.unknown_settings(config), "a setting was taken away or renamed: old runs still have it"
        known = kinds.fields(kinds.kind_of(config))
        lacking = [key for key in known if key.partition(".")[2] not in config[key.partition(".")[0]]]
        assert not set(lacking) - model_versions.LEGACY_VALUES.keys(), "state as `before` what runs without it did"


@pytest.mark.parametrize("run", ALIGNMENT)
def test_a_run_embeds_slides_and_texts_as_it_did(golden, predictors, run):
    folder, expected = golden
    records = Records(folder / "records")
    found = list(predictors[run].encode_slides(records.read(number) for number in range(len(records.slides))))
    np.testing.assert_allclose([x.slide for x in found], expected[f"{run}/slides"], **CLOSE)
    np.testing.assert_allclose([x.regions for x in found], expected[f"{run}/regions"], **CLOSE)
    texts = predictors[run].encode_texts(expected["texts"].tolist())
    np.testing.assert_allclose(texts.slide, expected[f"{run}/texts"], **CLOSE)
    np.testing.assert_allclose(texts.region, expected[f"{run}/region_texts"], **CLOSE)


def test_a_file_of_embeddings_is_read_and_still_that_of_its_run(golden, predictors):
    folder, expected = golden
    table, about = open_embeddings(folder / "embeddings.parquet")
    np.testing.assert_allclose(np.stack(table["embedding"].to_numpy()), expected["pathflip/slides"], **CLOSE)
    assert about["checkpoint_hash"] == checkpoint_hash(predictors["pathflip"])


@pytest.mark.parametrize("export", [f"{run}_{kind}" for run in ALIGNMENT for kind in ("pytorch", "huggingface")])
def test_an_export_is_the_run_that_it_was(golden, predictors, caplog, export):
    found, run = load.load(golden[0] / export), export.partition("_")[0]
    same(flatten(found.model), flatten(predictors[run].model))
    assert found.model.config == predictors[run].model.config and not caplog.records
    assert found.config["data"]["edge_um"] == predictors[run].config["data"]["edge_um"]


@pytest.mark.parametrize("kind", ["pytorch", "huggingface"])
@pytest.mark.parametrize("run", ALIGNMENT)
def test_an_export_computes_in_pytorch_what_its_run_did(golden, predictors, monkeypatch, run, kind):
    """By its own module, and by transformers with the package's classes."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from pathflip_jax.convert import torch_model, torch_pathflip2  # noqa: F401 - makes both known to AutoModel

    folder, expected = golden[0] / f"{run}_{kind}", golden[1]
    auto = transformers.AutoModel.from_pretrained
    model = own_model(folder, monkeypatch) if kind == "pytorch" else auto(folder).eval()
    records = Records(golden[0] / "records")
    slides = [records.read(number) for number in range(len(records.slides))]
    patches = np.stack([slide.features[predictors[run].bag(slide).slots] for slide in slides])  # every slot holds one
    patches = torch.from_numpy(np.float32(patches if run == "pathflip" else patches[:, :, 0]))
    words = transformers.AutoTokenizer.from_pretrained(folder / "bert" if kind == "pytorch" else folder)
    ids = words(expected["texts"].tolist(), padding=True, return_tensors="pt")
    with torch.no_grad():
        slide, regions, *_ = model.encode_slides(patches)
        levels = [{}] if run == "pathflip" else [{"level": "slide"}, {"level": "region"}]
        texts = [model.encode_texts(ids.input_ids, ids.attention_mask, **level) for level in levels]
    np.testing.assert_allclose(slide, expected[f"{run}/slides"], **CLOSE)
    np.testing.assert_allclose(regions, expected[f"{run}/regions"], **CLOSE)
    np.testing.assert_allclose(texts[0], expected[f"{run}/texts"], **CLOSE)
    np.testing.assert_allclose(texts[-1], expected[f"{run}/region_texts"], **CLOSE)


def test_the_adapter_of_a_language_run_is_what_it_was(golden):
    folder, _ = golden
    trained, (adapter, lora) = read_trained(folder / "language")[2], load_peft(folder / "language_peft")
    assert lora.rank == 2 and set(lora.targets) == {"q_proj", "down_proj"}
    same(
        {f"decoder/{name}": value for name, value in adapter.items()}, {n: x for n, x in trained.items() if "lora" in n}
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peft", "huggingface"])
def test_an_export_of_a_language_run_is_the_run_that_it_was(golden, assistant, tmp_path, kind):
    """The adapter on its decoder to the bit; of a whole decoder, in which it was merged, the projector."""
    folder, run = golden[0], str(tmp_path / "run")
    decoder = [f"--decoder={folder / 'decoder'}"] if kind == "peft" else []
    assert cli.main(["convert", str(folder / f"language_{kind}"), *decoder, "--out", run]) == 0
    trained = read_trained(folder / "language", "latest")[2]
    parts = ("decoder/", "projector/") if kind == "peft" else ("projector/",)
    same(read_trained(run)[2], {name: x for name, x in trained.items() if name.startswith(parts)})
    if kind == "huggingface":
        whole, ours = flatten(load_decoder(folder / "language_huggingface")), assistant.model.decoder
        expected = merge(flatten(ours), ours.lora)
        assert whole.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(whole[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_a_language_run_finds_answers_as_likely_as_it_did(golden, assistant):
    folder, expected = golden
    records = Records(folder / "records")
    slides = [*assistant.embed_slides([records.read(0), records.read(1)]), None]
    prompts = [assistant.prompt(str(expected["language/question"]), slide) for slide in slides]
    likely = assistant.choose(prompts, [expected["language/answers"].tolist()] * len(slides))
    np.testing.assert_allclose(likely, expected["language/likelihoods"], rtol=LIKELY)


@pytest.mark.slow
def test_the_export_of_a_language_run_finds_answers_as_likely_in_transformers(golden, assistant):
    """The whole decoder, before it the slide as the exported projector puts it into words."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, expected = golden[0] / "language_huggingface", golden[1]
    decoder = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    projector = safetensors.numpy.load_file(folder / "projector.safetensors")
    found = []
    for number in (0, 1, None):
        shown = [] if number is None else [expected["pathflip/slides"][number], *expected["pathflip/regions"][number]]
        asked = assistant.prompt(str(expected["language/question"]), None).tokens
        tokens = insert_slide(Prompted(asked, np.zeros(len(asked), bool)), len(shown)).tokens
        for text in expected["language/answers"].tolist():
            answer = torch.tensor([*assistant.tokenizer.text_ids(text), assistant.stop_ids[0]])
            with torch.no_grad():
                words = decoder.get_input_embeddings()(torch.cat([torch.tensor(tokens).clamp(min=0), answer]))
                for place, row in zip(np.flatnonzero(tokens < 0), shown, strict=True):
                    words[place] = torch.from_numpy(projector["weight"] @ row + projector["bias"])
                logits = decoder(inputs_embeds=words[None]).logits[0, len(tokens) - 1 : -1].log_softmax(-1)
            found.append(float(logits[torch.arange(len(answer)), answer].sum()))
    np.testing.assert_allclose(np.reshape(found, (3, 2)), expected["language/likelihoods"], rtol=LIKELY)


@pytest.mark.slow
def test_a_language_run_answers_in_the_words_that_it_did(golden, monkeypatch, capsys):
    """The likeliest tokens, by the best checkpoint; they stay the same where weights change in the fourth digit."""
    folder, expected = golden
    written, generate = [], assistants.generate
    monkeypatch.setattr(
        assistants, "generate", lambda *given, **more: written.append(generate(*given, **more)) or written[-1]
    )
    monkeypatch.chdir(folder)
    assert cli.main(json.loads((folder / "commands.json").read_text())["ask"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == expected["language/text"]
    np.testing.assert_array_equal(written[0].tokens[0, : written[0].lengths[0]], expected["language/tokens"])


@pytest.mark.slow
@pytest.mark.parametrize("run", [*ALIGNMENT, "language"])
def test_a_run_goes_on_to_the_loss_of_one_that_never_stopped(golden, copy, caplog, run):
    command = json.loads((copy / "commands.json").read_text())[run]
    before = json_files.read_json(copy / run / "config.json")
    assert loop.main([*command, f"--workdir={run}"]) == 0
    losses = [row["loss"] for row in read_metrics(copy / run / "metrics.jsonl")]
    np.testing.assert_allclose(losses, golden[1][f"{run}/losses"], rtol=1e-3)
    assert json_files.read_json(copy / run / "config.json") == before
    assert not [x for x in caplog.records if x.levelno > logging.WARNING]

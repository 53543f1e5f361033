"""Golden runs: what every released version wrote is read by this one, to the same numbers (tests/golden/runs)."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from pathflip_jax import checkpoint, inference, settings, train, versions
from pathflip_jax.convert.language import convert_language
from pathflip_jax.data.records import Records
from pathflip_jax.embed import checkpoint_hash, open_embeddings
from pathflip_jax.llm.assistant import load_assistant
from pathflip_jax.llm.lora import load_peft
from pathflip_jax.llm.training import assemble, read_trained
from pathflip_jax.metrics import read_metrics
from pathflip_jax.model.parameters import flatten

RUNS = Path(__file__).parent / "golden" / "runs"
RELEASED = sorted(path for path in RUNS.iterdir() if path.is_dir())
ALIGNMENT = ("pathflip", "pathflip2")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # processors differ in the last bits


@pytest.fixture(scope="module", params=RELEASED, ids=lambda path: path.name)
def golden(request):
    """The folder of a released version, and the numbers that it had."""
    return request.param, dict(np.load(request.param / "expected.npz"))


@pytest.fixture(scope="module")
def predictors(golden):
    return {name: inference.load(golden[0] / name, which="latest") for name in ALIGNMENT}


@pytest.fixture
def copy(golden, tmp_path, monkeypatch):
    """A copy that a test may write into, as the working folder: paths in it are relative."""
    shutil.copytree(golden[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_what_a_setting_added_since_meant_before_is_stated(golden):
    for run in (*ALIGNMENT, "language"):
        config = json.loads((golden[0] / run / "config.json").read_text())
        assert not versions.unknown_settings(config), "a setting was taken away or renamed: old runs still have it"
        known = settings.defaults(settings.kind_of(config))
        lacking = [key for key in known if key.partition(".")[2] not in config[key.partition(".")[0]]]
        assert not set(lacking) - versions.BEFORE.keys(), "state in versions.BEFORE what runs without it did"


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


@pytest.mark.parametrize("export", ["pathflip_pytorch", "pathflip_huggingface", "pathflip2_huggingface"])
def test_an_export_is_the_run_that_it_was(golden, predictors, caplog, export):
    found, run = inference.load(golden[0] / export), export.partition("_")[0]
    same(flatten(found.model), flatten(predictors[run].model))
    assert found.model.config == predictors[run].model.config and not caplog.records
    assert found.config["data"]["edge_um"] == predictors[run].config["data"]["edge_um"]


def test_the_adapter_of_a_language_run_is_what_it_was(golden):
    folder, _ = golden
    trained, (adapter, lora) = read_trained(folder / "language")[2], load_peft(folder / "language_peft")
    assert lora.rank == 2 and set(lora.targets) == {"q_proj", "down_proj"}
    same(
        {f"decoder/{name}": value for name, value in adapter.items()}, {n: x for n, x in trained.items() if "lora" in n}
    )


@pytest.mark.slow
def test_the_export_of_a_language_run_is_the_run_that_it_was(golden, tmp_path):
    folder, _ = golden
    assemble(folder / "language", decoder=str(folder / "decoder"), aligner=str(folder / "pathflip"))  # by their hashes
    convert_language(folder / "language_peft", tmp_path / "run", decoder_folder=folder / "decoder")
    same(read_trained(tmp_path / "run")[2], read_trained(folder / "language", "latest")[2])


@pytest.mark.slow
def test_a_language_run_finds_answers_as_likely_as_it_did(golden):
    folder, expected = golden
    places = {"decoder": str(folder / "decoder"), "aligner": str(folder / "pathflip")}
    assistant = load_assistant(folder / "language", which="latest", **places)
    records = Records(folder / "records")
    slides = assistant.embed_slides([records.read(0), records.read(1)])
    prompts = [assistant.prompt("Is necrosis present?", slide) for slide in slides]
    likely = assistant.choose(prompts, [["Necrosis is extensive.", "No mucin is present."]] * 2)
    np.testing.assert_allclose(likely, expected["language/likelihoods"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("run", [*ALIGNMENT, "language"])
def test_a_run_goes_on_to_the_loss_of_one_that_never_stopped(golden, copy, caplog, run):
    command = json.loads((copy / "commands.json").read_text())[run]
    before = checkpoint.read_json(copy / run / "config.json")
    assert train.main([*command, f"--workdir={run}"]) == 0
    losses = [row["loss"] for row in read_metrics(copy / run / "metrics.jsonl")]
    np.testing.assert_allclose(losses, golden[1][f"{run}/losses"], rtol=1e-3)
    assert checkpoint.read_json(copy / run / "config.json") == before
    assert not [x for x in caplog.records if x.levelno > logging.WARNING]

"""Round trips of language runs as an adapter or a whole decoder; their exports stop at the same tokens."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from pathflip_jax import cli
from pathflip_jax.convert.decoder import init_decoder, save_decoder
from pathflip_jax.convert.exported import without_paths
from pathflip_jax.convert.lora import merge
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.export.from_language_export import AlignerParts, write_language_run
from pathflip_jax.inference.assistant import SlideAssistant, is_language_run
from pathflip_jax.inference.language_run import assemble
from pathflip_jax.inference.load import load
from pathflip_jax.llm.config import DecoderConfig, LoRAConfig
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.llm.shape import Shape
from pathflip_jax.llm.tokenizer import train_bpe
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import abstract_params, flatten, unflatten
from pathflip_jax.training import settings
from pathflip_jax.training.language_objective import language_stage

BERT = Path(__file__).parents[1] / "golden" / "base" / "bert"
REPORTS = ["Glands infiltrate the stroma, and necrosis is extensive.", "Fat is seen at the edge of the tissue."] * 8
ALIGNER = PathFLIPConfig(
    feature_dim=7, embed_dim=12, hidden=15, heads=5, layers=2, intermediate=9, vocab_size=301, max_positions=50,
    num_queries=3, cross_attention_freq=1, region_layers=1, region_heads=3, text_region_heads=2, dropout=0.0,
)  # fmt: skip
TIED = DecoderConfig(
    family="qwen3", vocab_size=320, width=24, layers=2, heads=3, kv_heads=1, head_dim=10, intermediate=20,
    max_positions=256, rope_theta=1e4, norm_eps=1e-6, tied=True, query_norm=True,
)  # fmt: skip
UNTIED = dataclasses.replace(TIED, family="llama", tied=False, query_norm=False, head_dim=8)
LORA = LoRAConfig(rank=3, alpha=5.0, dropout=0.1, targets=("v_proj", "q_proj", "down_proj"))
DATA = {"encoder": "conch_v15", "cut": "grid", "edge_um": 1000.0, "edge_px": None, "template": "plain"}
ENDS = {"stop": "</s>", "generation": {"temperature": 0.6, "do_sample": True}}


def draw(shapes, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {n: random.normal(0, 0.3, x.shape).astype(np.float32) for n, x in shapes.items()}


@pytest.fixture(scope="module")
def aligner() -> AlignerParts:
    model = unflatten(ALIGNER, draw(abstract_params(ALIGNER), 0))
    return AlignerParts(model, {"data": DATA | {"caption_length": 48}}, TextTokenizer(BERT))


@pytest.fixture(scope="module")
def make_run(aligner, tmp_path_factory):
    """make_run(decoder config, what it trained) is a run of the language stage of random parameters."""

    def make(config: DecoderConfig, trains: str) -> Path:
        top = tmp_path_factory.mktemp("language")
        save_decoder(init_decoder(config, 1), top / "decoder")
        train_bpe(REPORTS, top / "decoder", 300)
        (top / "decoder" / "generation_config.json").write_text(json.dumps(ENDS["generation"]))
        shape = Shape(ALIGNER, config, LORA if "lora" in trains else None, "float32")
        trainable = language_stage(tuple(trains.split(","))).trainable
        wanted = {name: x for name, x in shape.abstract(trainable).items() if trainable(name)}
        found = settings.load_config("lm_joint").to_dict()
        found["data"] |= DATA | {"records": "/secret/records", "texts": "/secret/a.jsonl*2,/secret/b.csv"}
        found["lm"] |= {"trains": trains, "random_decoder": "decoder" in trains, "dtype": "float32"}
        write_language_run(top / "run", aligner, shape, draw(wanted, 2), found, top / "decoder", [])
        return top / "run"

    return make


def go(command: list, code: int = 0) -> None:
    assert cli.main([str(part) for part in command]) == code


def there_and_back(run: Path, way: str, *more) -> tuple[Path, Path]:
    out, back = run.parent / f"out-{way}", run.parent / f"back-{way}"
    go(["export", run, "--to", way, "--out", out])
    go(["convert", out, "--out", back, *more])
    return out, back


def same(one, other) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]), err_msg=name)


def settings_of(run: Path) -> dict:
    found = without_paths(json.loads((run / "config.json").read_text()))
    hashes = ("aligner_hash", "decoder_hash", "start_hash")  # of where it stands, which is elsewhere
    return found | {"lm": {name: x for name, x in found["lm"].items() if name not in hashes}}


@pytest.mark.slow
def test_an_adapter_comes_back_to_the_bit(make_run):
    run = make_run(UNTIED, "aligner,projector,lora")
    out, back = there_and_back(run, "peft")
    (ours, _, words), (theirs, _, again), (direct, _, _) = assemble(run), assemble(back), assemble(out)
    same(flatten(ours), flatten(theirs))
    same(flatten(ours), flatten(direct))
    assert theirs.decoder.lora == ours.decoder.lora and words.stop_ids == again.stop_ids
    assert settings_of(run) == settings_of(back) and "/secret" not in (out / "pathflip_language.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "trains"),
    [(TIED, "aligner,projector,lora"), (UNTIED, "projector,decoder")],
    ids=["merged", "scratch"],
)
def test_a_whole_decoder_comes_back_with_its_answers(make_run, capsys, config, trains):
    """The adapter merged: the same projector and aligner, logits to 1e-5, the same tokens written."""
    run = make_run(config, trains)
    out, back = there_and_back(run, "huggingface")
    said = capsys.readouterr().out
    assert ("the adapter (rank 3, alpha 5 at down_proj, q_proj, v_proj) was merged" in said) == ("lora" in trains)
    (ours, config, words), (theirs, again, _) = assemble(run), assemble(back)
    whole = flatten(ours.decoder)
    same(merge(whole, LORA) if ours.decoder.lora else whole, flatten(theirs.decoder))
    same(flatten(ours.aligner), flatten(theirs.aligner))
    same(flatten(ours.projector), flatten(theirs.projector))
    kept, found = settings_of(run), settings_of(back)
    assert found.pop("lm") | {"trains": trains, "random_decoder": kept["lm"]["random_decoder"]} == kept.pop("lm")
    assert found == kept
    assistants = [SlideAssistant(model, s, words) for model, s in ((ours, config), (theirs, again))]
    rows = np.random.default_rng(3).normal(size=(4, 12)).astype(np.float32)
    logits = [a.model.decoder(inputs_embeds=a.model.project(rows[None]))[0] for a in assistants]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
    one, other = (a.caption([rows], Sampling(max_new_tokens=8)) for a in assistants)
    assert one == other and assistants[0].stop_ids == assistants[1].stop_ids
    transformers = pytest.importorskip("transformers")
    ends = transformers.GenerationConfig.from_pretrained(out)
    assert (ends.eos_token_id, ends.pad_token_id) == (list(assistants[0].stop_ids), words.pad_id)
    assert (ends.temperature, ends.do_sample) == (0.6, True)  # what the decoder's own folder says else
    assert (out / "tokenizer.json").is_file() and (out / "tokenizer_config.json").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # in huggingface_hub's uploads
def test_a_pushed_run_is_read_from_the_hub(make_run, hub):
    run, place = make_run(TIED, "aligner,projector,lora"), "hf://lab/reports"
    go(["push", run, "lab/reports"])
    assert is_language_run(place)
    (ours, _, words), (theirs, config, again) = assemble(run), assemble(place)
    same(merge(flatten(ours.decoder), LORA), flatten(theirs.decoder))
    same(flatten(ours.aligner), flatten(theirs.aligner))
    same(flatten(ours.projector), flatten(theirs.projector))
    assert words.stop_ids == again.stop_ids and config["lm"]["random_decoder"] is False
    repo = hub.repos["lab/reports"]
    card = repo.commits[repo.branches["main"]]["README.md"].decode()
    assert "research use only" in card and "aligner,projector,lora (LoRA of rank" in card and "/secret" not in card
    with pytest.raises(ValueError, match="an export of a language run, for `pathflip caption`"):
        load(place)


@pytest.fixture(scope="module")
def adapter(make_run) -> tuple[Path, Path]:
    run = make_run(TIED, "projector,lora")
    go(["export", run, "--to", "peft", "--out", run.parent / "out"])
    return run, run.parent / "out"


@pytest.mark.slow
def test_an_adapter_alone_or_on_another_decoder_is_refused(adapter, tmp_path, capsys):
    run, out = adapter
    ends = json.loads((out / "generation_config.json").read_text())
    assert ends["eos_token_id"] == [0] and ends["pad_token_id"] == 0
    assert {p.name for p in (out / "aligner").iterdir()} >= {"config.json", "model.safetensors", "bert"}
    save_decoder(init_decoder(TIED, 9), tmp_path / "other")
    go(["convert", out, "--decoder", tmp_path / "other", "--out", tmp_path / "back"], 2)
    assert "was trained on another decoder than" in capsys.readouterr().err
    go(["convert", out, "--heads", 4, "--out", tmp_path / "back"], 2)
    assert "pass no option but --decoder" in capsys.readouterr().err
    go(["export", run, "--to", "peft", "--decoder", tmp_path / "other", "--out", tmp_path / "out"], 2)
    assert "name the folder of the weights" in capsys.readouterr().err
    about = out / "pathflip_language.json"
    kept = about.read_text()
    about.write_text(kept.replace('"alpha": 5.0', '"alpha": 7.0'))
    go(["convert", out, "--out", tmp_path / "back"], 2)
    assert "its adapter is rank 3, alpha 5 at" in capsys.readouterr().err
    about.unlink()
    go(["convert", out, "--out", tmp_path / "back"], 2)
    assert "a PEFT adapter without projector and aligner" in capsys.readouterr().err
    about.write_text(kept)
    assert not (tmp_path / "back").exists() and not (tmp_path / "out").exists()


def test_the_ends_of_a_chat_are_those_of_the_export(tmp_path):
    """A template's end of turn, which none of a base model's settings names, stops the exported decoder too."""
    from pathflip_jax.export.decoder import write_generation
    from pathflip_jax.llm.prompts import stop_ids
    from pathflip_jax.llm.tokenizer import DecoderTokenizer

    folder = tmp_path / "chat"
    train_bpe(REPORTS, folder, 300)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    end = {"id": 300, "content": "<|im_end|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append(end | flags)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    words = DecoderTokenizer(folder)
    write_generation(tmp_path, words, "chat")
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found["eos_token_id"] == list(stop_ids(words, "chat")) == [0, words.ids("<|im_end|>")[0]]

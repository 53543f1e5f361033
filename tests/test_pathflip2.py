"""The follow-up network from records to scores by the commands that PathFLIP has, without a word changed."""

import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from pathflip_jax import cli
from pathflip_jax.convert import checkpoint_files, pytorch, released
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.grounding import maps
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.model.parameters import flatten
from pathflip_jax.viewer.grounder import Grounder
from pathflip_jax.viewer.search import Search
from pathflip_jax.viewer.slides import list_slides

GOLDEN = Path(__file__).parent / "golden" / "pathflip2"
ARGUMENTS = {"num_heads": 4, "text_pooling_type": "mean", "lora_alpha": 12, "top_k": 6, "use_soft_topk": True}
TEXTS = ["Glands infiltrate the stroma.", "Fat is seen at the edge.", "Necrosis is extensive, and no mucin is present."]


@pytest.fixture(scope="module")
def run(tiny_cohort, tmp_path_factory) -> Path:
    """A run of four steps, in two parts each."""
    folder = tmp_path_factory.mktemp("pathflip2") / "run"
    options = ["train", "--config", "pathflip2:smoke", *tiny_cohort.settings(), "--workdir", str(folder)]
    options += ["--config.train.batch_size=6", "--config.model.text_lora_rank=2", "--config.loss.slides_at_once=4"]
    options += ["--config.model.layers=1"]
    assert cli.main([*options, "--config.train.steps=4", "--config.train.accumulate=2"]) == 0
    return folder


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return load(run)


@pytest.fixture(scope="module")
def slide(tiny_cohort):
    return Records(tiny_cohort.records).read(0)


def test_a_run_learns_all_but_the_words_that_lora_adapts(run, predictor):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(np.isfinite(row["loss"]) for row in rows)
    assert {"loss_slide", "loss_region", "cosine_positive", "val/mean_reciprocal_rank"} <= set(rows[-1])
    config = json.loads((run / "model.json").read_text())
    assert config["family"] == "pathflip2" and config["text_lora_rank"] == 2
    flat = {name: np.asarray(x) for name, x in flatten(predictor.model).items()}
    assert any(flat[name].any() for name in flat if name.endswith("/lora/b"))
    biases = [name for name in flat if name.startswith("text_encoder/") and name.endswith("/bias")]
    assert biases and not any(flat[name].any() for name in biases)  # as at the start
    assert flat["patch_projection/linear/bias"].any()


def test_embeddings_of_an_archive_are_the_models_own(tiny_cohort, run, predictor, slide, tmp_path):
    out = tmp_path / "embeddings.parquet"
    command = ["embed", str(tiny_cohort.records), "--checkpoint", str(run), "--regions", "--out", str(out)]
    assert cli.main(command) == 0
    row = pq.read_table(out).to_pylist()[0]
    assert row["slide_id"] == slide.slide_id and row["num_regions"] == len(slide.features)  # patches
    encode = jax.jit(predictor.model.encode_slides)
    found = encode(slide.features[None, None], np.ones((1, 1, len(slide.features)), bool))
    np.testing.assert_allclose(row["embedding"], found.slide[0], atol=2e-4)
    np.testing.assert_allclose(row["regions"], found.regions[0], atol=2e-4)


def test_maps_come_from_patches_in_one_pass(predictor, slide):
    text = predictor.encode_texts(TEXTS)
    found = predictor.encode_slide(slide).regions
    cosine = (text.region / np.linalg.norm(text.region, axis=1, keepdims=True)) @ (
        found / np.linalg.norm(found, axis=1, keepdims=True)
    ).T
    grounded = predictor.ground(slide, TEXTS)
    assert grounded.method == "cosine"
    np.testing.assert_allclose(grounded.patch_scores, cosine, atol=1e-4)
    attend = jax.jit(predictor.model.text_region)
    _, weights = attend(text.region[None], found[None], np.ones((1, len(found)), bool))
    attended = predictor.ground(slide, TEXTS, method="region")
    np.testing.assert_allclose(attended.patch_scores, maps.log_ratio(np.asarray(weights[0])), atol=1e-4)
    single = predictor.ground(slide, TEXTS, method="slide")
    alone = predictor.encode_slide(dataclasses.replace(slide, features=slide.features[:1], coords=slide.coords[:1]))
    expected = alone.slide @ text.slide[1] / np.linalg.norm(alone.slide) / np.linalg.norm(text.slide[1])
    assert single.patch_scores[1, 0] == pytest.approx(expected, abs=1e-4)
    wider = predictor.ground(slide, TEXTS, window=3, negative="Lymphoid aggregates are dense.")
    assert np.isfinite(wider.patch_scores).all() and np.isfinite(predictor.attend(slide)).all()
    with pytest.raises(ValueError, match="use method 'region'"):
        predictor.ground(slide, TEXTS, method="attention")


def test_a_region_is_the_mean_of_its_patches(predictor, slide):
    each = next(predictor.encode_regions([slide]))
    patches, slots = predictor.encode_slide(slide).regions, predictor.region_patches(slide)
    assert len(each.regions) == len(slots) > 1
    for region, members in zip(each.regions, slots, strict=True):
        np.testing.assert_allclose(region, patches[members[members >= 0]].mean(0), atol=1e-4)


def test_evaluate_and_ground_take_it_as_it_is(tiny_cohort, run, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"classes": {"glandular": ["glands"], "solid": ["fat and necrosis"]}}))
    cohort = ["--records", str(tiny_cohort.records), "--slides", str(tiny_cohort.slides)]
    more = ["--texts", str(tiny_cohort.texts), "--prompts", str(prompts), "--out", str(tmp_path / "scores")]
    assert cli.main(["evaluate", str(run), *cohort, *more]) == 0
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert 0 <= scores["zero_shot"]["metrics"]["balanced_accuracy"]["value"] <= 1 and "retrieval" in scores
    command = ["ground", str(tiny_cohort.records), TEXTS[0], "--slide-id", "S00", "--checkpoint", str(run)]
    assert cli.main([*command, "--out", str(tmp_path / "map")]) == 0
    assert json.loads((tmp_path / "map" / "S00.json").read_text())["method"] == "cosine"
    sources = ["--records", str(tiny_cohort.records), "--texts", *TEXTS[:2], "--slide-ids", "S00"]
    assert cli.main(["report", str(run), *sources, "--out", str(tmp_path / "page")]) == 0
    assert TEXTS[0] in "".join(path.read_text() for path in (tmp_path / "page").rglob("*.js"))


def test_the_viewer_grounds_and_searches_with_it(tiny_cohort, predictor, slide):
    slides = list_slides(None, records=tiny_cohort.records, only=[slide.slide_id])
    grounder, searched = Grounder(predictor), Search(slides)
    searched.start(grounder)
    layer = grounder.layer(slides[0], TEXTS[0])
    np.testing.assert_allclose(layer.grounding.patch_scores, predictor.ground(slide, TEXTS[:1]).patch_scores, atol=1e-5)
    deadline = time.monotonic() + 60
    while searched.progress()["busy"] and time.monotonic() < deadline:
        time.sleep(0.02)
    searched.stop()
    (found,) = searched.similarities(grounder.embed_text(TEXTS[0])).values()
    assert -1 <= found <= 1 and layer.grounding.method == "cosine"


def test_the_language_stage_wants_a_model_with_regions(run):
    from pathflip_jax.inference.language_run import read_aligner

    with pytest.raises(ValueError, match="has no regions"):
        read_aligner(str(run))


def test_an_export_computes_the_same_in_pytorch(run, predictor, slide, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for known in (transformers.AutoConfig, transformers.AutoModel):  # as this package's class, which other tests load
        monkeypatch.setattr(known, "register", lambda *names, **options: None)
    out = tmp_path / "exported"
    assert cli.main(["export", str(run), "--to", "pytorch", "--which", "latest", "--out", str(out)]) == 0
    monkeypatch.syspath_prepend(str(out))
    from torch_pathflip2 import load as load_torch
    from transformers import BertTokenizerFast

    theirs, ours = load_torch(out), load(run, "latest")
    features = torch.tensor(np.asarray(slide.features, np.float32))[None]
    with torch.no_grad():
        found = theirs.encode_slides(features)
        ids = BertTokenizerFast.from_pretrained(out / "bert")(TEXTS, padding=True, return_tensors="pt")
        texts = [theirs.encode_texts(ids.input_ids, ids.attention_mask, level) for level in ("slide", "region")]
    embedding = ours.encode_slide(slide)
    np.testing.assert_allclose(embedding.slide, found.slide[0], atol=1e-4)
    np.testing.assert_allclose(embedding.regions, found.patches[0], atol=1e-4)
    for ours_at, theirs_at in zip(ours.encode_texts(TEXTS), texts, strict=True):
        np.testing.assert_allclose(ours_at, theirs_at, atol=1e-4)
    del sys.modules["torch_pathflip2"]


@pytest.fixture
def published(tmp_path) -> Path:
    """The published code's own weights, and their BERT folder, which tests may change."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "published"))


def test_published_weights_embed_as_published(published):
    with np.load(GOLDEN / "io.npz") as archive:
        case = dict(archive)
    weights, bert = published / "state_dict.safetensors", published / "bert"
    merged = load(weights, bert=bert, arguments=ARGUMENTS)
    kept = Predictor(*released.load_released(weights, bert, arguments=ARGUMENTS, keep_lora=True)[:3])
    assert merged.model.config.text_lora_rank == 0 and kept.model.config.text_lora_rank == 3
    captions = json.loads((GOLDEN / "meta.json").read_text())["captions"]
    for predictor in (merged, kept):
        predictor.caption_length = 64
        np.testing.assert_allclose(predictor.encode_text(captions), case["caption_features"], atol=1e-4)
        for slide, patches in zip(case["slide_features"], case["patches"], strict=True):
            found = predictor.encode_slide(SlideFeatures("S", "P", patches))
            np.testing.assert_allclose(found.slide, slide, atol=1e-4)


def test_arguments_decide_what_tensors_do_not_tell(published):
    state = checkpoint_files.read_checkpoint(published / "state_dict.safetensors")
    config = pytorch.infer_config(state, 4, ARGUMENTS)
    assert (config.token_heads, config.text_pooling, config.text_lora_alpha, config.top_k) == (4, "mean_padded", 12, 6)
    for wrong, words in (
        ({"embed_dim": 512}, "embed_dim=512, the tensors say 32"),
        ({"text_encoder_use_lora": False}, "the tensors hold rank 3"),
        ({"lora_rank": 8}, "lora_rank=8, the tensors say 3"),
        ({"text_pooling_type": "max"}, "text_pooling_type='max'"),
    ):
        with pytest.raises(ValueError, match=words):
            pytorch.infer_config(state, 4, ARGUMENTS | wrong)
    with pytest.raises(ValueError, match="--lora-alpha"):
        pytorch.infer_config(state, 4, {name: x for name, x in ARGUMENTS.items() if name != "lora_alpha"})
    half = {name: x for name, x in state.items() if "patch_decoder" not in name}
    with pytest.raises(ValueError, match=r"slide_encoder\.patch_decoder\.norm2\.weight: missing"):
        pytorch.to_jax(half, config)
    with pytest.raises(ValueError, match=r"image_proj\.0\.weight: missing"):
        pytorch.infer_config({name: x for name, x in state.items() if "image_proj.0" not in name}, 4, ARGUMENTS)


def test_a_run_without_a_scale_of_slides_converts_too(published):
    """Published runs had to use InfoNCE for slides, which has no scale and bias."""
    state = checkpoint_files.read_checkpoint(published / "state_dict.safetensors")
    config = pytorch.infer_config(state, 4, ARGUMENTS)
    flat = pytorch.to_jax({name: x for name, x in state.items() if not name.startswith("global_logit")}, config)
    assert flat["slide_scale"] == 10 and flat["slide_bias"] == -10


def test_a_bert_folder_of_another_model_is_refused(published, tiny_cohort):
    weights = published / "state_dict.safetensors"
    with pytest.raises(ValueError, match="word table has 320 rows"):
        released.load_released(weights, tiny_cohort.vocabulary, 4, arguments=ARGUMENTS)
    path = published / "bert" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 768}))
    with pytest.raises(ValueError, match="text encoder is 48 wide"):
        released.load_released(weights, published / "bert", 4, arguments=ARGUMENTS)


def test_weights_go_out_and_in_again(published):
    state = checkpoint_files.read_checkpoint(published / "state_dict.safetensors")
    config = pytorch.infer_config(state, 4, ARGUMENTS)
    out = pytorch.to_torch(pytorch.to_jax(state, config), config)
    assert out.keys() == state.keys()
    for name, tensor in state.items():
        if ".pooler." not in name:  # nothing reads it
            np.testing.assert_array_equal(out[name], tensor, err_msg=name)


def test_texts_start_from_a_bert_folder_as_it_is(tmp_path, tiny_cohort):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from pathflip_jax.convert.bert import bert_parameters
    from pathflip_jax.model.config import PathFLIP2Config
    from pathflip_jax.model.parameters import unflatten
    from pathflip_jax.model.pathflip2 import PathFLIP2

    words = TextTokenizer(tiny_cohort.vocabulary).vocab_size - 1
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=words, max_position_embeddings=40, **sizes)).eval()
    bert.save_pretrained(tmp_path)
    config = PathFLIP2Config(
        feature_dim=8, embed_dim=16, hidden=24, layers=2, heads=2, intermediate=32, vocab_size=words, max_positions=40,
        token_heads=2, text_region_heads=2, text_lora_rank=3,
    )  # fmt: skip
    from flax import nnx

    model = PathFLIP2(config, nnx.Rngs(0))
    model = unflatten(config, flatten(model) | bert_parameters(tmp_path, config))
    ids = np.random.default_rng(0).integers(5, words, (3, 10)).astype(np.int32)
    packed = [(ids[None], np.ones_like(ids)[None], np.broadcast_to(np.arange(10, dtype=np.int32), ids.shape)[None])]
    found = jax.jit(PathFLIP2.read_texts)(model, packed, np.arange(3)[None] * 10)[0]
    with torch.no_grad():
        expected = bert(torch.tensor(ids).long()).last_hidden_state.mean(1)
    np.testing.assert_allclose(found, expected, atol=1e-5)

"""A whole evaluation on a tiny cohort: an oracle must score 1, a real model must leave every file, faults are named."""

import base64
import csv
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from flax import nnx
from sklearn import metrics

from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.readers.outlines import Polygon, write_outlines
from pathflip_jax.data.records.recipe import write_recipe
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.evaluate import colour, run
from pathflip_jax.evaluate.spec import EvaluationSpec
from pathflip_jax.grounding.method import REGIONS
from pathflip_jax.inference.load import load
from pathflip_jax.inference.predictor import Embedding
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs.folder import save_run

CONFIG = PathFLIPConfig(
    feature_dim=16, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2, vocab_size=200,
    max_positions=128, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
)  # fmt: skip
PROMPTS = {"task": "pattern", "classes": {"glandular": ["glands", "many glands"], "solid": ["solid sheets"]}}
CONCEPTS = {"fat": ["fat at the edge"], "necrosis": ["necrosis", "extensive necrosis"], "mucin": ["mucin"]}


@pytest.fixture(scope="module")
def setting(tiny_cohort, tmp_path_factory):
    """Beside the cohort: prompts, concepts, outlines (fat left of 192, necrosis in a corner, no mucin), slide files."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "prompts.json").write_text(json.dumps(PROMPTS))
    (folder / "concepts.json").write_text(json.dumps(CONCEPTS))
    (folder / "outlines").mkdir()
    (folder / "images").mkdir()
    left = Polygon(np.array([[0, 0], [192, 0], [192, 320], [0, 320], [0, 0]], float))
    corner = Polygon(np.array([[256, 192], [384, 192], [384, 320], [256, 320], [256, 192]], float))
    rng = np.random.default_rng(0)
    for info in Records(tiny_cohort.records).slides:
        write_outlines(folder / "outlines" / f"{info.slide_id}.geojson", {"fat": [left], "necrosis": [corner]})
        picture = rng.integers(0, 255, (320, 384, 3), np.uint8)
        tifffile.imwrite(folder / "images" / f"{info.slide_id}.tiff", picture, tile=(128, 128), photometric="rgb")
    return SimpleNamespace(
        folder=folder,
        inputs={
            "records": tiny_cohort.records,
            "slides": tiny_cohort.slides,
            "texts": tiny_cohort.texts,
            "prompts": folder / "prompts.json",
            "grounding": folder / "concepts.json",
            "outlines": folder / "outlines",
        },
        images=folder / "images",
        cohort=tiny_cohort,
    )


def make_run(folder, cohort, seed, **more):
    data = {"encoder": "tiny", "cut": "grid", "edge_um": 64.0, "edge_px": None, "caption_length": 96} | more
    save_run(folder, PathFLIP(CONFIG, nnx.Rngs(seed)), {"data": data}, TextTokenizer(cohort.vocabulary))
    return folder


@pytest.fixture(scope="module")
def runs(setting):
    first, second = (make_run(setting.folder / f"run{seed}", setting.cohort, seed) for seed in range(2))
    rows = [{"step": i, "loss": 3.0 / i, "loss_slide": 2.0 / i} | ({"val/recall_at_1": i / 9} if i % 3 == 0 else {})
            for i in range(1, 9)]  # fmt: skip
    (first / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return first, second


def evaluate(run_folder, **fields):
    return run.evaluate(EvaluationSpec(run=run_folder, **fields))


class Oracle:
    """Knows everything: each slide its own direction in which its caption lies too, its class, its outlines."""

    name, config, default_method, patchwise = "oracle", {}, "slide", False
    untrained, unaligned = {}, {}

    def __init__(self, cohort, mirrored=False):
        self.captions = [json.loads(line) for line in cohort.texts.read_text().splitlines()]
        self.number = {row["slide_id"]: i for i, row in enumerate(self.captions)}
        self.mirrored = mirrored

    def encode_slides(self, slides):
        for slide in slides:
            direction = np.zeros(50)
            direction[self.number[slide.slide_id]] = 1
            direction[40 + self.number[slide.slide_id] % 2] = 0.5
            yield Embedding(slide.slide_id, direction, np.zeros((1, 50)), np.zeros((1, 2)))

    def encode_text(self, texts):
        found = np.zeros((len(texts), 50))
        for row, text in zip(found, texts, strict=True):
            for number, known in enumerate(self.captions):
                row[number] = known["caption"] == text
            row[40], row[41] = "solid" in text, "glands" in text
        return found

    def ground(self, slide, texts, **_):
        x, y = (slide.coords + 32).T
        maps = {"fat": x < 192, "necrosis": (x > 256) & (y > 192), "mucin": x > 1e9}
        scores = [next(inside for name, inside in maps.items() if name in text) for text in texts]
        return SimpleNamespace(patch_scores=np.array(scores, float) * (-1 if self.mirrored else 1))

    def attend(self, slide):
        return np.zeros(len(slide.coords))


def test_an_oracle_scores_one_and_its_opposite_nought(setting, monkeypatch, tmp_path):
    """Were slides, texts, patches or outlines mixed up anywhere on the way, this would not come out."""
    oracles = {"right": Oracle(setting.cohort), "wrong": Oracle(setting.cohort, mirrored=True)}
    monkeypatch.setattr(run, "load", lambda folder: oracles[folder])
    plain = {"images": setting.images, "smooth": 0}  # a smoothed map of two values is wrong at its rim
    found = evaluate("right", compare_to="wrong", out=tmp_path, **plain, **setting.inputs)
    assert found["grounding"]["auc"]["value"] == found["grounding"]["auc"]["low"] == 1
    assert found["grounding"]["auc"]["compared"]["value"] == 0
    assert found["grounding"]["auc"]["difference"] == {"value": 1, "low": 1, "high": 1}
    assert 0.35 < found["grounding"]["auc"]["mean_colour"]["value"] < 0.65  # the slides are noise
    assert found["grounding"]["auc"]["no_text"]["value"] == 0.5
    pointing, dice = found["grounding"]["pointing"], found["grounding"]["dice"]
    assert pointing["value"] == dice["value"] == 1 and pointing["compared"]["value"] == 0
    assert pointing["no_text"]["value"] == pytest.approx(pointing["chance"])  # every patch ties
    assert pointing["gain"]["no_text"]["low"] > 0 and found["grounding"]["threshold_slides"] == 12
    assert [row["concept"] for row in found["grounding"]["per_concept"]] == ["fat", "necrosis"]  # mucin is nowhere
    zero_shot = found["zero_shot"]["metrics"]
    assert zero_shot["balanced_accuracy"]["value"] == zero_shot["auc"]["value"] == zero_shot["macro_f1"]["value"] == 1
    assert zero_shot["balanced_accuracy"]["chance"] == zero_shot["balanced_accuracy"]["majority"] == 0.5
    for direction in ("slide_to_text", "text_to_slide"):
        block = found["retrieval"][direction]["all"]
        assert block["R@1"]["value"] == block["median_rank"]["value"] == 1
        assert block["gallery"] == 6 and block["R@1"]["chance"] == pytest.approx(
            (4 / 6 + 2 / 5 - 4 / 6 + 4 / 6) / 6, abs=0.2
        )


def test_few_shot_probes_of_several_columns_are_in_every_file(setting, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load", lambda folder: Oracle(setting.cohort))
    rows = ["patient_id,tp53", *(f"P{i:02d},{i // 2 % 2}" for i in range(24))]
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    inputs = {"records": setting.cohort.records, "slides": setting.cohort.slides, "compare_to": "other", "draws": 2}
    inputs |= {"few_shot": [1, "all"], "labels": ["TP53"], "label_table": tmp_path / "labels.csv"}
    found = evaluate("oracle", out=tmp_path / "out", **inputs)
    (block,) = found["few_shot"]
    with open(tmp_path / "out" / "few_shot_1.csv", newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["probe"], row["shots"], row["seed"]) == ("linear", "1", "0")
        ]
    right = np.mean([row["label"] == row["predicted"] for row in rows])
    assert len(rows) == 6 and right == block["probes"]["linear"]["1"]["metrics"]["accuracy"]["by_seed"][0]
    page = Page()
    page.feed((tmp_path / "out" / "report.html").read_text())
    assert not page.open and len(page.images) == 5 and block["probes"]["linear"]["all"]["per_class"]
    assert all(name in page.text for name in ("TP53", *block["probes"], "Each probe chooses its one setting"))


def test_folds_of_a_published_task_are_scored_with_its_labels(setting, task_of_folds, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load", lambda folder: Oracle(setting.cohort))
    inputs = {"records": setting.cohort.records, "few_shot": ["all"], "draws": 1, "prompts": setting.inputs["prompts"]}
    plain = evaluate("oracle", slides=setting.cohort.slides, out=tmp_path / "plain", **inputs)
    found = {
        fold: evaluate("oracle", slides=task_of_folds, fold=fold, out=tmp_path / fold, **inputs)
        for fold in ("0", "fold_1")
    }
    chosen = found["0"]
    assert chosen["few_shot"] == plain["few_shot"] and chosen["zero_shot"] == plain["zero_shot"]
    assert "fold" not in plain and found["fold_1"]["fold"] == "fold_1"
    for fold, scored in (("0", range(18, 24)), ("fold_1", range(12, 18))):
        with open(tmp_path / fold / "predictions.csv", newline="") as file:
            assert [row["slide_id"] for row in csv.DictReader(file)] == [f"S{i:02d}" for i in scored]
    with pytest.raises(ValueError, match="choose one with --fold"):
        evaluate("oracle", slides=task_of_folds, out=tmp_path / "none", **inputs)


class Page(HTMLParser):
    """Collects what a page refers to and whether its tags are balanced."""

    VOID = {"meta", "img", "br", "hr", "link"}

    def __init__(self):
        super().__init__()
        self.images, self.links, self.open, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            assert attrs["alt"]
            self.images.append(attrs["src"])
        self.links += [attrs[name] for name in ("href", "src") if name in attrs and tag != "img"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def evaluated(setting, runs):
    out = setting.folder / "out"
    command = ["evaluate", "run 0", "--out", "out"]
    found = run.evaluate(
        EvaluationSpec(
            run=runs[0], compare_to=runs[1], out=out, images=setting.images, command=command, **setting.inputs
        )
    )
    return out, found


def test_every_file_is_there_and_says_the_same(evaluated):
    out, found = evaluated
    assert json.loads((out / "scores.json").read_text()) == found
    tables = {}
    for name in ("predictions", "ranks", "grounding"):
        with open(out / f"{name}.csv", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    labels, predicted = ([row[key] for row in tables["predictions"]] for key in ("label", "predicted"))
    zero_shot = found["zero_shot"]["metrics"]
    assert zero_shot["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert zero_shot["balanced_accuracy"]["value"] == pytest.approx(metrics.balanced_accuracy_score(labels, predicted))
    belief = [float(row["p_solid"]) for row in tables["predictions"]]
    assert zero_shot["auc"]["value"] == pytest.approx(metrics.roc_auc_score([x == "solid" for x in labels], belief))
    ranks = np.array([float(row["slide_to_text_rank"]) for row in tables["ranks"]])
    assert found["retrieval"]["slide_to_text"]["all"]["R@1"]["value"] == pytest.approx((ranks == 1).mean())
    by_slide = {}
    for row in tables["grounding"]:
        by_slide.setdefault(row["slide_id"], []).append(float(row["auc"]))
    expected = np.mean([np.mean(values) for values in by_slide.values()])
    assert found["grounding"]["auc"]["value"] == pytest.approx(expected, abs=1e-5)
    assert found["slides"] == 6 and found["patients"] == 5
    assert found["versions"]["jax"] and found["command"][0] == "evaluate"


def test_the_page_stands_alone_and_holds_every_figure(evaluated):
    out, found = evaluated
    source = (out / "report.html").read_text()
    page = Page()
    page.feed(source)
    assert not page.open
    assert all(src.startswith("data:image/png;base64,") for src in page.images)
    shown = {base64.b64decode(src.split(",", 1)[1]) for src in page.images}
    assert shown == {path.read_bytes() for path in (out / "figures").glob("*.png")}
    names = {path.stem for path in (out / "figures").glob("*.png")}
    assert names >= {"retrieval", "confusion", "concepts", "training", "grounding_good", "grounding_poor"}
    assert all((out / link).exists() for link in page.links), page.links
    source = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", source)  # which may hold any of these by chance
    assert not re.search(r"https?://|//cdn|<script", source)
    assert "For research use only" in page.text and "pathflip evaluate 'run 0' --out out" in page.text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", source).lower().split()
    zero_shot = found["zero_shot"]["metrics"]["balanced_accuracy"]
    for value in (zero_shot["value"], zero_shot["low"], zero_shot["high"], found["grounding"]["auc"]["value"]):
        assert f"{value:.3f}" in page.text


def test_the_maps_of_the_report_are_the_models_own(evaluated, setting, runs):
    """One AUC of the table, worked out anew from the run folder alone."""
    out, _ = evaluated
    with open(out / "grounding.csv", newline="") as file:
        row = next(row for row in csv.DictReader(file) if row["concept"] == "necrosis")
    records = Records(setting.cohort.records)
    slide = records.read(records.position(row["slide_id"]))
    predictor = load(runs[0])
    scores = np.mean([predictor.ground(slide, text).patch_scores[0] for text in CONCEPTS["necrosis"]], axis=0)
    weight = np.exp(-2.0 * ((slide.coords[:, None] - slide.coords) ** 2).sum(-1) / slide.patch_size**2)
    weight *= np.abs(slide.coords[:, None] - slide.coords).max(-1) <= slide.patch_size  # 1.5 edges, as a grid has them
    scores = weight @ scores / weight.sum(1)
    x, y = slide.coords.T
    expected = metrics.roc_auc_score((x >= 256) & (y >= 192), scores)
    assert float(row["auc"]) == pytest.approx(expected, abs=1e-3)


def test_runs_of_several_seeds_are_averaged(setting, runs, tmp_path):
    inputs = setting.inputs | {"texts": None, "grounding": None, "outlines": None}
    both = evaluate(list(runs), out=tmp_path / "both", compare_to=list(runs), **inputs)
    found = both["zero_shot"]["metrics"]["accuracy"]
    alone = [evaluate(one, out=tmp_path / one.name, **inputs) for one in runs]
    assert found["by_run"] == [one["zero_shot"]["metrics"]["accuracy"]["value"] for one in alone]
    assert found["value"] == pytest.approx(np.mean(found["by_run"]))
    assert found["difference"] == {"value": 0, "low": 0, "high": 0}
    assert not (tmp_path / "both" / "figures" / "retrieval.png").exists()
    assert "mean over 2 runs" in (tmp_path / "both" / "report.html").read_text()


@pytest.mark.parametrize(
    ("tasks", "pictures"),
    [
        ({"texts"}, {"retrieval"}),
        ({"prompts"}, {"confusion"}),
        ({"grounding", "outlines"}, {"concepts", "grounding_good"}),
    ],
)
def test_each_task_stands_alone_without_slide_files(setting, monkeypatch, tmp_path, tasks, pictures):
    monkeypatch.setattr(run, "load", lambda folder: Oracle(setting.cohort))
    left_out = {"texts", "prompts", "grounding", "outlines"} - tasks
    found = run.evaluate(
        EvaluationSpec(run="oracle", out=tmp_path, **{k: v for k, v in setting.inputs.items() if k not in left_out})
    )
    assert {path.stem for path in (tmp_path / "figures").iterdir()} - {
        "grounding_typical",
        "grounding_poor",
    } == pictures
    assert len({"retrieval", "zero_shot", "grounding"} & set(found)) == 1
    assert "mean_colour" not in json.dumps(found) and "difference" not in json.dumps(found)
    Page().feed((tmp_path / "report.html").read_text())


def rewrite(path, source, change):
    path.write_text(change(source.read_text()))
    return path


def test_a_patient_on_both_sides_is_told(setting, runs, tmp_path):
    slides = rewrite(tmp_path / "slides.csv", setting.cohort.slides, lambda text: text.replace("S22,P22", "S22,P00"))
    inputs = setting.inputs | {"slides": slides, "texts": None, "grounding": None, "outlines": None}
    found = evaluate(runs[0], out=tmp_path / "out", **inputs)
    assert len(found["warnings"]) == 1 and "P00" in found["warnings"][0]
    assert "P00" in (tmp_path / "out" / "report.html").read_text()


def test_records_of_another_recipe_are_refused(setting, tmp_path):
    records = shutil.copytree(setting.cohort.records, tmp_path / "records")
    write_recipe(records, FeatureRecipe(weights="12ab" * 16))
    run_folder = make_run(tmp_path / "run", setting.cohort, 0, recipe={"weights": "34cd" * 16})
    with pytest.raises(ValueError, match="was trained on: they differ in weights"):
        evaluate(run_folder, out=tmp_path / "out", **setting.inputs | {"records": records})
    assert not (tmp_path / "out" / "scores.json").exists()


def test_strict_stops_at_a_faulty_split(setting, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load", lambda folder: pytest.fail("a model was loaded"))
    slides = rewrite(tmp_path / "slides.csv", setting.cohort.slides, lambda text: text.replace("S22,P22", "S22,P00"))
    with pytest.raises(ValueError, match="faulty split: 1 patients have slides in more than one split .P00."):
        run.evaluate(
            EvaluationSpec(run="run", out=tmp_path / "out", strict=True, **(setting.inputs | {"slides": slides}))
        )


def test_the_paper_protocol_has_no_ensemble_and_says_where_it_is_optimistic(setting, runs, tmp_path):
    """One text per class, F1 of the second class, cases unmasked; strict has none of it."""
    inputs = setting.inputs | {"grounding": None, "outlines": None}
    found = {name: evaluate(runs[0], out=tmp_path / name, protocol=name, **inputs) for name in ("strict", "paper")}
    assert [len(texts) for texts in found["paper"]["zero_shot"]["texts"].values()] == [1, 1]
    assert "published_f1" not in found["strict"]["zero_shot"]["metrics"] and found["strict"]["protocol"]["notes"] == []
    with open(tmp_path / "paper" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels, predicted = ([row[key] for row in rows] for key in ("label", "predicted"))
    f1 = metrics.f1_score(labels, predicted, pos_label="solid", zero_division=0)
    assert found["paper"]["zero_shot"]["metrics"]["published_f1"]["value"] == pytest.approx(f1)
    sizes = [one["retrieval"]["slide_to_text"]["all"]["gallery"] for one in found.values()]
    assert sizes == [6, 6] and "F1 as published" in (tmp_path / "paper" / "report.html").read_text()
    with open(tmp_path / "paper" / "ranks.csv", newline="") as file:
        assert {row["gallery"] for row in csv.DictReader(file)} == {"6"}
    with pytest.raises(ValueError, match="protocol 'kind': expected one of strict, paper"):
        evaluate(runs[0], out=tmp_path / "none", protocol="kind", **inputs)


def test_labels_of_other_spelling_are_the_classes_they_mean(setting, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load", lambda folder: Oracle(setting.cohort))
    content = PROMPTS | {"spellings": {"solid": ["massive"]}}
    (tmp_path / "prompts.json").write_text(json.dumps(content))
    slides = rewrite(tmp_path / "slides.csv", setting.cohort.slides, lambda text: text.replace("solid", "Massive"))
    inputs = {"records": setting.cohort.records, "slides": slides, "prompts": tmp_path / "prompts.json"}
    found = evaluate("oracle", out=tmp_path / "out", **inputs)
    assert found["zero_shot"]["metrics"]["accuracy"]["value"] == 1 and found["zero_shot"]["majority_from"] == "train"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "validation"}, "no slide is in split 'validation'; the splits are test"),
        ({"slides": lambda text: text + "S20,P20,solid,test\n"}, "S20 is listed more than once"),
        ({"prompts": "nowhere"}, "nowhere: no such prompt file; expected a file or one of bracs"),
        ({"few_shot": [1], "labels": ["grade"]}, "no column 'grade'"),
        ({"slides": lambda text: text + "GHOST,P99,solid,test\n"}, "GHOST of split 'test'.*prepare them"),
        ({"slides": lambda text: text.replace("S20,P20,solid", "S20,P20,mixed")}, "no class for the labels mixed"),
        ({"slides": lambda text: text.replace("S20,P20,solid", "S20,P20,")}, "no label for S20"),
        ({"texts": lambda text: "\n".join(text.splitlines()[:9])}, "none of its texts belongs to a slide of the split"),
        ({"outlines": None}, "grounding needs both"),
        ({"texts": None, "prompts": None, "grounding": None, "outlines": None}, "nothing to score"),
        ({"grounding": lambda text: '{"bone": ["bone"]}'}, "none of its concepts .bone. is outlined"),
        ({"outlines": "empty"}, "no outlines for any slide"),
        ({"compare_to": ["a", "b"]}, "1 runs cannot be paired with 2"),
        ({"clear": 0.5}, "clear 0.5: expected a finite number of at least 0 and below 0.5"),
        ({"lesions": "bone"}, "lesions of 'bone': no such concept; expected one of fat, necrosis, mucin"),
        ({"lesions": "fat", "grounding": None, "outlines": None}, "lesions of 'fat' are scored by grounding"),
        ({"lesions": "mucin"}, "no outline of 'mucin' is a lesion of 275 um or more"),
    ],
)  # fmt: skip
def test_faulty_input_is_named_before_anything_is_computed(setting, monkeypatch, tmp_path, change, message):
    monkeypatch.setattr(run, "load", lambda folder: pytest.fail("a model was loaded"))
    (tmp_path / "empty").mkdir()
    for key, value in change.items():
        if callable(value):
            change = change | {key: rewrite(tmp_path / f"{key}.csv", setting.inputs[key], value)}
        if value == "empty":
            change = change | {key: tmp_path / "empty"}
    if "texts" in change and change["texts"] is not None:
        change["texts"] = change["texts"].rename(tmp_path / "texts.jsonl")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate("run", out=tmp_path / "out", **(setting.inputs | change))
    assert not (tmp_path / "out").exists()


def test_a_compared_run_whose_maps_were_never_trained_is_refused_before_anything_is_encoded(
    setting, monkeypatch, tmp_path
):
    oracles = {"right": Oracle(setting.cohort), "slide loss alone": Oracle(setting.cohort)}
    oracles["slide loss alone"].untrained = {REGIONS: "loss.region_weight is 0"}
    monkeypatch.setattr(run, "load", lambda folder: oracles[folder])
    monkeypatch.setattr(Oracle, "encode_slides", lambda self, slides: pytest.fail("a slide was encoded"))
    how = {"compare_to": "slide loss alone", "method": "cosine", "out": tmp_path / "out"}
    with pytest.raises(ValueError, match="method 'cosine' maps region embeddings, .* use a trained one: slide$"):
        evaluate("right", **how, **setting.inputs)
    assert not (tmp_path / "out").exists()


def test_slides_are_classified_by_the_mean_of_their_windows(setting, runs, tmp_path):
    """The probabilities are the means of those that each patch has as a slide of its own."""
    inputs = {key: setting.inputs[key] for key in ("records", "slides", "prompts")}
    found = evaluate(runs[0], zero_shot_windows=True, out=tmp_path / "one", **inputs)
    with open(tmp_path / "one" / "predictions_windows.csv") as file:
        row = next(csv.DictReader(file))
    predictor, records = load(runs[0]), Records(setting.cohort.records)
    slide = records.read(records.position(row["slide_id"]))
    alone = np.arange(len(slide.coords))[:, None, None]
    patches = np.concatenate([predictor.encode_slots([slide.features], [patch]).slide for patch in alone])
    texts = np.stack([
        np.mean([text / np.linalg.norm(text) for text in predictor.encode_text(listed)], axis=0)
        for listed in PROMPTS["classes"].values()
    ])  # fmt: skip
    cosines = patches @ texts.T / np.linalg.norm(patches, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    shares = np.exp(cosines / 0.1) / np.exp(cosines / 0.1).sum(1, keepdims=True)
    assert [float(row[f"p_{name}"]) for name in PROMPTS["classes"]] == pytest.approx(shares.mean(0), abs=1e-5)
    assert found["zero_shot_windows"]["window"] == 1
    assert found["zero_shot_windows"]["classes"] == found["zero_shot"]["classes"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert "Zero-shot classification by windows: pattern" in page and "window of 1 × 1 patches" in page
    wide = evaluate(runs[0], zero_shot_windows=True, window=3, out=tmp_path / "wide", **inputs)
    assert wide["zero_shot"]["metrics"] == found["zero_shot"]["metrics"]
    assert wide["zero_shot_windows"]["metrics"] != found["zero_shot_windows"]["metrics"]


def test_both_zero_shot_scores_have_the_mean_colours_of_one_reading(setting, runs, monkeypatch, tmp_path):
    read, patch_colours = [], colour.patch_colours
    monkeypatch.setattr(colour, "patch_colours", lambda path, *how: read.append(path) or patch_colours(path, *how))
    inputs = {key: setting.inputs[key] for key in ("records", "slides", "prompts")}
    found = evaluate(runs[0], zero_shot_windows=True, images=setting.images, out=tmp_path, **inputs)
    one, other = (found[key]["metrics"]["balanced_accuracy"] for key in ("zero_shot", "zero_shot_windows"))
    assert one["mean_colour"] == other["mean_colour"]
    assert len(read) == len(set(read)) == 18, "slides of training and test"


def test_classification_by_windows_needs_prompts(setting, runs, tmp_path):
    inputs = {key: setting.inputs[key] for key in ("records", "slides", "texts")}
    with pytest.raises(ValueError, match="by windows needs the texts of each class"):
        evaluate(runs[0], zero_shot_windows=True, out=tmp_path, **inputs)

"""The embedded cohort: files that other tools open, reports that are true, splits that do not leak."""

import csv
import dataclasses
import hashlib
import json
import re

import numpy as np
import openslide
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from data_prep import synthetic
from data_prep.layout import CONCEPTS, TUMORS, plan
from data_prep.synthetic import generate, main
from pathflip_jax.data.texts.text import read_questions

SLIDES, SIZE = 8, 640

# What a reader takes as a mention of each concept, after names that only sound like one are taken out.
_NOT_A_CONCEPT = re.compile(
    r"(squamous cell|papillary|mucinous|undifferentiated|adeno) ?carcinoma|lymph nodes?|lymphovascular|fibrovascular"
)
_MENTIONS = {
    "glands": r"gland|acin[iu]|tubul",
    "keratin pearls": r"\bkerati|squamous",
    "papillary fronds": r"papill|frond",
    "mucin pools": r"mucin",
    "solid sheets": r"solid|sheets|diffuse growth",
    "necrosis": r"necro|ghost",
    "lymphoid aggregates": r"lymphoid|lymphocyte",
    "fat": r"\bfat\b|adipo",
    "fibrous stroma": r"collagen|fibrous|fibrosis",
    "ulcer": r"ulcer|fibrin|neutrophil",
}
_DENIAL = re.compile(r"\b(no|not|absent)\b", re.IGNORECASE)


def _sentences(caption: str) -> list[str]:
    return re.split(r"(?<=\.) (?=[A-Z])", caption)


def _facts(cohort):
    with open(cohort / "slides.csv", encoding="utf-8") as table:
        slides = list(csv.DictReader(table))
    reports = [json.loads(line) for line in (cohort / "reports.jsonl").read_text().splitlines()]
    return slides, reports


def _digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _truth(cohort, row):
    """Concept of each pixel (1 + index), from filling the GeoJSON polygons with an independent tool."""
    image = Image.new("L", (int(row["width"]), int(row["height"])), 0)
    draw = ImageDraw.Draw(image)
    for feature in json.loads((cohort / "outlines" / f"{row['slide_id']}.geojson").read_text())["features"]:
        polygons = feature["geometry"]["coordinates"]
        value = 1 + CONCEPTS.index(feature["properties"]["classification"]["name"])
        for outer, *holes in polygons if feature["geometry"]["type"] == "MultiPolygon" else [polygons]:
            draw.polygon([tuple(point) for point in outer], fill=value)
            for hole in holes:
                draw.polygon([tuple(point) for point in hole], fill=0)
    return np.asarray(image)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return generate(
        tmp_path_factory.mktemp("synthetic") / "cohort", SLIDES, seed=3, workers=1, progress=False, size=SIZE
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Tables of a cohort of the default length, its slides planned and described but not drawn."""
    roster = synthetic._patients(320, seed=0)
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_finished", lambda *_: True)
        rows = [synthetic._make_slide(str(folder), slide, 0, 768) for slide in roster]
    synthetic._write_tables(folder, rows)
    return folder


def test_openslide_opens_every_slide(cohort):
    slides, _ = _facts(cohort)
    assert len(slides) == SLIDES
    for row in slides:
        with openslide.OpenSlide(cohort / f"{row['slide_id']}.tiff") as slide:
            assert slide.dimensions == (int(row["width"]), int(row["height"]))
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(float(row["mpp"]))
            assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5)
            np.testing.assert_allclose(slide.level_downsamples, [1, 4, 16], rtol=0.03)
            corner = np.asarray(slide.read_region((0, 0), 0, (16, 16)))[..., :3]
            assert corner.min() > 215  # glass, not tissue, and not the black of a failed decode
            share = (np.asarray(slide.get_thumbnail((256, 256)).convert("RGB")).min(-1) < 215).mean()
            assert 0.3 < share < 0.9


def test_same_bytes_whatever_the_workers(cohort, tmp_path):
    again = generate(tmp_path / "again", SLIDES, seed=3, workers=2, progress=False, size=SIZE)
    assert _digest(again) == _digest(cohort)


def test_other_seed_other_slides(cohort, tmp_path):
    other = generate(tmp_path / "other", 2, seed=4, workers=1, progress=False, size=SIZE)
    assert not set(_digest(other).values()) & {v for k, v in _digest(cohort).items() if k.endswith(("tiff", "geojson"))}


def test_a_second_run_makes_only_what_is_missing(cohort, tmp_path, monkeypatch):
    folder = generate(tmp_path / "part", 3, seed=5, workers=1, progress=False, size=SIZE)
    before = _digest(folder)
    drawn = []
    render = synthetic.render
    monkeypatch.setattr(synthetic, "render", lambda *args: drawn.append(1) or render(*args))
    generate(folder, 3, seed=5, workers=1, progress=False, size=SIZE)
    assert not drawn
    (folder / "slides.csv").unlink()
    next(folder.glob("*.tiff")).unlink()
    generate(folder, 3, seed=5, workers=1, progress=False, size=SIZE)
    assert len(drawn) == 1
    assert _digest(folder) == before
    (folder / "concepts.json").unlink()  # as a cohort from before there was one
    generate(folder, 3, seed=5, workers=1, progress=False, size=SIZE)
    assert len(drawn) == 1
    assert _digest(folder) == before


def test_questions_are_answered_by_what_is_there(cohort):
    _, reports = _facts(cohort)
    there = {report["slide_id"]: set(report["concepts"]) for report in reports}
    asked = read_questions(cohort / "questions.json")
    assert len(asked) == 10 * len(there)
    for question in asked:
        concept = question.question.removeprefix("Is there evidence of ").removesuffix("?")
        assert question.options == {"A": "Yes", "B": "No"}
        assert (question.answer == "A") == (concept in there[question.slide_ids[0]])


def test_a_slide_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fails(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tifffile.TiffWriter.write", fails)
    with pytest.raises(OSError, match="No space left"):
        generate(tmp_path / "full", 1, workers=1, progress=False, size=SIZE)
    assert [path.name for path in (tmp_path / "full").iterdir() if path.is_file()] == ["cohort.json"]


def test_outlines_are_geojson_as_qupath_writes_it(cohort):
    slides, reports = _facts(cohort)
    for row, report in zip(slides, reports, strict=True):
        collection = json.loads((cohort / "outlines" / f"{row['slide_id']}.geojson").read_text())
        assert collection["type"] == "FeatureCollection"
        assert collection["features"]
        for feature in collection["features"]:
            assert feature["type"] == "Feature"
            assert feature["properties"]["objectType"] == "annotation"
            assert len(feature["properties"]["classification"]["color"]) == 3
            polygons = feature["geometry"]["coordinates"]
            if feature["geometry"]["type"] == "Polygon":
                polygons = [polygons]
            for ring in (ring for polygon in polygons for ring in polygon):
                ring = np.array(ring)
                assert len(ring) >= 4
                assert (ring[0] == ring[-1]).all()
                assert (ring >= 0).all() and (ring <= [int(row["width"]), int(row["height"])]).all()
        named = {feature["properties"]["classification"]["name"] for feature in collection["features"]}
        assert named == set(report["concepts"])
        assert sum(concept in TUMORS for concept in named) == 1
        assert TUMORS[next(concept for concept in named if concept in TUMORS)] == row["label"]


def test_rings_follow_a_hole():
    y, x = np.mgrid[0:40, 0:40]
    far = np.hypot(x - 20, y - 20)
    field = (np.clip(12.5 - far, 0, 1) * np.clip(far - 4.5, 0, 1)).astype(np.float32)
    ((outer, hole),) = synthetic.rings(field)
    radii = [np.hypot(*(ring - (20.5 * 8)).T).mean() / 8 for ring in (outer, hole)]
    np.testing.assert_allclose(radii, [12, 5], atol=0.2)


def test_the_outline_is_where_the_concept_is_drawn():
    """Drawn with and without its areas, a slide differs nearly everywhere inside the outlines and nowhere outside."""
    layout = plan(np.random.default_rng(1), "glands", 768)
    drawn = synthetic.render(layout, np.random.default_rng(2)).astype(int)
    bare = synthetic.render(dataclasses.replace(layout, areas=()), np.random.default_rng(2)).astype(int)
    image = Image.new("L", (layout.width, layout.height), 0)
    for area in layout.areas:
        for outer, *_ in synthetic.rings(area.field):
            ImageDraw.Draw(image).polygon([tuple(point) for point in outer], fill=1)
    inside = np.asarray(image) > 0
    change = np.abs(drawn - bare).max(-1)
    assert (change[inside] > 8).mean() > 0.8
    assert change[~ndimage.binary_dilation(inside, iterations=16)].max() == 0


def test_reports_tell_the_truth(texts):
    _, reports = _facts(texts)
    for report in reports:
        sentences = _sentences(report["caption"])
        assert 5 <= len(sentences) <= 10, report["caption"]
        said, denied = set(), set()
        for sentence in sentences:
            words = _NOT_A_CONCEPT.sub("", sentence.lower())
            found = {concept for concept, pattern in _MENTIONS.items() if re.search(pattern, words)}
            (denied if _DENIAL.search(sentence) else said).update(found)
        assert said == set(report["concepts"]), report["caption"]
        assert not denied & said, report["caption"]


def test_reports_hold_decimals_stages_and_denials(texts):
    captions = [report["caption"] for report in _facts(texts)[1]]
    for pattern in (r"\d\.\d (cm|x)", r"pT\d[ab]?[ ,]", r"\b(No|no|not|absent)\b"):
        assert np.mean([bool(re.search(pattern, caption)) for caption in captions]) > 0.3


def test_held_out_texts_are_never_seen_in_training(texts):
    slides, reports = _facts(texts)
    split = {row["slide_id"]: row["split"] for row in slides}
    seen = [report["caption"] for report in reports if split[report["slide_id"]] != "test"]
    known = {sentence.lower() for caption in seen for sentence in _sentences(caption)}
    held = {s for report in reports if split[report["slide_id"]] == "test" for s in _sentences(report["caption"])}
    assert not {sentence for sentence in held if sentence.lower() in known}

    grounding = json.loads((texts / "grounding.json").read_text())
    prompts = json.loads((texts / "prompts.json").read_text())["classes"]
    assert set(grounding) == set(CONCEPTS) and set(prompts) == set(TUMORS.values())
    everything = " ".join(seen).lower()
    asked = [text for group in (grounding, prompts) for texts_ in group.values() for text in texts_]
    assert not [text for text in asked if text.lower().rstrip(".") in everything]

    words = set(re.findall(r"[a-z]+", everything))
    unknown = {word for text in [*held, *asked] for word in re.findall(r"[a-z]+", text.lower())} - words
    assert not unknown  # new sentences, not a new vocabulary


def test_patients_stay_in_one_split(texts):
    slides, _ = _facts(texts)
    patients = {}
    for row in slides:
        patients.setdefault(row["patient_id"], []).append(row)
    assert all(len({(row["split"], row["label"]) for row in rows}) == 1 for rows in patients.values())
    assert 40 < sum(len(rows) == 2 for rows in patients.values()) < 90
    count = {split: sum(row["split"] == split for row in slides) for split in ("train", "val", "test")}
    assert count["test"] >= 100 and 20 <= count["val"] <= 32
    for split in ("train", "test"):
        labels = [row["label"] for row in slides if row["split"] == split]
        assert max(map(labels.count, set(labels))) < 1.35 * min(map(labels.count, set(labels)))


def test_every_slide_has_regions_and_several_concepts():
    for number, tumor in enumerate(list(TUMORS) * 6):
        layout = plan(np.random.default_rng([0, 1, number]), tumor, 1536)
        tissue = layout.tissue >= 0.5
        regions = sum(
            tissue[row : row + 32, col : col + 32].mean() > 0.25
            for row in range(0, tissue.shape[0], 32)
            for col in range(0, tissue.shape[1], 32)
        )
        assert regions >= 12
        assert 3 <= len(layout.extent) <= 5
        assert not tissue[:2].any() and not tissue[-2:].any() and not tissue[:, :2].any() and not tissue[:, -2:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--slides", "0"], "at least 1"),
        (["--workers", "0"], "at least 1"),
        (["--seed", "-1"], "at least 0"),
        (["--size", "100"], "512 to 16384"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, capsys, arguments, message):
    assert main(["--out", str(tmp_path / "x"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_two_cohorts_never_mix(cohort, capsys):
    assert main(["--out", str(cohort), "--slides", "9", "--seed", "3", "--quiet"]) == 2
    assert "another folder" in capsys.readouterr().err


def test_out_must_be_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.slow
def test_colour_alone_does_not_tell_the_concepts(tmp_path):
    """Nearest neighbours in mean colour: patches of 64 px of held-out slides against those of training slides."""
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import NearestNeighbors

    folder = generate(tmp_path / "cohort", 60, seed=1, workers=2, progress=False)
    slides, _ = _facts(folder)
    colours, concepts = {"train": [], "test": []}, {"train": [], "test": []}
    for row in slides:
        truth = _truth(folder, row)
        with openslide.OpenSlide(folder / f"{row['slide_id']}.tiff") as slide:
            image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
        split = "test" if row["split"] == "test" else "train"
        for y in range(0, truth.shape[0] - 63, 64):
            for x in range(0, truth.shape[1] - 63, 64):
                here = np.bincount(truth[y : y + 64, x : x + 64].ravel(), minlength=11)
                if here.argmax() and here.max() > 0.7 * 64 * 64:
                    colours[split].append(image[y : y + 64, x : x + 64].mean((0, 1)))
                    concepts[split].append(here.argmax() - 1)
    train, test = np.array(concepts["train"]), np.array(concepts["test"])
    nearest = NearestNeighbors(n_neighbors=15).fit(np.array(colours["train"]))
    votes = train[nearest.kneighbors(np.array(colours["test"]), return_distance=False)]
    scores = {name: roc_auc_score(test == i, (votes == i).mean(1)) for i, name in enumerate(CONCEPTS)}
    assert np.mean(list(scores.values())) < 0.62, scores


def test_survival_and_scores_depend_on_concepts_and_are_the_same_for_a_patient(texts):
    slides, reports = _facts(texts)
    there = {report["slide_id"]: set(report["concepts"]) for report in reports}
    patients = {row["patient_id"]: row for row in slides}
    for row in slides:
        other = patients[row["patient_id"]]
        assert all(row[name] == other[name] for name in ("os_months", "os_event", "age", "stage"))
        assert 0.1 <= float(row["os_months"]) <= 96 and row["os_event"] in ("0", "1")
    for split in ("train", "test"):
        own = [row for row in slides if row["split"] == split]
        assert 0.1 < np.mean([row["os_event"] == "0" for row in own]) < 0.5  # censored
        months, scores = (np.array([float(row[name]) for row in own]) for name in ("os_months", "immune_score"))
        bad, good, lymphoid = (
            np.array([concept in there[row["slide_id"]] for row in own])
            for concept in ("necrosis", "papillary fronds", "lymphoid aggregates")
        )
        assert np.median(months[bad]) < np.median(months[~bad]) and np.median(months[good]) > np.median(months[~good])
        assert scores[lymphoid].mean() > scores[~lymphoid].mean() + 8


def test_a_table_of_an_earlier_version_is_completed_without_drawing(tmp_path, monkeypatch):
    folder = generate(tmp_path / "cohort", 2, seed=5, workers=1, progress=False, size=SIZE)
    before, path = _digest(folder), folder / "slides.csv"
    path.write_text("\n".join(",".join(line.split(",")[:7]) for line in path.read_text().splitlines()) + "\n")
    monkeypatch.setattr(synthetic, "render", lambda *_: pytest.fail("a slide was drawn again"))
    generate(folder, 2, seed=5, workers=1, progress=False, size=SIZE)
    assert _digest(folder) == before

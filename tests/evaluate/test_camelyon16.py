"""The CAMELYON16 recipe on a stand-in of the same layout: drawn slides, ASAP files, a mask, the reference table."""

import csv
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from flax import nnx

from data_prep.layout import TUMORS, plan, rings
from data_prep.slide_image import render, write_slide
from pathflip_jax import cli
from pathflip_jax.data.readers.outlines import contains, rasterise, read_outlines
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.evaluate import camelyon16
from pathflip_jax.evaluate.tasks import froc
from pathflip_jax.evaluate.tasks.map_scores import concept_scores
from pathflip_jax.grounding.surface import smooth_patches
from pathflip_jax.inference.load import load
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs.folder import save_run

SQUARE = [(100, 100), (900, 100), (900, 900), (100, 900)]
INNER = [(300, 300), (500, 300), (500, 500), (300, 500)]
ISLAND = [(380, 380), (420, 380), (420, 420), (380, 420)]


def write_asap(path, areas):
    """An annotation file as ASAP writes it: (group, points) of each area."""
    root = ElementTree.Element("ASAP_Annotations")
    listed = ElementTree.SubElement(root, "Annotations")
    for number, (group, points) in enumerate(areas):
        known = {"Name": f"Annotation {number}", "Type": "Polygon", "PartOfGroup": group, "Color": "#F4FA58"}
        corners = ElementTree.SubElement(ElementTree.SubElement(listed, "Annotation", known), "Coordinates")
        for order, (x, y) in enumerate(points):
            ElementTree.SubElement(corners, "Coordinate", {"Order": str(order), "X": f"{x}", "Y": f"{y}"})
    ElementTree.SubElement(root, "AnnotationGroups")
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(path, encoding="unicode", xml_declaration=True)


@pytest.fixture
def download(tmp_path):
    """The folders of GigaDB, with slides that nobody opens, and every kind of annotation."""
    folder = tmp_path / "CAMELYON16"
    names = ["training/normal/normal_001", "training/tumor/tumor_001", "training/tumor/tumor_002"]
    names += [f"testing/images/test_{number:03d}" for number in (1, 2, 49, 114)] + ["training/tumor/Tumor_003"]
    for name in names:
        path = folder / f"{name}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"II*\0")
    areas = [("_0", SQUARE), ("_2", INNER), ("_1", ISLAND), ("None", SQUARE)]
    write_asap(folder / "training/lesion_annotations/tumor_001.xml", areas)
    write_asap(folder / "testing/lesion_annotations/test_001.xml", [("Tumor", SQUARE)])
    write_asap(folder / "testing/lesion_annotations/test_114.xml", [("Tumor", SQUARE)])
    mask = np.zeros((1024, 1024), np.uint8)
    mask[256:512, 128:640] = 255
    with tifffile.TiffWriter(folder / "training/tumor_002_mask.tif") as writer:
        writer.write(mask, tile=(256, 256), compression="zlib")
        writer.write(mask[::2, ::2], tile=(256, 256), compression="zlib", subfiletype=1)
    rows = ["test_001,Tumor,IDC,Macro", "test_002,Normal,None,None", "test_049,Tumor,IDC,Micro"]
    (folder / "testing/reference.csv").write_text("\n".join([*rows, "test_114,Tumor,IDC,Macro"]) + "\n")
    return folder


def test_the_download_becomes_a_cohort(download, tmp_path, capsys):
    out = download / "ready"  # inside the download: a second run must not take its own links for slides
    for _ in range(2):
        assert camelyon16.main([str(download), "--out", str(out)]) == 0
        said = capsys.readouterr().out
    assert "4 training and 3 test slides, 5 with tumor" in said
    assert "groups are left out: None" in said and "left out of grounding: tumor_003" in said
    with open(out / "slides.csv", newline="") as file:
        rows = {row["slide_id"]: (row["label"], row["split"]) for row in csv.DictReader(file)}
    assert rows == {
        "normal_001": ("Normal", "train"), "tumor_001": ("Tumor", "train"), "tumor_002": ("Tumor", "train"),
        "tumor_003": ("Tumor", "train"), "test_001": ("Tumor", "test"), "test_002": ("Normal", "test"),
        "test_114": ("Tumor", "test"),
    }  # fmt: skip
    links = {path.stem: path.resolve() for path in (out / "slides").iterdir()}
    assert set(links) == set(rows) and links["tumor_003"] == (download / "training/tumor/Tumor_003.tif").resolve()
    outlined = {path.stem: read_outlines(path) for path in (out / "outlines").iterdir()}
    assert set(outlined) == {"normal_001", "tumor_001", "tumor_002", "test_001", "test_002"}
    assert outlined["normal_001"] == outlined["test_002"] == {}
    points = np.array([(200, 200), (320, 320), (400, 400), (950, 950)], float)
    assert contains(outlined["tumor_001"]["tumor"], points).tolist() == [True, False, True, False]
    x, y = np.meshgrid(np.arange(20, 1024, 40), np.arange(20, 1024, 40))
    inside = contains(outlined["tumor_002"]["tumor"], np.stack([x.ravel(), y.ravel()], 1).astype(float))
    assert (inside == ((x >= 128) & (x < 640) & (y >= 256) & (y < 512)).ravel()).all()


def test_what_is_missing_or_broken_is_told(download, tmp_path, capsys):
    def told(folder):
        assert camelyon16.main([str(folder), "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert "no slides in it or its subfolders" in told(tmp_path / "empty")
    assert "no such folder" in told(tmp_path / "gone")
    xml = download / "training/lesion_annotations/tumor_001.xml"
    xml.write_text("<ASAP_Annotations><Annot")
    assert "tumor_001.xml: not an ASAP annotation file" in told(download)
    (download / "testing/reference.csv").write_text("test_001,Tumor\n")
    assert "no label for test_002, test_114" in told(download)
    (download / "testing/reference.csv").write_text("image,type\n")
    assert "reference.csv: no row like" in told(download)


def draw(folder, name, tumor, seed):
    """A slide of the embedded cohort, with or without its tumor; returns its outlines [ring, hole, ...]."""
    rng = np.random.default_rng(seed)
    layout = plan(rng, "glands", 1024)
    areas = tuple(area for area in layout.areas if tumor or area.concept not in TUMORS)
    layout = replace(layout, areas=areas)
    path = folder / f"{name}.tif"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_slide(path, render(layout, rng))
    return [polygon for area in areas if area.concept in TUMORS for polygon in rings(area.field)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A slide of each kind in training, three to test, the first of them normal."""
    folder = tmp_path_factory.mktemp("stand") / "CAMELYON16"
    draw(folder / "training/normal", "normal_001", False, 1)
    polygons = draw(folder / "training/tumor", "tumor_001", True, 2)
    areas = [("_0" if i == 0 else "_2", ring[:-1]) for polygon in polygons for i, ring in enumerate(polygon)]
    write_asap(folder / "training/lesion_annotations/tumor_001.xml", areas)
    labels = []
    for number in range(1, 4):
        polygons = draw(folder / "testing/images", f"test_{number:03d}", number > 1, 20 + number)
        labels.append(f"test_{number:03d},{'Tumor' if number > 1 else 'Normal'}")
        if number > 1:
            areas = [("Tumor" if i == 0 else "_2", ring[:-1]) for p in polygons for i, ring in enumerate(p)]
            write_asap(folder / f"testing/lesion_annotations/test_{number:03d}.xml", areas)
    (folder / "testing/reference.csv").write_text("\n".join(labels))
    return folder


@pytest.mark.slow
def test_every_command_of_the_recipe_runs(drawn, tmp_path, tiny_cohort, monkeypatch, capsys):
    """The commands of docs/camelyon16.md, word for word but for the encoder and the size of drawn slides."""
    document = Path(__file__).parents[2] / "docs" / "camelyon16.md"
    commands = re.findall(r"^```\n(.*?)\n```$", document.read_text(), re.MULTILINE | re.DOTALL)
    first, prepare, evaluate = (shlex.split(line) for line in commands)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CAMELYON16").symlink_to(drawn)
    assert first[:3] == ["python", "-m", "pathflip_jax.evaluate.camelyon16"]
    assert camelyon16.main(first[3:]) == 0
    at = prepare.index("--encoder")
    assert prepare[at : at + 4] == ["--encoder", "conch_v1", "--weights", "conch"]
    prepare[at : at + 4] = ["--encoder", "stain_texture"]
    assert cli.main([*prepare[1:], "--patch-size", "64", "--edge-um", "128", "--workers", "1"]) == 0
    records = Records(tmp_path / "camelyon16/records")
    width = records.read(0).features.shape[1]
    config = PathFLIPConfig(
        feature_dim=width, embed_dim=16, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2, vocab_size=200,
        max_positions=128, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
    )  # fmt: skip
    data = {"encoder": "stain_texture", "cut": "grid", "edge_um": 128.0, "edge_px": None, "caption_length": 96}
    (tmp_path / "runs").mkdir()
    save_run(
        tmp_path / "runs/base", PathFLIP(config, nnx.Rngs(0)), {"data": data}, TextTokenizer(tiny_cohort.vocabulary)
    )
    assert cli.main(evaluate[1:]) == 0
    found = json.loads((tmp_path / "camelyon16/scores/scores.json").read_text())
    assert found["zero_shot"]["classes"] == {"Normal": 1, "Tumor": 2}
    grounding = found["grounding"]
    assert grounding["slides"] == 2 and grounding["threshold_slides"] == 2
    for metric in ("auc", "pointing", "dice"):
        assert 0 <= grounding[metric]["value"] <= 1 and "mean_colour" in grounding[metric]

    # FROC anew: the outlines rasterised and widened here, detections by plain loops over the model's own map
    predictor = load(tmp_path / "runs/base")
    slides, lesions_of = [], {}
    for number in range(1, 4):
        slide = records.read(records.position(f"test_{number:03d}"))
        (scores,) = smooth_patches(concept_scores(predictor, slide, camelyon16.TEXTS), slide.coords, 64, 0.5)
        polygons = read_outlines(tmp_path / f"camelyon16/outlines/{slide.slide_id}.geojson").get("tumor", [])
        mask = rasterise(polygons, (slide.height // 16 + 1, slide.width // 16 + 1), (0, 0), 16)
        areas = froc.lesions_of_mask(mask, 16, 0.5).areas
        lesions_of[number] = [area for area in areas if area.counts]
        kept: list[tuple[float, np.ndarray]] = []
        for i in np.argsort(-scores, kind="stable"):
            centre = slide.coords[i] + slide.patch_size / 2
            if all(np.linalg.norm(centre - other) > 3 * slide.patch_size for _, other in kept):
                kept.append((float(scores[i]), centre))
        slides.append((areas, kept))
    total = sum(len(listed) for listed in lesions_of.values())
    assert grounding["froc"]["lesions"] == total > 0 and grounding["froc"]["slides"] == 3

    def hit(area, centre):
        column, row = (centre / 16).astype(int) - (area.column, area.row)
        return 0 <= row < area.mask.shape[0] and 0 <= column < area.mask.shape[1] and area.mask[row, column]

    curve = [(0.0, 0.0)]
    for threshold in sorted({score for _, kept in slides for score, _ in kept}, reverse=True):
        sure = [(areas, [centre for score, centre in kept if score >= threshold]) for areas, kept in slides]
        false = sum(not any(hit(area, c) for area in areas) for areas, centres in sure for c in centres)
        right = sum(any(hit(area, c) for c in centres) for areas, centres in sure for area in areas if area.counts)
        curve.append((false / 3, right / total))
    for rate in (0.25, 0.5, 1, 2, 4, 8):
        below = [point for point in curve if point[0] <= rate][-1]
        above = next((point for point in curve if point[0] > rate), (rate + 1, below[1]))
        expected = below[1] + (rate - below[0]) / (above[0] - below[0]) * (above[1] - below[1])
        assert grounding["froc"]["at"][f"{rate:g}"]["value"] == pytest.approx(expected, abs=1e-6)
    page = (tmp_path / "camelyon16/scores/report.html").read_text()
    assert "Lesion detection (FROC), tumor" in page

"""A made-up collection of tissue images: colours as classes, halves as masks, several cases of each class."""

import csv

import numpy as np
import pytest
from PIL import Image

EDGE, CASES = 128, 6
COLOURS = {
    "Normal": (200, 120, 180),
    "Polyp": (150, 90, 200),
    "Low-grade IN": (220, 80, 140),
    "Adenocarcinoma": (120, 40, 120),
}


def _image(rng, colour):
    pixels = np.clip(np.array(colour) + rng.normal(0, 18, (EDGE, EDGE, 3)), 0, 255).astype(np.uint8)
    mask = np.zeros((EDGE, EDGE), np.uint8)
    mask[:, : EDGE // 2] = 255
    return Image.fromarray(pixels), Image.fromarray(mask)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A folder in the layout of EBHI-Seg as published; one case number has two prefixes and two classes."""
    folder, rng = tmp_path_factory.mktemp("tissue") / "EBHI", np.random.default_rng(0)
    for number, (name, colour) in enumerate(COLOURS.items()):
        (folder / name / "image").mkdir(parents=True)
        (folder / name / "label").mkdir()
        for case in range(CASES):
            for block in range(2):
                prefix = "GTxc" if block else "GT"
                stem = f"{prefix}20{number:02d}{case:02d}-1-400-{block:03d}"
                pixels, mask = _image(rng, colour)
                pixels.save(folder / name / "image" / f"{stem}.png")
                mask.save(folder / name / "label" / f"{stem}.png")
    return folder


@pytest.fixture
def subset(published, tmp_path):
    """write(rows_of) writes a copy in the layout with labels.csv; `rows_of` may change its rows."""

    def write(change=lambda rows: rows):
        folder = tmp_path / "subset"
        for name in ("images", "masks"):
            (folder / name).mkdir(parents=True)
        rows = []
        for path in sorted(published.glob("*/image/*.png")):
            stem = f"{path.parent.parent.name}__{path.stem}"
            (folder / "images" / f"{stem}.png").write_bytes(path.read_bytes())
            mask = path.parent.parent / "label" / path.name
            (folder / "masks" / f"{stem}.png").write_bytes(mask.read_bytes())
            case = path.stem.split("-")[0]
            rows.append(
                {
                    "image": f"images/{stem}.png",
                    "mask": f"masks/{stem}.png",
                    "class": path.parent.parent.name.lower().replace("-", "_").replace(" ", "_"),
                    "case": case,
                    "split": "test" if case.endswith("00") else "train",
                }
            )
        rows = change(rows)
        with open(folder / "labels.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return folder

    return write


@pytest.fixture
def textures_file(tmp_path):
    """write(**changes) writes made-up texture features: seven classes of tiles from eight slides, two held out."""

    def write(**changes):
        rng = np.random.default_rng(0)
        label = np.tile(np.arange(8, dtype=np.int8), 160)
        slide = np.array([f"{1 + number // 8 % 8:02d}" for number in range(len(label))])
        features = rng.normal(size=(len(label), 9)).astype(np.float32) + 2 * np.eye(8, 9, dtype=np.float32)[label]
        features[0, 0] = np.nan
        names = ["TUMOR", "STROMA", "COMPLEX", "LYMPHO", "DEBRIS", "MUCOSA", "ADIPOSE", "EMPTY"]
        region = [f"{name}_{number // 64 % 5:03d}" for number, name in enumerate(slide)]
        arrays = {
            "features": features,
            "label": label,
            "classes": np.array([f"{number:02d}_{name}" for number, name in enumerate(names, 1)]),
            "slide": slide,
            "region": np.array(region),
            "test": np.isin(slide, ["05", "08"]),
        } | changes
        path = tmp_path / "textures.npz"
        np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
        return path

    return write

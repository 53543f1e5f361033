"""Grounding methods: their help and page, and one more, which a class and an entry add."""

import re
from pathlib import Path

import numpy as np
import pytest

from pathflip_jax import cli
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.grounding import maps, methods
from pathflip_jax.grounding.method import ATTENTION, REGIONS, SLIDES
from pathflip_jax.grounding.methods import METHODS
from pathflip_jax.grounding.window_methods import Cosine

PAGE = (Path(__file__).parents[2] / "docs" / "grounding_methods.md").read_text()


class Encoder:
    """A model whose regions and slides are means of features, and whose attention is uniform."""

    patchwise, default_method, name = False, "slide", "runs/one"

    def __init__(self, untrained=(), unaligned=()):
        self.untrained = dict.fromkeys(untrained, "loss.region_weight is 0")
        self.unaligned = dict.fromkeys(unaligned, "loss.region_weight is 0")

    def bag(self, slide):
        return maps_bag(slide.features, np.array([[0, 1], [2, -1]]))

    def encode_slots(self, features, slots, attention=False):
        rows = np.stack([[own[i[i >= 0]].mean(0) for i in index] for own, index in zip(features, slots, strict=True)])
        heads = np.ones((len(rows), 1, 1, *np.shape(slots)[1:]))
        return Encoding(rows.mean(1), rows, heads)

    def encode_texts(self, texts):
        found = np.eye(3)[[("fat", "gland", "mucin").index(text) for text in texts]]
        return Texts(found, found)

    def attend_regions(self, texts, regions):
        return np.full((len(texts), len(regions)), 1 / len(regions))

    def attend_single_regions(self, regions):
        return regions


class Encoding:
    def __init__(self, slide, regions, region_attention):
        self.slide, self.regions, self.region_attention = slide, regions, region_attention


class Texts:
    def __init__(self, slide, region):
        self.slide, self.region = slide, region


def maps_bag(features, slots):
    return type("Bag", (), {"features": features, "slots": slots})


def make_slide(**changes):
    values = {"slide_id": "S", "case_id": "P", "coords": np.array([[0, 0], [256, 0], [512, 0]], np.int32)}
    values |= {"features": np.eye(3, dtype=np.float32), "patch_size": 256, "mpp": 0.5, "width": 768, "height": 256}
    return SlideFeatures(**values | {"encoder": ""} | changes)


@pytest.mark.parametrize(
    ("part", "resting", "trained"),
    [
        (ATTENTION, ["region", "attention", "patch", "similarity"], "cosine, slide"),
        (REGIONS, ["region", "attention", "patch", "similarity", "cosine"], "slide"),
        (SLIDES, ["slide"], "region, attention, patch, similarity, cosine"),
    ],
)
def test_a_map_of_weights_that_were_never_trained_is_refused(part, resting, trained):
    encoder, refused = Encoder(untrained=[part]), []
    for name in METHODS:
        try:
            methods.prepare(encoder, make_slide(), method=name)
        except ValueError as error:
            refused.append(name)
            told = f"runs/one: method {name!r} maps {part}, whose weights this run never trained "
            assert str(error) == f"{told}(loss.region_weight is 0); use a trained one: {trained}"
    assert refused == resting


def test_trained_methods_are_those_of_the_family():
    assert methods.trained_methods(Encoder()) == list(METHODS)
    encoder = Encoder(untrained=[SLIDES])
    encoder.patchwise = True
    assert methods.trained_methods(encoder) == ["region", "patch", "similarity", "cosine"]


def test_a_map_that_is_only_a_baseline_is_noted_once(caplog):
    encoder = Encoder(unaligned=[REGIONS])
    for name in [*METHODS, *METHODS]:
        methods.prepare(encoder, make_slide(), method=name)
    noted = [record.getMessage() for record in caplog.records]
    assert len(noted) == 5 and all("runs/one: method" in line and line.endswith("methods: slide") for line in noted)
    assert "method 'cosine' maps region embeddings, which this run never compared with texts" in noted[-1]


def test_regions_are_not_scored_by_an_attention_that_was_not_trained():
    encoder = Encoder(untrained=[ATTENTION])
    prepared = methods.prepare(encoder, make_slide(), method="slide")
    found = methods.score(encoder, prepared, ["gland"], negative=["fat"])
    assert np.isnan(found.region_scores).all() and np.isfinite(found.patch_scores).all()
    assert np.isfinite(ground("slide").region_scores).all()


def ground(name, texts=("gland",), **how):
    encoder = Encoder()
    return methods.score(encoder, methods.prepare(encoder, make_slide(), method=name, **how), texts)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scores_every_patch(name):
    found = ground(name)
    assert found.method == name and found.patch_scores.shape == (1, 3) and found.region_scores.shape == (1, 2)
    if name in ("slide", "cosine", "similarity"):
        assert found.patch_scores[0] == pytest.approx([0, 1, 0])
    else:
        assert found.patch_scores[0] == pytest.approx(np.zeros(3), abs=1e-6)  # attention is uniform


def test_the_page_and_the_help_say_what_each_method_is(capsys):
    rows = dict(re.findall(r"^\| `(\w+)` \| ([a-z][^|]*[a-z]) \|$", PAGE, re.MULTILINE))
    assert rows == {name: method.description for name, method in METHODS.items()}
    for command in ("ground", "evaluate"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert all(f"{name}: {method.description}" in told for name, method in METHODS.items())
        assert "default: slide for pathflip, cosine for pathflip2" in told


def test_one_more_method_is_a_class_and_an_entry(monkeypatch, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    place = {"Cosine": Cosine, "maps": maps}
    exec(code, place)
    monkeypatch.setitem(METHODS, "weighted", place["Weighted"]())
    assert ground("weighted").patch_scores[0] == pytest.approx(ground("cosine").patch_scores[0], abs=1e-6)
    with pytest.raises(SystemExit):
        cli.main(["ground", "--help"])
    assert "weighted: the cosine of each window plus the score of its region" in " ".join(
        capsys.readouterr().out.split()
    )


def test_what_a_method_cannot_do_is_refused():
    encoder = Encoder()
    with pytest.raises(ValueError, match="'magic' is not supported; expected one of region, attention"):
        methods.prepare(encoder, make_slide(), method="magic")
    with pytest.raises(ValueError, match=r"size of its patches is unknown.*--patch-size"):
        methods.prepare(encoder, make_slide(patch_size=0), window=3)
    encoder.patchwise = True
    with pytest.raises(ValueError, match="'attention' refines region scores.*use method 'region'"):
        methods.prepare(encoder, make_slide(), method="attention")

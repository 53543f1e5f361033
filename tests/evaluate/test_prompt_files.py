"""Zero-shot classification: prompt files, ensembles and the nearest class."""

import json

import numpy as np
import pytest

from pathflip_jax.evaluate import prompt_files as zero_shot


def write(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8-sig")
    return path


def test_templates_say_every_text_in_every_way(tmp_path):
    content = {"task": "t", "templates": ["{}.", "an H&E image of {}."], "classes": {"a": ["x", "y"], "b": "z"}}
    found = zero_shot.read_prompts(write(tmp_path, content))
    assert found.task == "t"
    assert found.classes == {
        "a": ["x.", "an H&E image of x.", "y.", "an H&E image of y."],
        "b": ["z.", "an H&E image of z."],
    }


def test_concepts_of_grounding_need_no_wrapping(tmp_path):
    assert zero_shot.read_prompts(write(tmp_path, {"fat": ["adipose tissue"]})).classes == {"fat": ["adipose tissue"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": {"a": ["x"], "b": []}}, "'b' needs a list of texts"),
        ({"classes": {"a": ["x"], "b": ["  "]}}, "'b' needs a list of texts"),
        ({"classes": {"a": ["x"], "b": ["?!"]}}, "'b' needs a list of texts"),
        ({"classes": {"a": ["x"], "b": [3]}}, "'b' needs a list of texts"),
        ('{"classes": {"a": ["x"], "a": ["y"]}}', "'a' stands there twice"),
        ({"classes": {"a": ["Same"], "b": ["same "]}}, "stands for class 'a' and 'b'"),
        ({"classes": {}}, "no classes"),
        ({"task": "t"}, "no classes"),
        ({"templates": ["an image"], "classes": {"a": ["x"]}}, "must hold {} once"),
        ([], "expected"),
        ("{", "Expecting"),
        ("[" * 100_000, "nested too deeply"),
        ({"templates": 3, "classes": {"a": ["x"]}}, "must hold {} once"),
        ({"templates": [["{}"]], "classes": {"a": ["x"]}}, "must hold {} once"),
    ],
)
def test_faulty_prompt_files_name_the_fault(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        zero_shot.read_prompts(write(tmp_path, content))
    assert "prompts.json" in str(error.value)


def test_an_ensemble_is_the_mean_of_unit_embeddings():
    vectors = {"x": [3.0, 0, 0], "y": [0, 0.1, 0], "z": [0, 0, -2.0]}
    found = zero_shot.class_embeddings(
        lambda texts: np.array([vectors[t] for t in texts]), {"a": ["x", "y"], "b": ["z"]}
    )
    assert found == pytest.approx(np.array([[0.5**0.5, 0.5**0.5, 0], [0, 0, -1]]), abs=1e-6)


def test_probabilities_follow_the_cosine():
    rng = np.random.default_rng(0)
    slides, classes = rng.normal(size=(7, 5)) * 9, zero_shot.normalise(rng.normal(size=(3, 5)))
    found = zero_shot.class_probabilities(slides, classes)
    cosine = (slides / np.linalg.norm(slides, axis=1, keepdims=True)) @ classes.T
    expected = np.exp(cosine / 0.1) / np.exp(cosine / 0.1).sum(1, keepdims=True)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found.argmax(1).tolist() == cosine.argmax(1).tolist()


SHIPPED = sorted(path.stem for path in zero_shot.SHIPPED.glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_prompts_are_sound(name):
    """Every class has synonyms, every text is an ensemble over templates, and no text stands for two classes."""
    found = zero_shot.read_prompts(zero_shot.find_prompts(name))
    assert found.task and all(len(texts) >= 10 for texts in found.classes.values())
    texts = [text for listed in found.classes.values() for text in listed]
    assert len(set(texts)) == len(texts)


def test_shipped_prompts_know_the_labels_of_published_tables():
    found = {name: zero_shot.read_prompts(zero_shot.find_prompts(name)) for name in SHIPPED}
    assert {name: len(prompts.classes) for name, prompts in found.items()} == {
        "bracs": 7, "camelyon16": 2, "cptac-nsclc": 2, "tcga-cancer-types": 32, "tcga-nsclc": 2, "tcga-rcc": 3,
    }  # fmt: skip
    assert [found["tcga-rcc"].class_of(label) for label in ("TCGA-KICH", "kirc", "other", None)] == [
        "KICH", "KIRC", "other", None,
    ]  # fmt: skip
    assert list(found["camelyon16"].classes) == ["Normal", "Tumor"]  # the second is what published F1 scores count


def test_a_file_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert zero_shot.find_prompts("bracs").parent == zero_shot.SHIPPED
    (tmp_path / "bracs").write_text("{}")
    assert zero_shot.find_prompts("bracs").resolve() == tmp_path / "bracs"
    with pytest.raises(FileNotFoundError, match="brac: no such prompt file; those shipped are named bracs, camelyon16"):
        zero_shot.find_prompts("brac")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"spellings": {"a": ["b"]}}, "'b' is a spelling of 'b' and 'a'"),
        ({"spellings": {"c": ["x"]}}, "spellings must be"),
        ({"spellings": {"a": "x"}}, "must be a list of labels"),
        ({"classes": {"a": ["x"], "A": ["y"]}}, "capital letters only"),
    ],
)
def test_faulty_spellings_name_the_fault(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        zero_shot.read_prompts(write(tmp_path, {"classes": {"a": ["x"], "b": ["y"]}} | more))


def test_one_text_for_each_class(tmp_path):
    content = {"templates": ["{}.", "image of {}."], "classes": {"a": ["x", "y"], "b": "z"}}
    assert zero_shot.read_prompts(write(tmp_path, content)).first_texts().classes == {"a": ["x."], "b": ["z."]}

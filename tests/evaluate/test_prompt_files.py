"""Prompt files: texts of classes, templates, spellings, and the shipped ones."""

import json

import pytest

from pathflip_jax.evaluate import prompt_files


def write(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8-sig")
    return path


def test_templates_say_every_text_in_every_way(tmp_path):
    content = {"task": "t", "templates": ["{}.", "an H&E image of {}."], "classes": {"a": ["x", "y"], "b": "z"}}
    found = prompt_files.read_prompts(write(tmp_path, content))
    assert found.task == "t"
    assert found.classes == {
        "a": ["x.", "an H&E image of x.", "y.", "an H&E image of y."],
        "b": ["z.", "an H&E image of z."],
    }


def test_concepts_of_grounding_need_no_wrapping(tmp_path):
    assert prompt_files.read_prompts(write(tmp_path, {"fat": ["adipose tissue"]})).classes == {
        "fat": ["adipose tissue"]
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": {"a": ["x"], "b": []}}, "'b' needs a list of texts"),
        ({"classes": {"a": ["x"], "b": ["  "]}}, "'b' needs a list of texts"),
        ({"classes": {"a": ["x"], "b": ["?!"]}}, "'b' needs a list of texts"),
        ({"classes": {"a": ["x"], "b": [3]}}, "'b' needs a list of texts"),
        ('{"classes": {"a": ["x"], "a": ["y"]}}', "'a' is given twice"),
        ({"classes": {"a": ["Same"], "b": ["same "]}}, "is a text of both 'a' and 'b'"),
        ({"classes": {}}, "no classes"),
        ({"task": "t"}, "no classes"),
        ({"templates": ["an image"], "classes": {"a": ["x"]}}, "must contain {} exactly once"),
        ([], "expected"),
        ("{", "Expecting"),
        ("[" * 100_000, "nested too deeply"),
        ({"templates": 3, "classes": {"a": ["x"]}}, "must contain {} exactly once"),
        ({"templates": [["{}"]], "classes": {"a": ["x"]}}, "must contain {} exactly once"),
    ],
)
def test_faulty_prompt_files_name_the_fault(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        prompt_files.read_prompts(write(tmp_path, content))
    assert "prompts.json" in str(error.value)


SHIPPED = sorted(path.stem for path in prompt_files.SHIPPED.glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_prompts_are_sound(name):
    """Every class has synonyms, every text is an ensemble over templates, and no text stands for two classes."""
    found = prompt_files.read_prompts(prompt_files.find_prompts(name))
    assert found.task and all(len(texts) >= 10 for texts in found.classes.values())
    texts = [text for listed in found.classes.values() for text in listed]
    assert len(set(texts)) == len(texts)


def test_shipped_prompts_know_the_labels_of_published_tables():
    found = {name: prompt_files.read_prompts(prompt_files.find_prompts(name)) for name in SHIPPED}
    assert {name: len(prompts.classes) for name, prompts in found.items()} == {
        "bracs": 7, "camelyon16": 2, "cptac-nsclc": 2, "tcga-cancer-types": 32, "tcga-nsclc": 2, "tcga-rcc": 3,
    }  # fmt: skip
    assert [found["tcga-rcc"].class_of(label) for label in ("TCGA-KICH", "kirc", "other", None)] == [
        "KICH", "KIRC", "other", None,
    ]  # fmt: skip
    assert list(found["camelyon16"].classes) == ["Normal", "Tumor"]  # the second is what published F1 scores count


def test_a_file_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prompt_files.find_prompts("bracs").parent == prompt_files.SHIPPED
    (tmp_path / "bracs").write_text("{}")
    assert prompt_files.find_prompts("bracs").resolve() == tmp_path / "bracs"
    with pytest.raises(FileNotFoundError, match="brac: no such prompt file; expected a file or one of bracs, "):
        prompt_files.find_prompts("brac")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"spellings": {"a": ["b"]}}, "'b' is a spelling of both 'b' and 'a'"),
        ({"spellings": {"c": ["x"]}}, "spellings must be"),
        ({"spellings": {"a": "x"}}, "must be a list of labels"),
        ({"classes": {"a": ["x"], "A": ["y"]}}, "only in upper and lower case"),
    ],
)
def test_faulty_spellings_name_the_fault(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        prompt_files.read_prompts(write(tmp_path, {"classes": {"a": ["x"], "b": ["y"]}} | more))


def test_one_text_for_each_class(tmp_path):
    content = {"templates": ["{}.", "image of {}."], "classes": {"a": ["x", "y"], "b": "z"}}
    assert prompt_files.read_prompts(write(tmp_path, content)).first_texts().classes == {"a": ["x."], "b": ["z."]}

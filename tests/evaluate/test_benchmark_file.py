"""Benchmark files: options by name, paths relative to the file, and unknown keys refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip_jax import cli
from pathflip_jax.evaluate import run
from pathflip_jax.evaluate.benchmark_file import read_benchmark
from pathflip_jax.inference.predictor import Embedding


def write(folder, text):
    path = folder / "benchmark.yaml"
    path.write_text(text, encoding="utf-8-sig")
    return path


def test_tasks_share_what_stands_at_the_top(tmp_path):
    text = """
records: records
slides: memory://bucket/slides.csv
split: val
strict: true
tasks:
  rcc: {prompts: tcga-rcc, few-shot: [1, all]}
  os: {survival-time: OS_MONTHS, survival-event: OS_STATUS, survival-strata: site, clinical: age, regression: ki67}
  own: {split: test, prompts: prompts.json, labels: TP53, compare-to: [runs/other], clear: 0, seed: 3}
"""
    found = read_benchmark(write(tmp_path, text))
    shared = {"records": tmp_path / "records", "strict": True}
    assert (
        found["rcc"].pop("slides").as_posix() == found["own"].pop("slides").as_posix() == "memory://bucket/slides.csv"
    )
    assert found["rcc"] == shared | {"split": "val", "prompts": Path("tcga-rcc"), "few_shot": ("1", "all")}
    survival = {"survival_time": "OS_MONTHS", "survival_event": "OS_STATUS", "survival_strata": "site"}
    survival |= {"split": "val", "clinical": ("age",), "regression": ("ki67",)}
    assert found["os"] | {"slides": ""} == shared | survival | {"slides": ""}
    assert found["own"] == shared | {
        "split": "test", "prompts": tmp_path / "prompts.json", "labels": ("TP53",), "clear": 0.0, "seed": 3,
        "compare_to": (tmp_path / "runs/other",),
    }  # fmt: skip


def test_without_tasks_the_file_is_one(tmp_path):
    assert read_benchmark(write(tmp_path, "texts: reports.jsonl\nregion_texts: roi.csv\n")) == {
        "": {"texts": tmp_path / "reports.jsonl", "region_texts": tmp_path / "roi.csv"}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promts: tcga-rcc", r"unknown key 'promts' \(did you mean 'prompts'\?\); expected one of .*records.*slides"),
        ("tasks: {a: {out: x}}", "unknown key 'out'"),
        ("records: a\nrecords: b", "'records' is given twice"),
        ("tasks: {a: {}, a: {}}", "'a' is given twice"),
        ("records: [a]", "records: .'a'. is not valid for this option"),
        ("strict: 1", "strict: 1 is not"),
        ("seed: true", "seed: True is not"),
        ("seed: 3.5", "seed: 3.5 is not"),
        ("protocol: kind", "protocol: 'kind' is not"),
        ("method: guess", "method: 'guess' is not"),
        ("labels: &a [x]\nfew-shot: *a", "references .* are not supported"),
        ("few-shot: [[1]]", "few-shot"),
        ("tasks: [a]", "tasks must name tasks"),
        ("tasks: {../a: {}}", "cannot be the name of a folder"),
        ("tasks: {a: 3}", "must be a mapping of keys, found 3"),
        ("- a", "expected keys such as"),
        ("", "expected keys such as"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("? {a: 1}\n: 2", "not valid YAML|unknown key"),
    ],
)
def test_what_no_option_takes_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark(write(tmp_path, text))
    assert "benchmark.yaml" in str(error.value)


WORDS = [
    "records", "tasks", "few-shot", "split", "a", ": ", "\n", "  ", "- ", "{", "}", "[", "]", "&x ", "*x", "!!int ",
    "~", "1e9", "2020-13-45", "<<", "? ", "'", '"', "#", "|", ">", "0x", "...", "---", "\t", "é",
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), st.text(max_size=20)))
def test_whatever_stands_in_it_is_read_or_refused_by_name(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "benchmark.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        assert read_benchmark(path)
    except ValueError as error:
        assert "benchmark.yaml" in str(error)


class Guessing:
    """Says the same of everything."""

    name, config = "guessing", {}

    def encode_slides(self, slides):
        return (Embedding(slide.slide_id, np.ones(4), np.ones((1, 4)), np.zeros((1, 2))) for slide in slides)

    def encode_text(self, texts):
        return np.ones((len(texts), 4))


def test_the_command_runs_every_task_and_its_own_options_win(tiny_cohort, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "load", lambda folder: Guessing())
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(run, "is_language_run", lambda folder: False)
    (tmp_path / "prompts.json").write_text('{"classes": {"glandular": ["glands"], "solid": ["solid sheets"]}}')
    path = write(
        tmp_path,
        f"records: {tiny_cohort.records}\ntasks:\n  classes: {{prompts: prompts.json}}\n"
        f"  reports: {{texts: {tiny_cohort.texts}, split: val}}\n",
    )
    command = ["evaluate", str(tmp_path / "run"), "--tasks", str(path), "--out", str(tmp_path / "out")]
    assert cli.main(command) == cli.WRONG_INPUT
    assert "benchmark.yaml, task classes: no slides; give --slides" in capsys.readouterr().err
    assert cli.main([*command, "--slides", str(tiny_cohort.slides), "--seed", "3"]) == 0
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    pages = [str(tmp_path / "out" / name / "report.html") for name in ("classes", "reports")]
    assert printed[0] == "classes" and printed.index("reports") == printed.index(pages[0]) + 1
    assert printed[-1] == pages[1], "the scores end with where their report lies"
    assert any(line.startswith("Zero-shot, 2 classes: balanced accuracy 0.50 ") for line in printed)
    assert any(line.startswith("Retrieval, slide to text: R@1 of ") for line in printed)
    assert "split “val”" in (tmp_path / "out/reports/report.html").read_text()
    assert "split “test”" in (tmp_path / "out/classes/report.html").read_text()
    assert "seed 3" in (tmp_path / "out/classes/scores.json").read_text()

"""The specification of an evaluation: one list of inputs for Python, the command line and YAML."""

from dataclasses import fields
from pathlib import Path

import pytest

from pathflip_jax import cli
from pathflip_jax.commands.evaluate import _specs
from pathflip_jax.evaluate.spec import FLAG, NUMBER, SPEC_OPTIONS, EvaluationSpec, option_name
from pathflip_jax.grounding.maps import SMOOTH
from pathflip_jax.runs.bounds import OPTIONS

NEEDED = {"run": "run", "records": "records", "slides": "slides.csv", "out": "scores"}


def specs_of(*arguments):
    options = cli.build_parser().parse_args(["evaluate", "run", *arguments])
    options.command_line = ["evaluate"]
    return _specs(options)


def test_every_input_is_an_option_of_the_command_with_its_help():
    parser = next(a for a in cli.build_parser()._actions if getattr(a, "choices", None)).choices["evaluate"]
    actions = {action.option_strings[0]: action for action in parser._actions if action.option_strings}
    for name, option in SPEC_OPTIONS.items():
        action = actions.pop(f"--{option_name(name)}")
        assert action.help == option.help and (action.nargs == 0) == (option.kind == FLAG)
    assert set(actions) == {"-h", "--tasks", "--out", "--json"}
    given_by_the_call = {"run", "out", "name", "command"}
    assert {field.name for field in fields(EvaluationSpec)} == set(SPEC_OPTIONS) | given_by_the_call


def test_numbers_have_bounds_and_defaults_within_them():
    spec = EvaluationSpec(**NEEDED)
    assert spec.smooth == SMOOTH
    for name, option in SPEC_OPTIONS.items():
        if option.kind == NUMBER and getattr(spec, name) is not None:
            assert OPTIONS[option_name(name)].holds(getattr(spec, name)), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"draws": 0}, "draws 0: expected a whole number of at least 1"),
        ({"smooth": float("nan")}, "smooth nan: expected a finite number"),
        ({"seed": 1.5}, "seed 1.5: expected a whole number"),
        ({"protocol": "kind"}, "protocol 'kind': expected one of strict, paper"),
        ({"method": "guess"}, "method 'guess': expected one of region"),
    ],
)
def test_values_out_of_bounds_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSpec(**NEEDED | fields)


def test_one_value_of_a_list_needs_no_brackets():
    spec = EvaluationSpec(**NEEDED, labels="tp53", compare_to=Path("other"), few_shot=16)
    assert (spec.labels, spec.compare_to, spec.few_shot) == (("tp53",), (Path("other"),), (16,))
    assert spec.runs == ["run"] and EvaluationSpec(**NEEDED | {"run": ["a", "b"]}).runs == ["a", "b"]


def test_python_command_line_and_yaml_build_the_same(tmp_path):
    (tmp_path / "tasks.yaml").write_text(
        f"records: {tmp_path}/records\nslides: {tmp_path}/slides.csv\nprompts: tcga-rcc\nfew-shot: [1, all]\n"
        "labels: tp53\nseed: 3\nstrict: true\nclear: 0.25\nmax-tokens: 7\n"
    )
    places = ["--records", f"{tmp_path}/records", "--slides", f"{tmp_path}/slides.csv", "--out", "out"]
    more = ["--prompts", "tcga-rcc", "--few-shot", "1", "all", "--labels", "tp53", "--seed", "3", "--strict"]
    (by_command,) = specs_of(*places, *more, "--clear", "0.25", "--max-tokens", "7").values()
    (by_file,) = specs_of("--tasks", str(tmp_path / "tasks.yaml"), "--out", "out").values()
    by_python = EvaluationSpec(
        run=[Path("run")], records=tmp_path / "records", slides=tmp_path / "slides.csv", out=Path("out"), strict=True,
        prompts=Path("tcga-rcc"), few_shot=("1", "all"), labels="tp53", seed=3, clear=0.25, max_tokens=7,
        command=["evaluate"],
    )  # fmt: skip
    assert by_command == by_file == by_python
    assert by_python.sampling.max_new_tokens == 7 and by_python.sampling.seed == 3


def test_an_option_given_wins_over_the_file_even_if_it_is_the_default(tmp_path):
    (tmp_path / "tasks.yaml").write_text("records: r\nslides: s.csv\nseed: 3\nsplit: val\n")
    (spec,) = specs_of("--tasks", str(tmp_path / "tasks.yaml"), "--out", "out", "--seed", "0").values()
    assert (spec.seed, spec.split) == (0, "val")

"""`pathflip evaluate`: scores of a trained model."""

import argparse
import json
from pathlib import Path

from pathflip_jax.commands.options import RUN_HELP, add_spec_options, command, local_path, place
from pathflip_jax.evaluate.spec import SPEC_OPTIONS, EvaluationSpec, option_name


def add(commands) -> None:
    """Add the command and its options, which are the fields of `EvaluationSpec`."""
    parser = command(
        commands,
        "evaluate",
        _run,
        "pathflip evaluate runs/base --records records --texts reports.jsonl --slides slides.csv --out scores",
        "pathflip evaluate runs/base --records records --slides slides.csv --prompts tcga-rcc --few-shot --out scores",
        "pathflip evaluate runs/base --records records --slides slides.csv --survival-time os_months --survival-event "
        "os_event --clinical age stage --out scores",
        "pathflip evaluate runs/base --tasks benchmark.yaml --out scores",
        "pathflip evaluate runs/lm2 --records records --texts reports.csv --questions vqa.csv --slides slides.csv "
        "--out scores",
    )
    parser.add_argument(
        "run_folders",
        type=place,
        nargs="+",
        metavar="RUN",
        help=f"{RUN_HELP}; several (seeds of one experiment) are scored as their mean",
    )
    parser.add_argument(
        "--tasks",
        type=local_path,
        metavar="YAML",
        help="benchmark file: the options below (without --) for one or several tasks, paths relative to the file; "
        "options of the command line override it",
    )
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="folder to write scores, figures and report to"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    add_spec_options(parser, SPEC_OPTIONS)


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.evaluate.report import in_terminal
    from pathflip_jax.evaluate.run import evaluate

    scores = {name: evaluate(spec) for name, spec in _specs(options).items()}
    if options.json:
        print(json.dumps(scores if set(scores) != {""} else scores[""]))
        return 0
    for name, found in scores.items():
        print("\n".join([*([name] if name else []), in_terminal(found), str(options.out / name / "report.html")]))
    return 0


def _specs(options: argparse.Namespace) -> dict[str, EvaluationSpec]:
    """Specification of every task of the benchmark file, by name; without a file one, of the options, named ""."""
    tasks: dict[str, dict] = {"": {}}
    if options.tasks is not None:
        from pathflip_jax.evaluate.benchmark_file import read_benchmark

        tasks = read_benchmark(options.tasks)
    given = {field: value for field, value in vars(options).items() if field in SPEC_OPTIONS}
    call = {"run": options.run_folders, "command": options.command_line}
    found = {}
    for name, task in tasks.items():
        fields = task | given
        for needed in ("records", "slides"):
            if needed not in fields:
                where = f"{options.tasks}{', task ' + name if name else ''}: " if options.tasks else ""
                option = f"--{option_name(needed)}"
                raise ValueError(f"{where}no {needed}; give {option}, or a benchmark file that names them (--tasks)")
        found[name] = EvaluationSpec(**fields, **call, out=Path(options.out) / name, name=name)
    return found

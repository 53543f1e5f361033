"""`pathflip evaluate`: scores of a trained model."""

import argparse
import json
from pathlib import Path

from pathflip_jax.commands.options import (
    add_grounding_options,
    add_smooth_option,
    add_writing_options,
    command,
    local_path,
    number,
    place,
    sampling,
)


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "evaluate",
        _run,
        "score a trained model: retrieval, zero-shot and few-shot classification, grounding; captions and answers",
        "pathflip evaluate runs/base --records records --texts reports.jsonl --slides slides.csv --out scores",
        "pathflip evaluate runs/base --records records --slides slides.csv --prompts tcga-rcc --few-shot --out scores",
        "pathflip evaluate runs/base --tasks benchmark.yaml --out scores",
        "pathflip evaluate runs/lm2 --records records --texts reports.csv --questions vqa.csv --slides slides.csv "
        "--out scores",
    )
    parser.add_argument(
        "run_folders", type=place, nargs="+", metavar="RUN", help="run folder; several (seeds of one run): their mean"
    )
    parser.add_argument("--records", type=place, help="folder of records")
    parser.add_argument("--slides", type=place, metavar="CSV", help="slide_id, patient_id, label, split")
    parser.add_argument("--split", default="test", help="split to score (default test)")
    parser.add_argument(
        "--tasks",
        type=local_path,
        metavar="YAML",
        help="file that names the options below, of one or several tasks (keys as here without --, paths relative to "
        "the file); an option given here too wins",
    )
    parser.add_argument("--strict", action="store_true", help="stop at a faulty split (pathflip split --check)")
    parser.add_argument(
        "--protocol",
        default="strict",
        metavar="NAME",
        help="strict (default), or paper: the published script's arithmetic, where optimistic the report says so",
    )
    parser.add_argument("--texts", type=place, help="text table: scores retrieval")
    parser.add_argument(
        "--region-texts", type=place, metavar="TABLE", help="captions of slides of one region, or of a point x, y"
    )
    parser.add_argument(
        "--prompts",
        type=local_path,
        metavar="JSON",
        help="texts of each class, or the name of a shipped file: zero-shot",
    )
    parser.add_argument(
        "--few-shot", nargs="*", metavar="K", help="probes on K training slides per class, or all (default 1 4 16)"
    )
    parser.add_argument(
        "--labels", nargs="+", default=["label"], metavar="COLUMN", help="columns for --few-shot (default label)"
    )
    parser.add_argument(
        "--label-table", type=place, metavar="CSV", help="where these are (mutations, say), by slide_id or patient_id"
    )
    parser.add_argument("--draws", type=number("draws"), default=5, metavar="N", help="draws of every K (default 5)")
    parser.add_argument("--grounding", type=local_path, metavar="JSON", help="texts of each concept: scores grounding")
    parser.add_argument("--outlines", type=local_path, metavar="DIR", help="true outlines, <slide_id>.geojson")
    parser.add_argument(
        "--images", type=local_path, metavar="DIR", help="slide files, for thumbnails and colour baselines"
    )
    parser.add_argument(
        "--compare-to", type=place, nargs="+", metavar="RUN", help="as many other runs, compared slide by slide"
    )
    parser.add_argument(
        "--language", type=place, metavar="RUN", help="run of a language stage: scores its captions and answers too"
    )
    parser.add_argument("--questions", type=place, metavar="TABLE", help="questions for the language stage")
    parser.add_argument(
        "--concepts", type=local_path, metavar="JSON", help="phrasings of each concept: which ones do captions assert?"
    )
    add_writing_options(parser, max_tokens=384)
    add_grounding_options(parser)
    add_smooth_option(parser)
    parser.add_argument(
        "--clear",
        type=number("clear"),
        metavar="SHARE",
        help="patches cut by an outline by more than this share do not count",
    )
    parser.add_argument(
        "--lesions",
        metavar="CONCEPT",
        help="concept whose outlines are lesions to detect: scores FROC as CAMELYON16 does",
    )
    parser.add_argument("--seed", type=number("seed"), default=0, help="seed of the bootstrap (default 0)")
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="folder of scores, figures, report"
    )
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    parser.set_defaults(default_of=parser.get_default)


def _run(options: argparse.Namespace) -> int:
    tasks = {"": {}}
    if options.tasks is not None:
        from pathflip_jax.evaluate.benchmark_file import read_tasks

        tasks = read_tasks(options.tasks)
    given = {name: value for name, value in vars(options).items() if value != options.default_of(name)}
    wanted = {name: argparse.Namespace(**vars(options) | task | given) for name, task in tasks.items()}
    for name, one in wanted.items():
        for needed in ("records", "slides"):
            if getattr(one, needed) is None:
                where = f"{options.tasks}{', task ' + name if name else ''}: " if options.tasks else ""
                raise ValueError(f"{where}no {needed}; give --{needed}, or a file of tasks that names them (--tasks)")
    scores = {name: _evaluate(one, options.out / name, name) for name, one in wanted.items()}
    if options.json:
        print(json.dumps(scores if set(scores) != {""} else scores[""]))
    else:
        from pathflip_jax.evaluate.report import in_terminal

        for name, found in scores.items():
            print("\n".join([*([name] if name else []), in_terminal(found), str(options.out / name / "report.html")]))
    return 0


def _evaluate(options: argparse.Namespace, out: Path, name: str) -> dict:
    from pathflip_jax.evaluate.run import evaluate

    return evaluate(
        options.run_folders,
        records=options.records,
        slides=options.slides,
        split=options.split,
        strict=options.strict,
        protocol=options.protocol,
        texts=options.texts,
        region_texts=options.region_texts,
        prompts=options.prompts,
        shots=options.few_shot,
        labels=options.labels,
        label_table=options.label_table,
        draws=options.draws,
        grounding=options.grounding,
        outlines=options.outlines,
        images=options.images,
        compare_to=options.compare_to,
        language=options.language,
        questions=options.questions,
        phrasings=options.concepts,
        sampling=sampling(options),
        out=out,
        seed=options.seed,
        command=options.command_line,
        method=options.method,
        window=options.window,
        clear=options.clear,
        smooth=options.smooth,
        lesions=options.lesions,
        name=name,
    )

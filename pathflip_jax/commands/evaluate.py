"""`pathflip evaluate`: scores of a trained model."""

import argparse
import json
from pathlib import Path

from pathflip_jax.commands.options import add_grounding_options, add_writing_options, command, place, sampling


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "evaluate",
        _run,
        "score a trained model: retrieval, zero-shot classification, grounding; captions and answers",
        "pathflip evaluate runs/base --records records --texts reports.jsonl --slides slides.csv --out scores",
        "pathflip evaluate runs/lm2 --records records --texts reports.csv --questions vqa.csv --slides slides.csv "
        "--out scores",
    )
    parser.add_argument(
        "run_folders", type=place, nargs="+", metavar="RUN", help="run folder; several (seeds of one run): their mean"
    )
    parser.add_argument("--records", type=place, required=True, help="folder of records")
    parser.add_argument("--texts", type=place, help="text table: scores retrieval")
    parser.add_argument("--slides", type=place, required=True, metavar="CSV", help="slide_id, patient_id, label, split")
    parser.add_argument("--split", default="test", help="split to score (default test)")
    parser.add_argument("--prompts", type=Path, metavar="JSON", help="texts of each class: scores zero-shot")
    parser.add_argument("--grounding", type=Path, metavar="JSON", help="texts of each concept: scores grounding")
    parser.add_argument("--outlines", type=Path, metavar="DIR", help="true outlines, <slide_id>.geojson")
    parser.add_argument("--images", type=Path, metavar="DIR", help="slide files, for thumbnails and colour baselines")
    parser.add_argument(
        "--compare-to", type=place, nargs="+", metavar="RUN", help="as many other runs, compared slide by slide"
    )
    parser.add_argument(
        "--language", type=place, metavar="RUN", help="run of a language stage: scores its captions and answers too"
    )
    parser.add_argument("--questions", type=place, metavar="TABLE", help="questions for the language stage")
    parser.add_argument(
        "--concepts", type=Path, metavar="JSON", help="phrasings of each concept: which ones do captions assert?"
    )
    add_writing_options(parser, max_tokens=384)
    add_grounding_options(parser)
    parser.add_argument(
        "--clear", type=float, metavar="SHARE", help="patches cut by an outline by more than this share do not count"
    )
    parser.add_argument(
        "--lesions",
        metavar="CONCEPT",
        help="concept whose outlines are lesions to detect: scores FROC as CAMELYON16 does",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of scores, figures, report")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.evaluate.run import evaluate

    scores = evaluate(
        options.run_folders,
        records=options.records,
        texts=options.texts,
        slides=options.slides,
        split=options.split,
        prompts=options.prompts,
        grounding=options.grounding,
        outlines=options.outlines,
        images=options.images,
        compare_to=options.compare_to,
        language=options.language,
        questions=options.questions,
        phrasings=options.concepts,
        sampling=sampling(options),
        out=options.out,
        seed=options.seed,
        command=options.command_line,
        method=options.method,
        window=options.window,
        clear=options.clear,
        lesions=options.lesions,
    )
    print(json.dumps(scores) if options.json else options.out / "report.html")
    return 0

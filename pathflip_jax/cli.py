"""The `pathflip` command: one subcommand per job, each importing what it needs only when it runs.

Exit codes: 0 done; 1 done, but some slides failed (the list says which); 2 wrong input, with the cure;
75 stopped by a signal after saving, or ended by a hang or a lost host, to be started again (schedulers know this as
"temporary failure").
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

from pathflip_jax.compilation import keep_compiled
from pathflip_jax.data.storage import Place, as_path, is_url
from pathflip_jax.demo import SLIDES
from pathflip_jax.grounding import maps

FAILED_SLIDES, WRONG_INPUT = 1, 2
RESEARCH_ONLY = "For research use only: not a medical device, not for diagnosis."


def _command(commands, name: str, run, summary: str, *examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="\n  ".join(["example:" if len(examples) == 1 else "examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _shard(text: str) -> tuple[int, int]:
    try:
        number, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n, such as 0/8") from None
    if not 0 <= number < count:
        raise argparse.ArgumentTypeError(f"{text!r}: i counts from 0 and is smaller than n")
    return number, count


def _place(text: str) -> Place:
    try:
        return as_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_records_options(parser: argparse.ArgumentParser) -> None:
    """What `prepare` and `import` share: where records go, how regions are cut, what happens to a bad slide."""
    parser.add_argument("--out", type=_place, required=True, metavar="RECORDS", help="folder of the records to write")
    parser.add_argument("--cut", choices=["grid", "scan"], default="grid", help="squares, or runs of stored patches")
    parser.add_argument("--edge-um", type=float, default=2048.0, metavar="UM", help="edge of a region (default 2048)")
    parser.add_argument(
        "--slides", type=_place, metavar="CSV", help="slide table with slide_id and patient_id: names the cases"
    )
    parser.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="this job's share, for job arrays")
    parser.add_argument("--slides-per-shard", type=int, default=32, metavar="N", help="slides in one file (default 32)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that share a machine and its GPUs (default: its cores)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slide")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument(
        "--beam",
        nargs=argparse.REMAINDER,
        metavar="OPTION",
        help="let Apache Beam spread the slides (extra [beam]); all that follows are its own options, of its "
        "DirectRunner if none names a runner. Every machine must see the slides and RECORDS under the same paths",
    )


def _beam_examples(command: str) -> list[str]:
    """The same command by Apache Beam: in processes here, on a Flink cluster, on Dataflow."""
    shared = f"pathflip {command} --out /mnt/records --beam"
    flink = "--runner=FlinkRunner --flink_master=HOST:8081"
    dataflow = "--runner=DataflowRunner --project=P --region=us-central1 --temp_location=gs://B/temp"
    return [
        f"{shared} --direct_running_mode=multi_processing --direct_num_workers=4",
        f"{shared} {flink} --environment_type=DOCKER --environment_config=IMAGE",
        f"{shared} {dataflow} --sdk_container_image=IMAGE --number_of_worker_harness_threads=1",
    ]


def _add_grounding_options(parser: argparse.ArgumentParser) -> None:
    """What `evaluate` and `ground` share: how a text becomes a map."""
    parser.add_argument(
        "--method",
        choices=maps.METHODS,
        default=maps.DEFAULT_METHOD,
        help=f"how to map a text on patches (default {maps.DEFAULT_METHOD})",
    )
    parser.add_argument(
        "--window", type=int, default=maps.WINDOW, metavar="N", help=f"patches across a window (default {maps.WINDOW})"
    )


def _records_settings(options: argparse.Namespace) -> dict:
    names = ("cut", "edge_um", "shard", "slides_per_shard", "workers", "strict", "beam")
    return {name: getattr(options, name) for name in names} | {"slides_table": options.slides}


def _print_report(report, as_json: bool, **more) -> int:
    """What a job over many slides did, for people or as JSON with `more` facts; the exit code."""
    if as_json:
        failed = [failure._asdict() for failure in report.failed]
        print(json.dumps({"done": report.done, "skipped": report.skipped, "failed": failed} | more))
    else:
        print(report.summary())
    return FAILED_SLIDES if report.failed else 0


def _prepare(options: argparse.Namespace) -> int:
    from data_prep.build import prepare

    report = prepare(
        options.slides_folder,
        options.out,
        encoder=options.encoder,
        patch_size=options.patch_size,
        mpp=options.mpp,
        assume_mpp=options.assume_mpp,
        min_tissue=options.min_tissue,
        half=options.half,
        **_records_settings(options),
    )
    return _print_report(report, options.json)


def _import(options: argparse.Namespace) -> int:
    from data_prep.build import import_features

    report = import_features(
        options.features_folder,
        options.out,
        encoder=options.encoder,
        patch_size=options.patch_size,
        mpp=options.mpp,
        **_records_settings(options),
    )
    return _print_report(report, options.json)


def _vocabulary(options: argparse.Namespace) -> int:
    from pathflip_jax.data.text import match_texts, read_slide_table, read_texts
    from pathflip_jax.data.tokens import train_wordpiece

    texts = read_texts(options.texts)
    if options.split:
        if not options.slides:
            raise ValueError("--split needs the slide table that names the splits: add --slides slides.csv")
        wanted = [row["slide_id"] for row in read_slide_table(options.slides) if row.get("split") == options.split]
        if not wanted:
            raise ValueError(
                f"{options.slides}: no slide of split {options.split!r}; the column says train, val or test"
            )
        texts = match_texts(texts, wanted)
    train_wordpiece([text.caption for text in texts], options.out, vocab_size=options.size)
    print(f"{options.out}: a WordPiece vocabulary from {len(texts)} texts")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
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
        out=options.out,
        seed=options.seed,
        command=options.command_line,
        method=options.method,
        window=options.window,
        clear=options.clear,
    )
    print(json.dumps(scores) if options.json else options.out / "report.html")
    return 0


def _ground(options: argparse.Namespace) -> int:
    from pathflip_jax.grounding.heatmap import draw_grounding
    from pathflip_jax.inference import load, read_slide

    predictor = load(options.checkpoint)
    slide = read_slide(options.slide, slide_id=options.slide_id)
    grounding = predictor.ground(slide, options.texts, method=options.method, window=options.window)
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / f"{slide.slide_id}.png"
    draw_grounding(grounding, picture, image=options.image)
    scores = options.out / f"{slide.slide_id}.npz"
    np.savez(scores, texts=grounding.texts, patch_scores=grounding.patch_scores, coords=grounding.coords)
    if options.json:
        print(json.dumps({"picture": str(picture), "scores": str(scores)}))
    else:
        print(f"{picture}\n{scores}")
    return 0


def _embed(options: argparse.Namespace) -> int:
    from pathflip_jax.embed import embed

    report = embed(
        options.checkpoint,
        options.records,
        options.out,
        slides_table=options.slides,
        split=options.split,
        regions=options.regions,
        batch_size=options.batch_size,
        strict=options.strict,
    )
    return _print_report(report, options.json, slides_per_second=report.slides_per_second)


def _convert(options: argparse.Namespace) -> int:
    from pathflip_jax.convert.pytorch import convert

    convert(options.source, options.out, heads=options.heads, bert_folder=options.bert)
    print(f"{options.out}: a run folder that `pathflip evaluate` and pathflip_jax.load read")
    return 0


def _export(options: argparse.Namespace) -> int:
    from pathflip_jax.convert.pytorch import export

    export(options.run_folder, options.out, which=options.which, pt=options.pt)
    print(f"{options.out}: PyTorch weights under the released model's names, with how to load them")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from pathflip_jax.doctor import examine, print_findings

    findings = examine(records=options.records, texts=options.texts, configs=options.config)
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        print_findings(findings)
    return WRONG_INPUT if any(finding.state == "fault" for finding in findings) else 0


def _demo(options: argparse.Namespace) -> int:
    from pathflip_jax.demo import run_demo

    return run_demo(options.out, slides=options.slides, seed=options.seed, workers=options.workers)


def _goodput(options: argparse.Namespace) -> int:
    import dataclasses

    from pathflip_jax.goodput import as_dict, describe, summarise

    found = summarise(options.run_folder)
    if options.preemptions_per_day is not None:
        found = dataclasses.replace(found, preemptions_per_day=options.preemptions_per_day)
    print(json.dumps(as_dict(found)) if options.json else describe(found))
    return 0


def _train_help(_: argparse.Namespace) -> int:
    raise AssertionError("main() hands `train` over before this parser sees it")


def build_parser() -> argparse.ArgumentParser:
    """All subcommands with their options; every one has an example in its --help."""
    parser = argparse.ArgumentParser(
        prog="pathflip", description=f"Vision-language models for whole slide images. {RESEARCH_ONLY}"
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = _command(
        commands,
        "demo",
        _demo,
        "the main job on an embedded cohort: slides to report, in about 10 minutes",
        "pathflip demo --out demo",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder of everything it makes (default demo)")
    demo.add_argument("--slides", type=int, default=SLIDES, help=f"slides of the cohort (default {SLIDES})")
    demo.add_argument("--seed", type=int, default=0, help="seed of cohort and training (default 0)")
    demo.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes (default: cores)")

    doctor = _command(
        commands,
        "doctor",
        _doctor,
        "examine versions, devices, memory, data and configs, and say what to do about each fault",
        "pathflip doctor --records records --texts reports.jsonl --config align_base",
    )
    doctor.add_argument("--records", type=_place, help="folder of records: every checksum is read")
    doctor.add_argument("--texts", type=_place, help="text table: does it match the records?")
    doctor.add_argument("--config", action="append", default=[], help="training config to check (may be repeated)")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")

    prepare = _command(
        commands,
        "prepare",
        _prepare,
        "turn slides into records of patch features",
        "pathflip prepare slides/ --out records --slides slides.csv --shard 0/8",
        *_beam_examples("prepare /mnt/slides --encoder hf:/mnt/phikon"),
    )
    prepare.add_argument("slides_folder", type=Path, metavar="SLIDES", help="folder of slides that OpenSlide opens")
    prepare.add_argument(
        "--encoder",
        default="stain_texture",
        help="stain_texture (embedded), timm:NAME or hf:FOLDER (default stain_texture)",
    )
    prepare.add_argument("--patch-size", type=int, default=256, metavar="PX", help="edge of a patch at --mpp (256)")
    prepare.add_argument("--mpp", type=float, default=0.5, metavar="UM", help="micrometres per pixel (default 0.5)")
    prepare.add_argument("--assume-mpp", type=float, metavar="UM", help="level-0 mpp of slides that do not say it")
    prepare.add_argument("--min-tissue", type=float, default=0.25, help="tissue share of a patch (default 0.25)")
    prepare.add_argument("--half", action="store_true", help="encode in half precision (encoders that are networks)")
    _add_records_options(prepare)

    importing = _command(
        commands,
        "import",
        _import,
        "turn feature files of CLAM, TRIDENT, SlideChat or STAMP into records",
        "pathflip import features/ --out records --mpp 0.5",
        *_beam_examples("import /mnt/features"),
    )
    importing.add_argument("features_folder", type=Path, metavar="DIR", help="folder of feature files")
    importing.add_argument("--encoder", help="patch encoder that made them, where the files do not say")
    importing.add_argument("--patch-size", type=int, metavar="PX", help="level-0 edge of a patch, where unknown")
    importing.add_argument("--mpp", type=float, metavar="UM", help="level-0 micrometres per pixel, where unknown")
    _add_records_options(importing)

    vocabulary = _command(
        commands,
        "vocabulary",
        _vocabulary,
        "train a small WordPiece vocabulary where no BERT folder is at hand",
        "pathflip vocabulary reports.jsonl --slides slides.csv --split train --out vocabulary",
    )
    vocabulary.add_argument("texts", type=_place, metavar="TEXTS", help="text table")
    vocabulary.add_argument("--slides", type=_place, metavar="CSV", help="slide table that names the splits")
    vocabulary.add_argument("--split", help="use only the texts of this split")
    vocabulary.add_argument("--size", type=int, default=2000, help="most words (default 2000)")
    vocabulary.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="Hugging Face BERT folder")

    _command(
        commands,
        "train",
        _train_help,
        "train a model; options are settings of the config",
        "pathflip train --config align_base --config.data.records=records --workdir runs/base",
    )

    goodput = _command(
        commands,
        "goodput",
        _goodput,
        "say where the time of a run went, and how often to save",
        "pathflip goodput runs/base --preemptions-per-day 4",
    )
    goodput.add_argument("run_folder", type=Path, metavar="RUN", help="run folder; the run may be under way")
    goodput.add_argument(
        "--preemptions-per-day", type=float, metavar="N", help="stops to reckon with, instead of the run's setting"
    )
    goodput.add_argument("--json", action="store_true", help="print it as JSON, in seconds and shares")

    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "score a trained model: retrieval, zero-shot classification, grounding",
        "pathflip evaluate runs/base --records records --texts reports.jsonl --slides slides.csv --out scores",
    )
    evaluate.add_argument(
        "run_folders", type=_place, nargs="+", metavar="RUN", help="run folder; several (seeds of one run): their mean"
    )
    evaluate.add_argument("--records", type=_place, required=True, help="folder of records")
    evaluate.add_argument("--texts", type=_place, help="text table: scores retrieval")
    evaluate.add_argument(
        "--slides", type=_place, required=True, metavar="CSV", help="slide_id, patient_id, label, split"
    )
    evaluate.add_argument("--split", default="test", help="split to score (default test)")
    evaluate.add_argument("--prompts", type=Path, metavar="JSON", help="texts of each class: scores zero-shot")
    evaluate.add_argument("--grounding", type=Path, metavar="JSON", help="texts of each concept: scores grounding")
    evaluate.add_argument("--outlines", type=Path, metavar="DIR", help="true outlines, <slide_id>.geojson")
    evaluate.add_argument("--images", type=Path, metavar="DIR", help="slide files, for thumbnails and colour baselines")
    evaluate.add_argument(
        "--compare-to", type=_place, nargs="+", metavar="RUN", help="as many other runs, compared slide by slide"
    )
    _add_grounding_options(evaluate)
    evaluate.add_argument(
        "--clear", type=float, metavar="SHARE", help="patches cut by an outline by more than this share do not count"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default 0)")
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of scores, figures, report")
    evaluate.add_argument("--json", action="store_true", help="print the scores as JSON")

    ground = _command(
        commands,
        "ground",
        _ground,
        "show where on a slide a text is seen",
        'pathflip ground features/S1.h5 "tumor necrosis" --checkpoint runs/base --image slides/S1.svs --out maps',
    )
    ground.add_argument(
        "slide", type=_place, metavar="SLIDE", help="feature file, or folder of records with --slide-id"
    )
    ground.add_argument("texts", nargs="+", metavar="TEXT", help="one or several texts")
    ground.add_argument("--slide-id", help="slide of a folder of records")
    ground.add_argument("--checkpoint", type=_place, required=True, metavar="RUN", help="run folder")
    ground.add_argument("--image", type=Path, metavar="FILE", help="the slide file, drawn under the heatmap")
    _add_grounding_options(ground)
    ground.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    ground.add_argument("--json", action="store_true", help="print the files written as JSON")

    embed = _command(
        commands,
        "embed",
        _embed,
        "embed every slide of a folder of records into one Parquet file",
        "pathflip embed records --checkpoint runs/base --out embeddings.parquet",
    )
    embed.add_argument("records", type=_place, metavar="RECORDS", help="folder of records")
    embed.add_argument("--checkpoint", type=_place, required=True, metavar="RUN", help="run folder")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help="Parquet file to write")
    embed.add_argument("--slides", type=_place, metavar="CSV", help="slide table: embed only its slides")
    embed.add_argument("--split", help="with --slides: only the slides of this split")
    embed.add_argument("--regions", action="store_true", help="also the embedding of each region, and its place")
    embed.add_argument("--batch-size", type=int, default=8, metavar="N", help="slides in one call (default 8)")
    embed.add_argument("--strict", action="store_true", help="stop at the first bad slide")
    embed.add_argument("--json", action="store_true", help="print the outcome as JSON")

    convert = _command(
        commands,
        "convert",
        _convert,
        "turn a PyTorch checkpoint of the released model into a run folder",
        "pathflip convert epoch9.ckpt --bert bert_folder --out runs/released",
    )
    convert.add_argument("source", type=Path, metavar="CHECKPOINT", help=".ckpt, .pt, .bin or .safetensors")
    convert.add_argument("--bert", type=Path, required=True, metavar="FOLDER", help="its BERT folder (the tokenizer)")
    convert.add_argument("--heads", type=int, help="attention heads, where the BERT folder's config.json lacks them")
    convert.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to write")

    export = _command(
        commands,
        "export",
        _export,
        "write a trained model for PyTorch users",
        "pathflip export runs/base --to pytorch --out exported",
    )
    export.add_argument("run_folder", type=_place, metavar="RUN", help="run folder")
    export.add_argument("--to", choices=["pytorch"], default="pytorch", help="what to write (default pytorch)")
    export.add_argument("--which", choices=["best", "latest"], default="best", help="checkpoint (default best)")
    export.add_argument("--pt", action="store_true", help="also write model.pt, for code that reads no safetensors")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    return parser


def _refuse_urls(options: argparse.Namespace, argv: list[str]) -> None:
    """Raise ValueError for a URL where a local path belongs: pathlib would make a folder called "gs:" of it."""
    given = [value for values in vars(options).values() for value in (values if isinstance(values, list) else [values])]
    for url in (text.partition("=")[2] if text.startswith("--") else text for text in argv):
        if is_url(url) and Path(url) in given:
            raise ValueError(f"{url}: a local path is needed here; records, reports and slide tables may be URLs")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; wrong input becomes one clear line on stderr (PATHFLIP_DEBUG=1 shows the traceback)."""
    argv = sys.argv[1:] if argv is None else argv
    keep_compiled()
    try:
        if argv[:1] == ["train"]:
            from pathflip_jax.train import main as train_main

            return train_main(argv[1:])
        options = build_parser().parse_args(argv)
        _refuse_urls(options, argv)
        options.command_line = argv
        return options.run(options)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        if os.environ.get("PATHFLIP_DEBUG"):
            raise
        print(f"pathflip: {error}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        print("pathflip: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

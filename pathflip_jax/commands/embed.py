"""`pathflip embed`: embeddings of slides and their regions."""

import argparse

from pathflip_jax.commands.options import RUN_HELP, add_fold_option, command, local_path, number, place, print_report


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "embed",
        _run,
        "embed every slide of a folder of records into one Parquet file",
        "pathflip embed records --checkpoint runs/base --out embeddings.parquet",
    )
    parser.add_argument("records", type=place, metavar="RECORDS", help="folder of records")
    parser.add_argument("--checkpoint", type=place, required=True, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--out", type=local_path, required=True, metavar="FILE", help="Parquet file to write")
    parser.add_argument("--slides", type=place, metavar="CSV", help="slide table: embed only the slides in it")
    add_fold_option(parser)
    parser.add_argument("--split", help="with --slides: only the slides of this split")
    parser.add_argument(
        "--regions", action="store_true", help="also write the embedding and the location of each region"
    )
    parser.add_argument(
        "--batch-size", type=number("batch-size"), default=8, metavar="N", help="slides per batch (default 8)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slide")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.data.texts.split_files import one_fold
    from pathflip_jax.inference.embed import embed

    report = embed(
        options.checkpoint,
        options.records,
        options.out,
        slides_table=one_fold(options.slides, options.fold),
        split=options.split,
        regions=options.regions,
        batch_size=options.batch_size,
        strict=options.strict,
    )
    return print_report(report, options.json, slides_per_second=report.slides_per_second)

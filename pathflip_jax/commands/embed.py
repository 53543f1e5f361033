"""`pathflip embed`: embeddings of slides and their regions."""

import argparse
from dataclasses import replace

from pathflip_jax.commands.options import RUN_HELP, command, local_path, number, place, print_report
from pathflip_jax.commands.slide_sources import add_encoding_options, add_fact_options, slide_reader


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "embed",
        _run,
        "pathflip embed records --checkpoint runs/base --out embeddings.parquet",
        "pathflip embed slides --checkpoint runs/base --out embeddings.parquet",
    )
    parser.add_argument(
        "records",
        type=place,
        metavar="SLIDES",
        help="folder of records, of slide files or of feature files, or one such file",
    )
    parser.add_argument("--checkpoint", type=place, required=True, metavar="RUN", help=RUN_HELP)
    parser.add_argument("--out", type=local_path, required=True, metavar="FILE", help="Parquet file to write")
    parser.add_argument("--slides", type=place, metavar="CSV", help="slide table: embed only the slides in it")
    parser.add_argument("--split", help="with --slides: only the slides of this split")
    parser.add_argument(
        "--regions", action="store_true", help="also write the embedding and the location of each region"
    )
    parser.add_argument(
        "--batch-size", type=number("batch-size"), default=8, metavar="N", help="slides per batch (default 8)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slide")
    add_fact_options(parser)
    add_encoding_options(parser)
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.inference.embed import embed, write_failures
    from pathflip_jax.inference.load import load
    from pathflip_jax.inference.sources import is_records

    predictor, unread, archive = load(options.checkpoint), [], options.records
    if not is_records(options.records):
        reader = slide_reader(options, predictor)
        found = reader.find(options.records)
        unread += found.failed
        archive = reader.records(found.slides, unread)
        archive.where = str(options.records)
    report = embed(
        predictor,
        archive,
        options.out,
        slides_table=options.slides,
        split=options.split,
        regions=options.regions,
        batch_size=options.batch_size,
        strict=options.strict,
    )
    if unread:
        report = replace(report, failed=[*unread, *report.failed])
        write_failures(options.out, report.failed)
    return print_report(report, options.json, slides_per_second=report.slides_per_second)

"""`pathflip embed`: embeddings of slides and their regions."""

import argparse
from dataclasses import replace

from pathflip_jax.commands.options import RUN_HELP, add_fold_option, command, local_path, number, place, print_report
from pathflip_jax.commands.slide_sources import add_encoding_options, add_fact_options, slide_reader


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "embed",
        _run,
        "pathflip embed records --checkpoint runs/base --out embeddings.parquet",
        "pathflip embed slides --checkpoint runs/base --out embeddings.parquet",
        "pathflip embed records --checkpoint runs/base --slides slides.csv --level region --out regions.h5ad",
    )
    parser.add_argument(
        "records",
        type=place,
        metavar="SLIDES",
        help="folder of records, of slide files or of feature files, or one such file",
    )
    parser.add_argument("--checkpoint", type=place, required=True, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="FILE",
        help="Parquet (.parquet) or AnnData (.h5ad) file to write",
    )
    parser.add_argument(
        "--slides",
        type=place,
        metavar="CSV",
        help="slide table: embed only the slides in it; its columns go into AnnData",
    )
    add_fold_option(parser)
    parser.add_argument("--split", help="with --slides: only the slides of this split")
    parser.add_argument(
        "--regions", action="store_true", help="also write the embedding and the location of each region"
    )
    parser.add_argument(
        "--level",
        choices=["slide", "region", "patch"],
        help="observations of an AnnData file (default slide); patch: embeddings of PathFLIP2, else the features of "
        "the records",
    )
    parser.add_argument(
        "--batch-size", type=number("batch-size"), default=8, metavar="N", help="slides per batch (default 8)"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slide")
    add_fact_options(parser)
    add_encoding_options(parser)
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.data.texts.split_files import one_fold
    from pathflip_jax.inference.anndata_file import EXTENSION, embed_anndata
    from pathflip_jax.inference.embed import embed, write_failures
    from pathflip_jax.inference.load import load

    _check_level(options, EXTENSION)
    predictor, unread = load(options.checkpoint), []
    paths = (predictor, _records(options, predictor, unread), options.out)
    shared = {name: getattr(options, name) for name in ("split", "batch_size", "strict")}
    shared["slides_table"] = one_fold(options.slides, options.fold)
    if options.out.suffix.lower() == EXTENSION:
        level = options.level or ("region" if options.regions else "slide")
        report = embed_anndata(*paths, level=level, **shared)
    else:
        report = embed(*paths, regions=options.regions, **shared)
    if unread:
        report = replace(report, failed=[*unread, *report.failed])
        write_failures(options.out, report.failed)
    return print_report(report, options.json, slides_per_second=report.slides_per_second)


def _check_level(options: argparse.Namespace, extension: str) -> None:
    """Raise ValueError where the level contradicts other options."""
    anndata = options.out.suffix.lower() == extension
    if anndata and options.regions and options.level not in (None, "region"):
        raise ValueError(
            f"--regions contradicts --level {options.level}; an AnnData file holds one level: drop one of them"
        )
    if options.level and not anndata:
        raise ValueError(
            f"--level is for AnnData files: name the file {options.out.with_suffix(extension).name}; Parquet holds "
            "slides, and with --regions their regions"
        )


def _records(options: argparse.Namespace, predictor, unread: list):
    """Records to embed: a folder of them, else those of slides and feature files; bad ones are added to `unread`."""
    from pathflip_jax.inference.sources import is_records

    if is_records(options.records):
        return options.records
    reader = slide_reader(options, predictor)
    found = reader.find(options.records)
    unread += found.failed
    archive = reader.records(found.slides, unread)
    archive.where = str(options.records)
    return archive

"""`pathflip report`: slides and the grounding of texts on them, as a static web page."""

import argparse

from pathflip_jax.commands.options import (
    RUN_HELP,
    add_grounding_options,
    command,
    local_path,
    number,
    place,
    print_report,
)


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "report",
        _run,
        'pathflip report runs/base --records records --slides-dir slides --texts "tumor necrosis" "fat" --out page',
        'pathflip report runs/base --features features --texts "necrosis" --negative "normal tissue" --slide-ids S1 S2 '
        "--out page",
    )
    parser.add_argument("checkpoint", type=place, metavar="RUN", help=RUN_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--records", type=place, help="folder of records")
    source.add_argument(
        "--features", type=local_path, metavar="DIR", help="folder of feature files, instead of records"
    )
    parser.add_argument(
        "--slides-dir",
        type=local_path,
        metavar="DIR",
        help="folder of slide files, named by slide id; without it, maps are drawn on white",
    )
    parser.add_argument("--texts", nargs="+", required=True, metavar="TEXT", help="texts to look for")
    parser.add_argument("--negative", nargs="+", default=[], metavar="TEXT", help="texts whose scores are subtracted")
    parser.add_argument("--slide-ids", nargs="+", metavar="ID", help="slides to show (default: all)")
    parser.add_argument(
        "--most-slides",
        type=number("most-slides"),
        metavar="N",
        help="show the N slides that are most similar to any of the texts",
    )
    parser.add_argument(
        "--max-pixels",
        type=number("max-pixels"),
        default=8192,
        metavar="N",
        help="longer side in pixels of the finest level written (default 8192, about 15 MB per slide; 0: all levels)",
    )
    parser.add_argument(
        "--quality",
        type=number("quality"),
        default=82,
        metavar="Q",
        help="JPEG quality of the tiles, 1 to 95 (default 82)",
    )
    add_grounding_options(parser)
    parser.add_argument("--out", type=local_path, required=True, metavar="DIR", help="folder to write the page to")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.viewer.report import PageSpec, report

    spec = PageSpec(
        options.checkpoint,
        options.texts,
        options.out,
        records=options.records,
        features=options.features,
        slides_dir=options.slides_dir,
        negative=options.negative,
        slide_ids=options.slide_ids,
        most_slides=options.most_slides,
        most_pixels=options.max_pixels or 2**31,
        quality=options.quality,
        method=options.method,
        window=options.window,
    )
    written = report(spec)
    return print_report(written, options.json, page=str(written.out / "index.html"), bytes=written.bytes)

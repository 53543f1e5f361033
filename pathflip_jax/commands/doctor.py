"""`pathflip doctor`: checks of the installation, the machine, the data and the configs."""

import argparse
import json

from pathflip_jax.commands import WRONG_INPUT
from pathflip_jax.commands.options import add_fold_option, command, place


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "doctor",
        _run,
        "pathflip doctor --records records --slides slides.csv --texts reports.jsonl --tokenizer vocabulary "
        "--config align_base",
    )
    parser.add_argument("--records", type=place, help="folder of records; every checksum is verified")
    parser.add_argument(
        "--slides",
        type=place,
        metavar="CSV",
        help="slide table: checks splits and patients, and whether it matches the records",
    )
    add_fold_option(parser)
    parser.add_argument("--texts", type=place, help="text table: checks whether it matches the records")
    parser.add_argument(
        "--tokenizer",
        type=place,
        metavar="FOLDER",
        help="vocabulary or BERT folder: checks whether it covers the words of the texts",
    )
    parser.add_argument("--config", action="append", default=[], help="training config to check (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.commands.checks import examine
    from pathflip_jax.commands.findings import print_findings
    from pathflip_jax.data.texts.split_files import one_fold

    findings = examine(
        records=options.records,
        slides=one_fold(options.slides, options.fold),
        texts=options.texts,
        tokenizer=options.tokenizer,
        configs=options.config,
    )
    if options.json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        print_findings(findings)
    return WRONG_INPUT if any(finding.state == "fault" for finding in findings) else 0

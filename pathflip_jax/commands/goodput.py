"""`pathflip goodput`: breakdown of a run's time by cause."""

import argparse
import json

from pathflip_jax.commands.options import command, local_path, number


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "goodput",
        _run,
        "pathflip goodput runs/base --preemptions-per-day 4",
    )
    parser.add_argument("run_folder", type=local_path, metavar="RUN", help="run folder; the run may still be training")
    parser.add_argument(
        "--preemptions-per-day",
        type=number("preemptions-per-day"),
        metavar="N",
        help="expected preemptions per day (default: the run's setting); only used to recommend save_every",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, in seconds and fractions")


def _run(options: argparse.Namespace) -> int:
    import dataclasses

    from pathflip_jax.monitoring.goodput import as_dict, describe, summarise

    found = summarise(options.run_folder)
    if options.preemptions_per_day is not None:
        found = dataclasses.replace(found, preemptions_per_day=options.preemptions_per_day)
    print(json.dumps(as_dict(found)) if options.json else describe(found))
    return 0

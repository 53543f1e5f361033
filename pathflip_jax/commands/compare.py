"""`pathflip compare`: paired comparison of evaluations."""

import argparse
import json

from pathflip_jax.commands.options import command, local_path, number


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "compare",
        _run,
        "pathflip compare scores/base scores/slide-loss --out compared",
    )
    parser.add_argument(
        "scores", type=local_path, nargs="+", metavar="SCORES", help="folders written by `pathflip evaluate`"
    )
    parser.add_argument("--seed", type=number("seed"), default=0, help="seed of the bootstrap (default 0)")
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="folder to write compare.html and compare.json to"
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.evaluate.compare import compare

    found = compare(options.scores, options.out, seed=options.seed, command=options.command_line)
    print(json.dumps(found) if options.json else options.out / "compare.html")
    return 0

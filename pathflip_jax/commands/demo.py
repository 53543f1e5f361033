"""`pathflip demo`: the complete workflow on a synthetic cohort."""

import argparse
from pathlib import Path

from pathflip_jax.commands.demo_steps import SLIDES
from pathflip_jax.commands.options import command, local_path, number
from pathflip_jax.runtime.limits import processors


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "demo",
        _run,
        "pathflip demo --out demo",
    )
    parser.add_argument("--out", type=local_path, default=Path("demo"), help="output folder (default demo)")
    parser.add_argument(
        "--slides", type=number("slides"), default=SLIDES, help=f"number of slides in the cohort (default {SLIDES})"
    )
    parser.add_argument("--seed", type=number("seed"), default=0, help="seed of cohort and training (default 0)")
    parser.add_argument(
        "--workers", type=number("workers"), default=processors(), help="worker processes (default: number of cores)"
    )


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.commands.demo_steps import run_demo

    return run_demo(options.out, slides=options.slides, seed=options.seed, workers=options.workers)

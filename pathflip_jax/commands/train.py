"""`pathflip train`: declared here for `pathflip --help` only.

Its options are settings of the config, so `cli.main` passes them unchanged to `training.loop.main`.
"""

import argparse

from pathflip_jax.commands.options import command


def add(commands) -> None:
    """Add the command and its options."""
    command(
        commands,
        "train",
        _run,
        "pathflip train --config align_base --config.data.records=records --workdir runs/base",
    )


def _run(_: argparse.Namespace) -> int:
    raise AssertionError("main() dispatches `train` before this parser runs")

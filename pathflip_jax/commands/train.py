"""`pathflip train`: its options are settings of the config, so `cli.main` passes them to `training.loop.main` as they
are."""

import argparse

from pathflip_jax.commands.options import command


def add(commands) -> None:
    """Add the command and its options."""
    command(
        commands,
        "train",
        _run,
        "train a model; options are settings of the config",
        "pathflip train --config align_base --config.data.records=records --workdir runs/base",
    )


def _run(_: argparse.Namespace) -> int:
    raise AssertionError("main() hands `train` over before this parser sees it")

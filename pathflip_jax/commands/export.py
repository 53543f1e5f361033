"""`pathflip export`: a run folder to PyTorch weights."""

import argparse
from pathlib import Path

from pathflip_jax.commands.options import command, place


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "export",
        _run,
        "write a trained model for PyTorch users",
        "pathflip export runs/base --to pytorch --out exported",
    )
    parser.add_argument("run_folder", type=place, metavar="RUN", help="run folder")
    parser.add_argument("--to", choices=["pytorch"], default="pytorch", help="what to write (default pytorch)")
    parser.add_argument("--which", choices=["best", "latest"], default="best", help="checkpoint (default best)")
    parser.add_argument("--pt", action="store_true", help="also write model.pt, for code that reads no safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.convert.pytorch import export

    export(options.run_folder, options.out, which=options.which, pt=options.pt)
    print(f"{options.out}: PyTorch weights under the released model's names, with how to load them")
    return 0

"""`pathflip export`: a run folder to PyTorch weights, or to Hugging Face's and PEFT's folders."""

import argparse
from pathlib import Path

from pathflip_jax.commands.options import command, place


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "export",
        _run,
        "write a trained model for users of PyTorch, transformers or PEFT",
        "pathflip export runs/base --to pytorch --out exported",
        "pathflip export runs/lm2 --to peft --out adapter",
    )
    parser.add_argument("run_folder", type=place, metavar="RUN", help="run folder")
    parser.add_argument(
        "--to",
        choices=["pytorch", "peft", "huggingface"],
        default="pytorch",
        help="the model for PyTorch (default); of a language stage its adapter for PEFT, or its whole decoder",
    )
    parser.add_argument("--which", choices=["best", "latest"], default="best", help="checkpoint (default best)")
    parser.add_argument("--pt", action="store_true", help="also write model.pt, for code that reads no safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")


def _run(options: argparse.Namespace) -> int:
    if options.to != "pytorch":
        from pathflip_jax.llm.export import PROJECTOR, export_decoder, export_peft

        if options.pt:
            raise ValueError("--pt goes with --to pytorch")
        write, what = (export_peft, "an adapter") if options.to == "peft" else (export_decoder, "a decoder")
        write(options.run_folder, options.out, options.which)
        print(f"{options.out}: {what} in Hugging Face's form, and {PROJECTOR}")
        return 0

    from pathflip_jax.convert.pytorch import export

    export(options.run_folder, options.out, which=options.which, pt=options.pt)
    print(f"{options.out}: PyTorch weights under the released model's names, with how to load them")
    return 0

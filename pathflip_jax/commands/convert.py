"""`pathflip convert`: PyTorch weights to a run folder."""

import argparse
from pathlib import Path

from pathflip_jax.commands.options import command


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "convert",
        _run,
        "turn a PyTorch checkpoint of the released model into a run folder",
        "pathflip convert epoch9.ckpt --bert bert_folder --out runs/released",
    )
    parser.add_argument("source", type=Path, metavar="CHECKPOINT", help=".ckpt, .pt, .bin or .safetensors")
    parser.add_argument("--bert", type=Path, required=True, metavar="FOLDER", help="its BERT folder (the tokenizer)")
    parser.add_argument("--heads", type=int, help="attention heads, where the BERT folder's config.json lacks them")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to write")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.convert.pytorch import convert

    convert(options.source, options.out, heads=options.heads, bert_folder=options.bert)
    print(f"{options.out}: a run folder that `pathflip evaluate` and pathflip_jax.load read")
    return 0

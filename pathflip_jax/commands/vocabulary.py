"""`pathflip vocabulary`: a WordPiece vocabulary from reports."""

import argparse
from pathlib import Path

from pathflip_jax.commands.options import command, place


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "vocabulary",
        _run,
        "train a small WordPiece vocabulary where no BERT folder is at hand",
        "pathflip vocabulary reports.jsonl --slides slides.csv --split train --out vocabulary",
    )
    parser.add_argument("texts", type=place, metavar="TEXTS", help="text table")
    parser.add_argument("--slides", type=place, metavar="CSV", help="slide table that names the splits")
    parser.add_argument("--split", help="use only the texts of this split")
    parser.add_argument("--size", type=int, default=2000, help="most words (default 2000)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="Hugging Face BERT folder")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.data.text import match_texts, read_slide_table, read_texts
    from pathflip_jax.data.tokens import train_wordpiece

    texts = read_texts(options.texts)
    if options.split:
        if not options.slides:
            raise ValueError("--split needs the slide table that names the splits: add --slides slides.csv")
        wanted = [row["slide_id"] for row in read_slide_table(options.slides) if row.get("split") == options.split]
        if not wanted:
            raise ValueError(
                f"{options.slides}: no slide of split {options.split!r}; the column says train, val or test"
            )
        texts = match_texts(texts, wanted)
    train_wordpiece([text.caption for text in texts], options.out, vocab_size=options.size)
    print(f"{options.out}: a WordPiece vocabulary from {len(texts)} texts")
    return 0

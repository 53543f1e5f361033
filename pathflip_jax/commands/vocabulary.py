"""`pathflip vocabulary`: a WordPiece vocabulary from reports."""

import argparse

from pathflip_jax.commands.options import add_fold_option, command, local_path, number, place


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "vocabulary",
        _run,
        "pathflip vocabulary reports.jsonl --slides slides.csv --split train --out vocabulary",
        "pathflip vocabulary reports.jsonl --slides slides.csv --split train --decoder 128 4 --out decoder",
    )
    parser.add_argument("texts", type=place, metavar="TEXTS", help="text table of the reports")
    parser.add_argument("--slides", type=place, metavar="CSV", help="slide table with the splits, for --split")
    add_fold_option(parser)
    parser.add_argument("--split", help="use only the texts of slides in this split")
    parser.add_argument("--size", type=number("size"), default=2000, help="maximum number of tokens (default 2000)")
    parser.add_argument(
        "--decoder",
        nargs=2,
        type=number("decoder"),
        metavar=("WIDTH", "LAYERS"),
        help="write the folder of a small decoder instead, to be trained from scratch: vocabulary and config.json",
    )
    parser.add_argument("--out", type=local_path, required=True, metavar="FOLDER", help="Hugging Face folder to write")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.data.records.splits import unknown_split_message
    from pathflip_jax.data.storage.failures import preview
    from pathflip_jax.data.texts.split_files import one_fold
    from pathflip_jax.data.texts.text import match_texts, read_slide_table, read_texts
    from pathflip_jax.data.texts.wordpiece import train_wordpiece

    texts = read_texts(options.texts)
    if options.split:
        if not options.slides:
            raise ValueError("--split needs the slide table with the splits: add --slides slides.csv")
        table = one_fold(options.slides, options.fold)
        rows = read_slide_table(table)
        wanted = {row["slide_id"] for row in rows if row["split"] == options.split}
        if not wanted:
            raise ValueError(f"{unknown_split_message(table, options.split, rows)}; name another with --split")
        cases = [(row["case_id"], row["patient_id"]) for row in rows]
        matched = match_texts(texts, [row["slide_id"] for row in rows], cases)
        texts = [text for text in matched if wanted.intersection(text.slide_ids)]
        if not texts:
            raise ValueError(
                f"{options.texts}: no text belongs to a slide of split {options.split!r} ({preview(sorted(wanted))})"
            )
    captions = [text.caption for text in texts]
    if options.decoder:
        from pathflip_jax.convert.decoder import make_decoder_folder

        width, layers = options.decoder
        make_decoder_folder(captions, options.out, vocab_size=options.size, width=width, layers=layers)
        print(
            f"{options.out}: a decoder without weights, {layers} layers of width {width}; "
            f"vocabulary from {len(texts)} texts"
        )
        return 0
    train_wordpiece(captions, options.out, vocab_size=options.size)
    print(f"{options.out}: a WordPiece vocabulary from {len(texts)} texts")
    return 0

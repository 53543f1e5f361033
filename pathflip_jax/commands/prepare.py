"""`pathflip prepare`: encoding of slides into records."""

import argparse

from pathflip_jax.commands.options import (
    add_records_options,
    beam_examples,
    command,
    local_path,
    number,
    path_text,
    print_records_report,
    records_settings,
)


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "prepare",
        _run,
        "encode slides into records of patch features",
        "pathflip prepare slides/ --out records --slides slides.csv --shard 0/8",
        *beam_examples("prepare /mnt/slides --encoder hf:/mnt/phikon"),
    )
    parser.add_argument(
        "slides_folder", type=local_path, metavar="SLIDES", help="folder of slides that OpenSlide can read"
    )
    parser.add_argument(
        "--encoder",
        type=_encoder,
        default="stain_texture",
        help="patch encoder: stain_texture (built in, default), timm:NAME or hf:FOLDER",
    )
    parser.add_argument(
        "--patch-size",
        type=number("patch-size"),
        default=256,
        metavar="PX",
        help="edge length of a patch in pixels at --mpp (default 256)",
    )
    parser.add_argument(
        "--mpp",
        type=number("mpp"),
        default=0.5,
        metavar="UM",
        help="micrometres per pixel of the patches (default 0.5)",
    )
    parser.add_argument(
        "--assume-mpp",
        type=number("assume-mpp"),
        metavar="UM",
        help="level-0 micrometres per pixel of slides that do not state it",
    )
    parser.add_argument(
        "--min-tissue",
        type=number("min-tissue"),
        default=0.25,
        help="minimum tissue fraction of a patch (default 0.25)",
    )
    parser.add_argument(
        "--keep-ink",
        action="store_true",
        help="keep pen marks as tissue, for stains that resemble them, such as blue trichrome",
    )
    parser.add_argument(
        "--half", action="store_true", help="encode in half precision, if the encoder is a neural network"
    )
    parser.add_argument(
        "--batch-size",
        type=number("batch-size"),
        metavar="N",
        help="patches per batch over all local devices, for encoders that run on them (default: the encoder's)",
    )
    add_records_options(parser)


def _encoder(text: str) -> str:
    kind, colon, name = text.partition(":")
    return f"{kind}{colon}{path_text(name)}"


def _run(options: argparse.Namespace) -> int:
    from data_prep.build import prepare
    from data_prep.settings import PrepareSettings

    settings = PrepareSettings(
        encoder=options.encoder,
        patch_size=options.patch_size,
        mpp=options.mpp,
        assume_mpp=options.assume_mpp,
        min_tissue=options.min_tissue,
        keep_ink=options.keep_ink,
        half=options.half,
        batch_size=options.batch_size,
        **records_settings(options),
    )
    return print_records_report(prepare(options.slides_folder, options.out, settings), options.json)

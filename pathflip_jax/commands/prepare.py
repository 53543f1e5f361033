"""`pathflip prepare`: encoding of slides into records."""

import argparse
from collections.abc import Sequence

from pathflip_jax.commands.options import (
    add_records_options,
    beam_examples,
    command,
    local_path,
    number,
    path_text,
    print_records_report,
    print_records_reports,
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
    _add_encoder_options(parser)
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
    add_records_options(parser)


def _add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for encoders and their patches."""
    parser.add_argument(
        "--encoder",
        type=_encoder,
        action="append",
        help="patch encoder: stain_texture (built in, default), timm:NAME or hf:FOLDER; several encoders that run on "
        "JAX devices share one pass over the slides, each with its records in the folder RECORDS/ENCODER",
    )
    parser.add_argument(
        "--patch-size",
        type=number("patch-size"),
        action="append",
        metavar="PX",
        help="edge length of a patch in pixels at --mpp (default 256), for all encoders or once for each",
    )
    parser.add_argument(
        "--mpp",
        type=number("mpp"),
        action="append",
        metavar="UM",
        help="micrometres per pixel of the patches (default 0.5), for all encoders or once for each",
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


def _encoder(text: str) -> str:
    kind, colon, name = text.partition(":")
    return f"{kind}{colon}{path_text(name)}"


def _run(options: argparse.Namespace) -> int:
    from data_prep.build import prepare_several
    from data_prep.settings import PrepareSettings

    encoders = options.encoder or ["stain_texture"]
    settings = [
        PrepareSettings(
            encoder=encoder,
            patch_size=patch_size,
            mpp=mpp,
            assume_mpp=options.assume_mpp,
            min_tissue=options.min_tissue,
            keep_ink=options.keep_ink,
            half=options.half,
            batch_size=options.batch_size,
            **records_settings(options),
        )
        for encoder, patch_size, mpp in zip(
            encoders,
            _for_each(encoders, "--patch-size", options.patch_size or [256]),
            _for_each(encoders, "--mpp", options.mpp or [0.5]),
            strict=True,
        )
    ]
    reports = prepare_several(options.slides_folder, options.out, settings)
    if len(reports) > 1:
        return print_records_reports(reports, options.json)
    (report,) = reports.values()
    return print_records_report(report, options.json)


def _for_each(encoders: Sequence[str], option: str, values: Sequence[float]) -> Sequence[float]:
    """Values of an option given once, or once for each encoder."""
    if len(values) not in (1, len(encoders)):
        raise ValueError(
            f"{option} given {len(values)} times for {len(encoders)} encoders: expected once, for all, or once for "
            "each --encoder, in their order"
        )
    return values if len(values) == len(encoders) else list(values) * len(encoders)

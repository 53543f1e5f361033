"""`pathflip prepare`: encoding of slides into records."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from data_prep.detector_names import DETECTORS
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
from pathflip_jax.data.pixels.reader_names import READERS


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "prepare",
        _run,
        "pathflip prepare slides/ --out records --slides slides.csv --shard 0/8",
        "pathflip prepare slides/ --out records --encoder uni_v2 --weights weights/uni2-h --half",
        *beam_examples("prepare /mnt/slides"),
    )
    parser.add_argument(
        "slides_folder",
        type=local_path,
        metavar="SLIDES",
        help="folder of slides, a slide, or the folder of a DICOM series",
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
    _add_tissue_options(parser)
    _add_pixel_options(parser)
    add_records_options(parser)


def _add_tissue_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for tissue masks: their detector or origin, their areas, and their review."""
    parser.add_argument(
        "--tissue",
        choices=DETECTORS,
        help="tissue detector: embedded (built in, default), or otsu, clam and lazyslide as those tools find tissue by "
        "default; with --tissue-from, for slides without a mask there",
    )
    parser.add_argument(
        "--tissue-from",
        type=local_path,
        metavar="DIR",
        help="folder of tissue masks made elsewhere: SLIDE.geojson in level-0 pixels (QuPath, TRIDENT), else SLIDE.png "
        "(nonzero is tissue); a slide without one fails, unless --tissue names a detector",
    )
    parser.add_argument(
        "--holes",
        type=number("holes"),
        metavar="UM2",
        help="fill holes of less than this area (default: 20000, or that of a patch if it is less; another detector's "
        "own)",
    )
    parser.add_argument(
        "--smallest",
        type=number("smallest"),
        metavar="UM2",
        help="keep pieces of tissue of at least this area (default: 300; another detector's own)",
    )
    parser.add_argument(
        "--sheet",
        type=local_path,
        metavar="FILE",
        help="PNG or PDF to draw a thumbnail of every slide with its tissue mask in; of a folder that is complete, "
        "nothing is encoded again",
    )


def _add_encoder_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for encoders and their patches."""
    parser.add_argument(
        "--encoder",
        type=_encoder,
        action="append",
        help="patch encoder: stain_texture (built in, default), one that `pathflip encoders` lists, timm:NAME or "
        "hf:FOLDER; several listed ones share a pass over the slides, each with its records in RECORDS/ENCODER",
    )
    parser.add_argument(
        "--weights",
        type=local_path,
        action="append",
        metavar="PATH",
        help="file or folder of the weights of a listed encoder (default: from the Hugging Face hub or its cache); "
        "with several encoders, once for each",
    )
    parser.add_argument(
        "--patch-size",
        type=number("patch-size"),
        action="append",
        metavar="PX",
        help="edge length of a patch in pixels at --mpp (default: that of a listed encoder, else 256), for all "
        "encoders or once for each",
    )
    parser.add_argument(
        "--mpp",
        type=number("mpp"),
        action="append",
        metavar="UM",
        help="micrometres per pixel of the patches (default: that of a listed encoder, else 0.5), for all encoders "
        "or once for each",
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


def _add_pixel_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for decoding pixels and for their colours."""
    parser.add_argument(
        "--reader",
        choices=READERS,
        default=READERS[0],
        help="decoder of pixels: OpenSlide (default), tifffile, several times as fast on tiled TIFF such as SVS, or "
        "wsidicom, with the same pixels; what OpenSlide does not read goes to the reader for it in any case",
    )
    parser.add_argument(
        "--icc",
        action="store_true",
        help="convert the colours of patches to sRGB by each slide's embedded ICC profile (default: as stored); "
        "features with and without it do not mix",
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
            tissue=options.tissue,
            tissue_from=options.tissue_from,
            holes_um2=options.holes,
            smallest_um2=options.smallest,
            sheet=options.sheet,
            half=options.half,
            batch_size=options.batch_size,
            weights=weights,
            reader=options.reader,
            icc=options.icc,
            **records_settings(options),
        )
        for encoder, patch_size, mpp, weights in zip(
            encoders,
            _for_each(encoders, "--patch-size", options.patch_size),
            _for_each(encoders, "--mpp", options.mpp),
            _weights(encoders, options.weights),
            strict=True,
        )
    ]
    reports = prepare_several(options.slides_folder, options.out, settings)
    if len(reports) > 1:
        return print_records_reports(reports, options.json)
    (report,) = reports.values()
    return print_records_report(report, options.json)


def _for_each(encoders: Sequence[str], option: str, values: Sequence[float] | None) -> Sequence[float | None]:
    """Values of an option given once, or once for each encoder."""
    if values is None or len(values) == 1:
        return list(values or [None]) * len(encoders)
    if len(values) != len(encoders):
        raise ValueError(
            f"{option} given {len(values)} times for {len(encoders)} encoders: expected once, for all, or once for "
            "each --encoder, in their order"
        )
    return values


def _weights(encoders: Sequence[str], places: Sequence[Path] | None) -> Sequence[Path | None]:
    """Weights of each encoder."""
    if places is not None and len(places) != len(encoders):
        raise ValueError(
            f"--weights given {len(places)} times for {len(encoders)} encoders: expected once for each --encoder, in "
            "their order, or not at all"
        )
    return places or [None] * len(encoders)

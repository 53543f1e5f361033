"""`pathflip import`: conversion of feature files of other tools to records."""

import argparse

from pathflip_jax.commands.options import (
    add_records_options,
    beam_examples,
    command,
    local_path,
    number,
    print_records_report,
    records_settings,
)
from pathflip_jax.data.readers.formats import extensions, tools


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "import",
        _run,
        "pathflip import features/ --out records --mpp 0.5",
        *beam_examples("import /mnt/features"),
    )
    parser.description = f"Turn feature files of {tools()} into records."
    parser.add_argument(
        "features_folder", type=local_path, metavar="DIR", help=f"folder of feature files ({', '.join(extensions())})"
    )
    parser.add_argument("--encoder", help="name of the patch encoder, if the files do not state it")
    parser.add_argument(
        "--patch-size",
        type=number("patch-size"),
        metavar="PX",
        help="edge length of a patch in level-0 pixels, if the files do not state it",
    )
    parser.add_argument(
        "--mpp", type=number("mpp"), metavar="UM", help="level-0 micrometres per pixel, if the files do not state it"
    )
    add_records_options(parser)


def _run(options: argparse.Namespace) -> int:
    from data_prep.build import import_features
    from data_prep.settings import ImportSettings

    settings = ImportSettings(
        encoder=options.encoder,
        patch_size=options.patch_size,
        mpp=options.mpp,
        **records_settings(options),
    )
    return print_records_report(import_features(options.features_folder, options.out, settings), options.json)

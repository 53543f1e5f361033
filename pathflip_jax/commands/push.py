"""`pathflip push`: publication of a run on the Hugging Face hub."""

import argparse

from pathflip_jax.commands.options import RUN_HELP, add_export_options, command, place


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "push",
        _run,
        "pathflip push runs/base our-lab/pathflip-crc --scores scores --about data.md",
        "pathflip push runs/lm2 our-lab/pathflip-crc-reports --public",
    )
    parser.add_argument("run_folder", type=place, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "repository",
        metavar="OWNER/NAME",
        help="repository on the hub, created where it is missing; OWNER/NAME@BRANCH commits to a branch",
    )
    parser.add_argument("--public", action="store_true", help="let everyone read it (default: a private repository)")
    parser.add_argument("--message", default="", metavar="TEXT", help="description of the commit")
    add_export_options(parser)


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.export.hub import push
    from pathflip_jax.inference.assistant import is_language_run

    export = {"which": options.which, "scores": options.scores, "about": options.about}
    if is_language_run(options.run_folder):
        if options.dtype != "float32" or options.encoder_licence:
            raise ValueError("--dtype and --encoder-licence are for an alignment run; drop them for a language run")
        export |= {"decoder": options.decoder, "aligner": options.aligner}
    else:
        if options.decoder or options.aligner:
            raise ValueError(f"{options.run_folder}: not a run of the language stage; drop --decoder and --aligner")
        export |= {"dtype": options.dtype, "encoder_licence": options.encoder_licence}
    pushed = push(options.run_folder, options.repository, public=options.public, message=options.message, **export)
    print(f"{pushed}: load it with --checkpoint {pushed}, or pathflip_jax.load({str(pushed)!r})")
    return 0

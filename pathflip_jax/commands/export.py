"""`pathflip export`: a run folder as PyTorch weights, or as a Hugging Face or PEFT folder; records as TRIDENT files."""

import argparse

from pathflip_jax.commands import FAILED_SLIDES
from pathflip_jax.commands.options import add_export_options, command, local_path, place


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "export",
        _run,
        "pathflip export runs/base --to pytorch --out exported",
        "pathflip export runs/base --to huggingface --scores scores --out for_transformers",
        "pathflip export runs/lm2 --to peft --out adapter",
        "pathflip export records --to trident --out features",
    )
    parser.add_argument(
        "run_folder", type=place, metavar="RUN", help="run folder; with --to trident: folder of records"
    )
    parser.add_argument(
        "--to",
        choices=["pytorch", "peft", "huggingface", "trident"],
        default="pytorch",
        help="pytorch (default): the model for PyTorch; huggingface: the model for transformers, of a language run its "
        "whole decoder; peft: the adapter of a language run; trident: the features of records, an h5 file per slide, "
        "for all that read TRIDENT's files: CLAM, Patho-Bench, MIL-Lab, LazySlide",
    )
    parser.add_argument("--pt", action="store_true", help="also write model.pt, for code that cannot read safetensors")
    add_export_options(parser, "with --to huggingface: ")
    parser.add_argument("--out", type=local_path, required=True, metavar="DIR", help="folder to write")


def _run(options: argparse.Namespace) -> int:
    if options.to == "trident":
        return _export_records(options)
    from pathflip_jax.inference.assistant import is_language_run

    if options.pt and options.to != "pytorch":
        raise ValueError("--pt requires --to pytorch")
    speaks = is_language_run(options.run_folder)
    if (options.decoder or options.aligner) and not speaks:
        raise ValueError(f"{options.run_folder}: not a run of the language stage; drop --decoder and --aligner")
    if (options.scores or options.encoder_licence or options.about) and options.to != "huggingface":
        raise ValueError("--scores, --encoder-licence and --about are for the model card of --to huggingface")
    if options.encoder_licence and speaks:
        raise ValueError("--encoder-licence is for an alignment run: a language run refers to that of its aligner")
    if options.dtype != "float32" and speaks:
        raise ValueError("--dtype is for an alignment run: a language run keeps the types of its decoder")
    if options.to == "peft" or (options.to == "huggingface" and speaks):
        from pathflip_jax.convert.decoder_folders import PROJECTOR
        from pathflip_jax.export.decoder import export_decoder, export_peft

        moved = {"decoder": options.decoder, "aligner": options.aligner}
        if options.to == "peft":
            export_peft(options.run_folder, options.out, options.which, **moved)
        else:
            card = {"scores": options.scores, "about": options.about}
            export_decoder(options.run_folder, options.out, options.which, **moved, **card)
        what = "an adapter" if options.to == "peft" else "a decoder"
        print(f"{options.out}: {what} in Hugging Face's format, {PROJECTOR} and the aligner")
    elif options.to == "huggingface":
        from pathflip_jax.export.huggingface import export_huggingface

        export_huggingface(
            options.run_folder,
            options.out,
            which=options.which,
            scores=options.scores,
            encoder_licence=options.encoder_licence,
            about=options.about,
            dtype=options.dtype,
        )
        print(f"{options.out}: a folder for transformers' AutoModel, with a model card")
    else:
        from pathflip_jax.export.pytorch import export

        export(options.run_folder, options.out, which=options.which, pt=options.pt, dtype=options.dtype)
        print(f"{options.out}: PyTorch weights under the released model's names; README.md shows how to load them")
    return 0


def _export_records(options: argparse.Namespace) -> int:
    from pathflip_jax.export.trident import export_trident

    of_models = ("pt", "scores", "encoder_licence", "about", "decoder", "aligner")
    given = [f"--{name.replace('_', '-')}" for name in of_models if getattr(options, name)]
    given += [
        f"--{name}" for name, usual in (("which", "best"), ("dtype", "float32")) if getattr(options, name) != usual
    ]
    if given:
        raise ValueError(f"--to trident writes the features of records, not a model: drop {', '.join(given)}")
    report = export_trident(options.run_folder, options.out)
    print(report.summary())
    return FAILED_SLIDES if report.failed else 0

"""`pathflip convert`: conversion of PyTorch weights into a run folder."""

import argparse

from pathflip_jax.commands.options import command, local_path, number


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "convert",
        _run,
        "pathflip convert epoch9.ckpt --bert biobert --out runs/released",
        "pathflip convert outputs/pathflip/checkpoint/pytorch_model.bin --bert clinicalbert --out runs/two",
        "pathflip convert finetune.ckpt --bert biobert --decoder Qwen3-0.6B --out runs/language",
        "pathflip convert exported --out runs/again",
    )
    parser.add_argument(
        "source",
        type=local_path,
        metavar="CHECKPOINT",
        help=".ckpt, .pt, .bin, .safetensors, a folder of shards, or a folder written by `pathflip export`",
    )
    parser.add_argument(
        "--bert",
        type=local_path,
        metavar="FOLDER",
        help="BERT folder with the model's tokenizer; an export contains its own",
    )
    parser.add_argument(
        "--weights",
        default="",
        metavar="NAME",
        help="set of weights to read, if the file holds several (EMA, teacher)",
    )
    parser.add_argument(
        "--heads", type=number("heads"), help="attention heads, if the BERT folder's config.json does not state them"
    )
    parser.add_argument(
        "--hparams",
        type=local_path,
        metavar="YAML",
        help="training arguments; an hparams.yaml next to the checkpoint is found automatically",
    )
    parser.add_argument(
        "--lora-alpha",
        type=number("lora-alpha"),
        metavar="X",
        help="alpha of the text encoder's LoRA, if no training arguments state it",
    )
    parser.add_argument("--keep-lora", action="store_true", help="do not merge the text encoder's LoRA into BERT")
    parser.add_argument(
        "--decoder",
        type=local_path,
        metavar="FOLDER",
        help="the language model that a finetune checkpoint, or an exported adapter, was trained on",
    )
    parser.add_argument("--out", type=local_path, required=True, metavar="RUN", help="run folder to write")


def _run(options: argparse.Namespace) -> int:
    if options.source.is_dir():
        from pathflip_jax.inference.language_export import is_language_export

        if is_language_export(options.source):
            return _convert_language(options)
    return _convert_alignment(options) if options.decoder is None else _convert_finetune(options)


def _convert_language(options: argparse.Namespace) -> int:
    from pathflip_jax.export.from_language_export import convert_language

    given = (options.bert, options.heads, options.hparams, options.lora_alpha, options.keep_lora, options.weights)
    if any(given):
        raise ValueError(
            f"{options.source}: an export of a language run contains its own settings; "
            "pass no option but --decoder and --out"
        )
    _print_each("note", convert_language(options.source, options.out, decoder_folder=options.decoder))
    print(f"{options.out}: a run folder for `pathflip caption` and `pathflip ask`; its aligner is in aligner/")
    return 0


def _convert_finetune(options: argparse.Namespace) -> int:
    from pathflip_jax.convert.recognise import summary
    from pathflip_jax.export.from_finetune import convert_finetune

    if options.hparams or options.lora_alpha or options.keep_lora:
        raise ValueError(
            "--hparams, --lora-alpha and --keep-lora are for PathFLIP2 checkpoints, --decoder for finetune checkpoints"
        )
    if options.bert is None:
        raise ValueError(f"{options.source}: pass --bert too, the BERT folder that belongs to this checkpoint")
    rows, assumed = convert_finetune(
        options.source,
        options.out,
        bert_folder=options.bert,
        decoder_folder=options.decoder,
        heads=options.heads,
        weights=options.weights,
    )
    print(summary(rows))
    _print_each("assumed", assumed)
    print(f"{options.out}: a run folder for `pathflip caption` and `pathflip ask`; its aligner is in aligner/")
    return 0


def _convert_alignment(options: argparse.Namespace) -> int:
    from pathflip_jax.convert.checkpoint_files import read_hparams
    from pathflip_jax.convert.recognise import summary
    from pathflip_jax.export.from_released import convert

    arguments = {} if options.hparams is None else read_hparams(options.hparams)
    if options.lora_alpha is not None:
        arguments["lora_alpha"] = options.lora_alpha
    found = convert(
        options.source,
        options.out,
        heads=options.heads,
        bert_folder=options.bert,
        arguments=arguments,
        keep_lora=options.keep_lora,
        weights=options.weights,
    )
    print(summary(found.tensors))
    _print_each("note", found.notes)
    _print_each("assumed", found.assumed)
    print(f"{options.out}: a run folder for `pathflip evaluate` and pathflip_jax.load; tensors.csv lists every tensor")
    return 0


def _print_each(label: str, lines) -> None:
    for line in lines:
        print(f"{label}: {line}")

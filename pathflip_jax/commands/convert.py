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
        "turn PyTorch weights (a released model's, or an export of ours) into a run folder",
        "pathflip convert epoch9.ckpt --bert biobert --out runs/released",
        "pathflip convert outputs/pathflip/checkpoint/pytorch_model.bin --bert clinicalbert --out runs/two",
        "pathflip convert finetune.ckpt --bert biobert --decoder Qwen3-0.6B --out runs/language",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="CHECKPOINT",
        help=".ckpt, .pt, .bin, .safetensors, a folder of shards, or a folder that `pathflip export` wrote",
    )
    parser.add_argument(
        "--bert", type=Path, metavar="FOLDER", help="its BERT folder (the tokenizer); an export has its own"
    )
    parser.add_argument(
        "--weights",
        default="",
        metavar="NAME",
        help="the set of weights, of a file that holds several (EMA, teacher)",
    )
    parser.add_argument("--heads", type=int, help="attention heads, where the BERT folder's config.json lacks them")
    parser.add_argument(
        "--hparams", type=Path, metavar="YAML", help="the run's arguments; those beside the checkpoint are found"
    )
    parser.add_argument(
        "--lora-alpha", type=float, metavar="X", help="scale of the text encoder's LoRA, where no arguments say it"
    )
    parser.add_argument("--keep-lora", action="store_true", help="do not merge that LoRA into BERT")
    parser.add_argument(
        "--decoder", type=Path, metavar="FOLDER", help="the language model that a finetune checkpoint was trained on"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder to write")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.convert.checkpoint_files import read_hparams
    from pathflip_jax.convert.recognise import summary
    from pathflip_jax.convert.released import convert

    if options.decoder is not None:
        from pathflip_jax.convert.finetune import convert_finetune

        if options.hparams or options.lora_alpha or options.keep_lora:
            raise ValueError("--hparams, --lora-alpha and --keep-lora are for a PathFLIP2, --decoder is for another")
        rows = convert_finetune(
            options.source, options.out, bert_folder=options.bert, decoder_folder=options.decoder, heads=options.heads
        )
        print(summary(rows))
        print(f"{options.out}: a run that `pathflip caption` and `pathflip ask` read; its aligner is in aligner/")
        return 0
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
    for note in found.notes:
        print(f"note: {note}")
    for line in found.assumed:
        print(f"assumed: {line}")
    print(
        f"{options.out}: a run folder that `pathflip evaluate` and pathflip_jax.load read; each tensor in tensors.csv"
    )
    return 0

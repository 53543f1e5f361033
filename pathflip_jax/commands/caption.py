"""`pathflip caption`: slide captioning by a run of the language stage."""

import argparse
import json

from pathflip_jax.commands.options import add_language_options, command
from pathflip_jax.commands.slide_sources import add_slide_options, print_failures, read_slide_rows
from pathflip_jax.data.storage.failures import Failure
from pathflip_jax.llm.sampling import Sampling


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "caption",
        _run,
        "pathflip caption slides/S1.svs --checkpoint runs/lm2",
        "pathflip caption records --slide-id S1 --checkpoint runs/lm2 --beams 3 --json",
    )
    add_slide_options(parser)
    add_language_options(parser, max_tokens=384)


def _run(options: argparse.Namespace) -> int:
    failed: list[Failure] = []
    assistant, slides, alone = read_slide_rows(options, failed)
    for slide in slides:
        (caption,) = assistant.caption([slide.rows], Sampling.from_options(vars(options)))
        if options.json:
            print(json.dumps({"slide_id": slide.slide_id, "caption": caption}), flush=True)
        else:
            print(caption if alone else f"{slide.slide_id}: {caption}", flush=True)
    return print_failures(failed)

"""`pathflip caption`: slide captioning by a run of the language stage."""

import argparse
import json

from pathflip_jax.commands.options import add_language_options, add_slide_options, command, slide_rows
from pathflip_jax.llm.sampling import Sampling


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "caption",
        _run,
        "write a report of a slide with a trained language model",
        "pathflip caption features/S1.h5 --checkpoint runs/lm2",
        "pathflip caption records --slide-id S1 --checkpoint runs/lm2 --beams 3 --json",
    )
    add_slide_options(parser)
    add_language_options(parser, max_tokens=384)


def _run(options: argparse.Namespace) -> int:
    assistant, slide, rows = slide_rows(options)
    (caption,) = assistant.caption([rows], Sampling.from_options(vars(options)))
    print(json.dumps({"slide_id": slide.slide_id, "caption": caption}) if options.json else caption)
    return 0

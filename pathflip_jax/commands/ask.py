"""`pathflip ask`: slide question answering by a run of the language stage."""

import argparse
import json

from pathflip_jax.commands.options import add_language_options, command
from pathflip_jax.commands.slide_sources import SlideRows, add_slide_options, print_failures, read_slide_rows
from pathflip_jax.data.storage.failures import Failure
from pathflip_jax.llm.sampling import Sampling


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "ask",
        _run,
        'pathflip ask slides/S1.svs "Is there necrosis?" --checkpoint runs/lm2',
        'pathflip ask features/S1.h5 "What is the subtype?" --checkpoint runs/lm2 --options A=Ductal B=Lobular',
    )
    add_slide_options(parser)
    parser.add_argument(
        "question", metavar="QUESTION", help="question to ask; <image> in it marks the position of the slide"
    )
    parser.add_argument(
        "--options",
        nargs="+",
        type=_option,
        metavar="A=TEXT",
        help="answer options, of which the most likely is chosen",
    )
    add_language_options(parser, max_tokens=256)


def _option(text: str) -> tuple[str, str]:
    letter, equals, answer = text.partition("=")
    if not equals or len(letter) != 1 or not letter.isalpha() or not answer.strip():
        raise argparse.ArgumentTypeError(f'{text!r}: expected a letter and a text, such as A="Ductal carcinoma"')
    return letter.upper(), answer.strip()


def _run(options: argparse.Namespace) -> int:
    choices = dict(options.options or ())
    if options.options and len(choices) < max(len(options.options), 2):
        raise ValueError("--options: pass two or more, each with its own letter")
    failed: list[Failure] = []
    assistant, slides, alone = read_slide_rows(options, failed)
    for slide in slides:
        found = _choose(assistant, slide, options, choices) if choices else _answer(assistant, slide, options)
        if options.json:
            print(json.dumps({"slide_id": slide.slide_id, **found}), flush=True)
        else:
            answer = _as_text(found, choices)
            print(answer if alone else f"{slide.slide_id}: {answer}", flush=True)
    return print_failures(failed)


def _answer(assistant, slide: SlideRows, options: argparse.Namespace) -> dict:
    """Free answer to the question about a slide."""
    prompt = assistant.prompt(options.question, slide.rows)
    (answer,) = assistant.answer([prompt], Sampling.from_options(vars(options)))
    return {"answer": answer}


def _choose(assistant, slide: SlideRows, options: argparse.Namespace, choices: dict[str, str]) -> dict:
    """Most likely of the answer options, and the probability of each."""
    from pathflip_jax.data.texts.conversations import ask
    from pathflip_jax.data.texts.text import Question
    from pathflip_jax.evaluate.tasks.language import choice_shares

    asked = ask(Question("", (), "", options.question, "", choices))
    (shares,) = choice_shares(assistant, [assistant.prompt(asked, slide.rows)], [choices])
    return {"answer": max(shares, key=shares.get), "probabilities": shares}


def _as_text(found: dict, choices: dict[str, str]) -> str:
    if not choices:
        return found["answer"]
    lines = [f"  {share:6.1%}  {letter}. {choices[letter]}" for letter, share in found["probabilities"].items()]
    return "\n".join([f"{found['answer']}. {choices[found['answer']]}", *lines])

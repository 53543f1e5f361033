"""`pathflip ask`: slide question answering by a run of the language stage."""

import argparse
import json

from pathflip_jax.commands.options import add_language_options, add_slide_options, command, slide_rows
from pathflip_jax.llm.sampling import Sampling


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "ask",
        _run,
        "answer a question about a slide with a trained language model",
        'pathflip ask features/S1.h5 "Is there necrosis?" --checkpoint runs/lm2',
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
    if not options.options:
        assistant, slide, rows = slide_rows(options)
        (answer,) = assistant.answer([assistant.prompt(options.question, rows)], Sampling.from_options(vars(options)))
        print(json.dumps({"slide_id": slide.slide_id, "answer": answer}) if options.json else answer)
        return 0

    from pathflip_jax.data.texts.conversations import ask
    from pathflip_jax.data.texts.text import Question
    from pathflip_jax.evaluate.tasks.language import choice_shares

    choices = dict(options.options)
    if len(choices) < max(len(options.options), 2):
        raise ValueError("--options: pass two or more, each with its own letter")
    assistant, slide, rows = slide_rows(options)
    asked = ask(Question("", (), "", options.question, "", choices))
    (shares,) = choice_shares(assistant, [assistant.prompt(asked, rows)], [choices])
    best = max(shares, key=shares.get)
    if options.json:
        print(json.dumps({"slide_id": slide.slide_id, "answer": best, "probabilities": shares}))
    else:
        print(f"{best}. {choices[best]}")
        print("\n".join(f"  {share:6.1%}  {letter}. {choices[letter]}" for letter, share in shares.items()))
    return 0

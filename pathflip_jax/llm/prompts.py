"""Conversations about a slide as tokens, for training and for generation alike (DESIGN, section 7).

The slide is a single id, IMAGE_ID, in a text until `insert_slide` makes room for its soft tokens. A prompt is built
from the same pieces in training and in generation, so a model sees the same ids in both. User text never becomes a
special token, and the text on both sides of the slide is kept (the released code drops the text before it).
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from pathflip_jax.data.texts.conversations import Conversation, Turn
from pathflip_jax.data.texts.text import IMAGE
from pathflip_jax.llm.tokenizer import DecoderTokenizer

IMAGE_ID = -1  # the slide, which is also its first soft token: soft token j is -1 - j
TEMPLATES = ("plain", "chat")  # the paper's template, and that of the decoder's folder
_MARK = "\ue000{}\ue001"  # placeholder of a message in a rendered conversation, of characters that no text contains
_MARKS = re.compile(_MARK.format("([0-9]+)"))


class Prompted(NamedTuple):
    """Conversation as ids; `response` is True at trained tokens: each answer, and its end."""

    tokens: Int[np.ndarray, "T"]
    response: Bool[np.ndarray, "T"]


class _Part(NamedTuple):
    ids: Int[np.ndarray, "t"]
    trained: bool = False


class _Frame(NamedTuple):
    """Rendered conversation without its messages.

    `before` precedes each message (and the last answer), `end` is the trained part after an answer, `rest` follows that
    of the last answer.
    """

    before: tuple[Int[np.ndarray, "t"], ...]
    end: Int[np.ndarray, "t"]
    rest: Int[np.ndarray, "t"]


def choose_template(tokenizer: DecoderTokenizer, wanted: str) -> str:
    """Name of the requested template; for "", "chat" if the decoder's folder has a chat template, else "plain".

    Raises ValueError for a template of another name, and for "chat" where the folder has none.
    """
    if not wanted:
        return "chat" if tokenizer.has_chat_template else "plain"
    if wanted not in TEMPLATES:
        raise ValueError(f"template {wanted!r}: expected one of {', '.join(TEMPLATES)}")
    if wanted == "chat":
        tokenizer.require_chat_template()
    return wanted


def encode_conversation(tokenizer: DecoderTokenizer, conversation: Conversation, template: str) -> Prompted:
    """Encode a conversation for training.

    Raises ValueError, naming the conversation, for one in which the slide does not occur exactly once in the first
    turn, and as `encode_prompt`.
    """
    *turns, (asked, answer) = conversation.turns
    try:
        parts = _prompt_parts(tokenizer, turns, asked, template)
        if IMAGE in answer:
            raise ValueError(f"{IMAGE} in the answer {answer!r:.60}; write it in the first question only")
    except ValueError as error:
        raise ValueError(f"conversation {conversation.conversation_id}: {error}") from error
    parts.append(_Part(tokenizer.text_ids(answer.strip()), trained=True))
    if template == "chat":
        frame = _frame(tokenizer, len(conversation.turns))
        parts += [_Part(frame.end, trained=True), _Part(frame.rest)]
    else:
        parts.append(_Part(_end(tokenizer), trained=True))
    tokens = np.concatenate([part.ids for part in parts])
    return Prompted(tokens, np.repeat([part.trained for part in parts], [len(part.ids) for part in parts]))


def encode_prompt(
    tokenizer: DecoderTokenizer, turns_so_far: Sequence[Turn], asked: str, template: str
) -> Int[np.ndarray, "T"]:
    """Encode a conversation up to the start of the answer to its last question, with IMAGE_ID once.

    "plain" is the paper's template, "chat" that of the decoder's folder, without thinking. Raises ValueError where the
    slide does not occur exactly once, in the first question; for a template of another name; for "chat" where the
    folder has none, or one that fails or does not write each message once; and for a text with a special token that the
    vocabulary cannot distinguish from text.
    """
    return np.concatenate([part.ids for part in _prompt_parts(tokenizer, turns_so_far, asked, template)])


def insert_slide(prompted: Prompted, rows: int) -> Prompted:
    """Replace the slide in a conversation by `rows` soft tokens, numbered -1, -2, ...; 0 removes the slide.

    Raises ValueError for tokens in which the slide does not occur exactly once.
    """
    tokens, response = prompted
    (at,) = np.nonzero(tokens < 0)
    if len(at) != 1 or tokens[at[0]] != IMAGE_ID:
        raise ValueError(
            f"the ids below 0 are {tokens[at][:8].tolist()}, expected one {IMAGE_ID} for the slide; pass a "
            "result of encode_conversation or encode_prompt into which no slide was inserted yet"
        )
    if rows < 0:
        raise ValueError(f"{rows} soft tokens; expected 0 or more")
    before, after = slice(None, at[0]), slice(at[0] + 1, None)
    soft = IMAGE_ID - np.arange(rows, dtype=tokens.dtype)
    return Prompted(
        np.concatenate([tokens[before], soft, tokens[after]]),
        np.concatenate([response[before], np.zeros(rows, bool), response[after]]),
    )


def stop_ids(tokenizer: DecoderTokenizer, template: str) -> tuple[int, ...]:
    """Ids at which an answer ends: those of the folder, and for "chat" the id that its template puts after an answer.

    Base models include a chat template whose end of turn is missing from their settings.
    """
    if template != "chat":
        return tokenizer.stop_ids
    ends = [int(number) for number in _frame(tokenizer, 1).end if int(number) in tokenizer.special_ids]
    return tuple(dict.fromkeys([*tokenizer.stop_ids, ends[0]]))


def _prompt_parts(tokenizer: DecoderTokenizer, turns: Sequence[Turn], asked: str, template: str) -> list[_Part]:
    questions = [*(turn.asked for turn in turns), asked]
    answers = [turn.answer for turn in turns]
    _check(questions, answers)
    if template == "plain":
        return _plain(tokenizer, questions, answers)
    if template == "chat":
        return _chat(tokenizer, questions, answers)
    raise ValueError(f"template {template!r}: expected one of {', '.join(TEMPLATES)}")


def _check(questions: Sequence[str], answers: Sequence[str]) -> None:
    count = questions[0].count(IMAGE)
    if count != 1:
        raise ValueError(
            f"the first question, {questions[0]!r:.60}, holds {IMAGE} {count} times; write it once, where the slide "
            "belongs"
        )
    for text in [*questions[1:], *answers]:
        if IMAGE in text:
            raise ValueError(f"{IMAGE} in {text!r:.60}; only the first question may contain it, remove it here")


def _plain(tokenizer: DecoderTokenizer, questions: Sequence[str], answers: Sequence[str]) -> list[_Part]:
    """Parts of the paper's template: an instruction, the slide, the response. Later turns have no slide."""
    first = " ".join(filter(None, (text.strip() for text in questions[0].split(IMAGE))))
    text = tokenizer.text_ids
    parts = [
        _Part(tokenizer.prefix()),
        _Part(text(f"Instruction: {first}\nInput pathology whole slide image: ")),
        _Part(_slide()),
        _Part(text(".\nResponse: ")),
    ]
    for answer, asked in zip(answers, questions[1:], strict=True):
        parts += [_Part(text(answer.strip()), trained=True), _Part(_end(tokenizer), trained=True)]
        parts.append(_Part(text(f"\nInstruction: {asked.strip()}\nResponse: ")))
    return parts


def _chat(tokenizer: DecoderTokenizer, questions: Sequence[str], answers: Sequence[str]) -> list[_Part]:
    frame = _frame(tokenizer, len(questions))
    head, tail = questions[0].strip().split(IMAGE)
    parts = [
        _Part(frame.before[0]),
        _Part(tokenizer.text_ids(head)),
        _Part(_slide()),
        _Part(tokenizer.text_ids(tail)),
    ]
    for turn, (answer, asked) in enumerate(zip(answers, questions[1:], strict=True)):
        before_answer, after_answer = frame.before[2 * turn + 1 : 2 * turn + 3]
        ends = _common(after_answer, frame.end)
        parts += [_Part(before_answer), _Part(tokenizer.text_ids(answer.strip()), trained=True)]
        parts += [_Part(after_answer[:ends], trained=True), _Part(after_answer[ends:])]
        parts.append(_Part(tokenizer.text_ids(asked.strip())))
    return [*parts, _Part(frame.before[-1])]


@lru_cache(maxsize=64)
def _frame(tokenizer: DecoderTokenizer, turns: int) -> _Frame:
    """Ids that a chat template puts around the messages of that many turns, whatever their content."""
    roles = ("user", "assistant") * turns
    messages = [{"role": role, "content": _MARK.format(number)} for number, role in enumerate(roles)]
    before = _cut(tokenizer, tokenizer.render(messages[:-1], add_generation_prompt=True), 2 * turns - 1)
    after_last = tokenizer.ids(_cut(tokenizer, tokenizer.render(messages), 2 * turns)[-1])
    # Up to the special tokens after an answer: "<|im_end|>" but not the line end after it.
    special = [int(number) in tokenizer.special_ids for number in after_last]
    if True not in special:
        raise ValueError(
            f"{tokenizer.folder}: its chat template puts no special token after an answer, so a model cannot learn to "
            'stop; use the template "plain"'
        )
    first = special.index(True)
    end = (special[first:] + [False]).index(False) + first
    return _Frame(tuple(tokenizer.ids(text) for text in before), after_last[:end], after_last[end:])


def _cut(tokenizer: DecoderTokenizer, rendered: str, messages: int) -> list[str]:
    """Text around the placeholders of messages. Raises ValueError where they are out of order."""
    pieces = _MARKS.split(rendered)
    if pieces[1::2] != [str(number) for number in range(messages)]:
        raise ValueError(
            f"{tokenizer.folder}: of {messages} messages its chat template writes numbers "
            f"{', '.join(pieces[1::2]) or 'none'}, expected each once and in order; use the template "
            '"plain"'
        )
    return pieces[::2]


def _common(one: Int[np.ndarray, "t"], other: Int[np.ndarray, "t"]) -> int:
    """Length of the common prefix of two sequences."""
    size = min(len(one), len(other))
    return int(np.cumprod(one[:size] == other[:size]).sum())


def _slide() -> Int[np.ndarray, "t"]:
    return np.array([IMAGE_ID], np.int32)


def _end(tokenizer: DecoderTokenizer) -> Int[np.ndarray, "t"]:
    return np.array(tokenizer.stop_ids[:1], np.int32)

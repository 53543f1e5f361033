"""Reports and answers about a viewer's slides by a run of the language stage."""

import threading
from collections.abc import Sequence

from pathflip_jax.data.texts.conversations import Turn
from pathflip_jax.inference.assistant import Rows, SlideAssistant
from pathflip_jax.inference.sources import SlideSource
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.viewer.cache import Cache
from pathflip_jax.viewer.grounder import LONGEST_TEXT, NO_FEATURES

ROWS_BYTES = 256 * 2**20
MOST_TURNS = 20


class Speaker:
    """Language model that answers questions about slides, one at a time; embeds each slide once."""

    def __init__(self, assistant: SlideAssistant, sampling: Sampling) -> None:
        self.assistant, self.sampling = assistant, sampling
        self._lock = threading.Lock()
        self._rows = Cache(ROWS_BYTES, lambda rows: rows.nbytes)

    def report(self, slide: SlideSource) -> str:
        """Generate a report of the slide."""
        rows = self._embedded(slide)
        with self._lock:
            return self.assistant.caption([rows], self.sampling)[0]

    def answer(self, slide: SlideSource, question: str, before: Sequence[tuple[str, str]] = ()) -> str:
        """Answer a question about the slide; `before` holds the previous questions and answers."""
        if not question.strip() or len(question) > LONGEST_TEXT:
            raise ValueError(f"the question has {len(question)} characters; expected 1 to {LONGEST_TEXT}")
        if len(before) > MOST_TURNS:
            raise ValueError(
                f"the conversation has {len(before)} questions, at most {MOST_TURNS}; reopen the slide to start over"
            )
        rows = self._embedded(slide)
        asked = self.assistant.prompt(question, rows, [Turn(*turn) for turn in before])
        with self._lock:
            return self.assistant.answer([asked], self.sampling)[0]

    def _embedded(self, slide: SlideSource) -> Rows:
        def make() -> Rows:
            features = slide.features()
            with self._lock:
                return self.assistant.embed_slides([features])[0]

        if slide.features is None:
            raise ValueError(f"slide {slide.slide_id}: found no features; {NO_FEATURES}")
        return self._rows.get(slide.slide_id, make)

"""Slide retrieval by text: the cosine of a text with the embedding of every slide.

Embeddings come from a file of `pathflip embed`, or are computed in the background once the viewer starts.
"""

import queue
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from pathflip_jax.inference.embed import checkpoint_hash
from pathflip_jax.inference.embedding_files import open_embeddings
from pathflip_jax.inference.predictor import Predictor
from pathflip_jax.inference.sources import SlideSource
from pathflip_jax.viewer.grounder import Grounder


class Search:
    """Embeddings of the slides that have one, by their number in the viewer's table."""

    def __init__(self, slides: Sequence[SlideSource], found: dict[int, Float[np.ndarray, "D"]] | None = None) -> None:
        self._slides = slides
        self._found = dict(found or {})
        self._waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # None: stop
        self._left = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, grounder: Grounder) -> None:
        """Compile the text encoder and embed slides that have features but no embedding yet, in the background."""
        for number, slide in enumerate(self._slides):
            if slide.features is not None and number not in self._found:
                self.add(number)
        self._thread = threading.Thread(target=self._embed, args=(grounder,), daemon=True)
        self._thread.start()

    def add(self, number: int) -> None:
        """Embed a slide that has features now, after those that wait."""
        self._left += 1
        self._waiting.put(number)

    def stop(self) -> None:
        """Stop the background work after the current slide."""
        self._stop.set()
        self._waiting.put(None)
        if self._thread is not None:
            self._thread.join()

    def _embed(self, grounder: Grounder) -> None:
        grounder.warm()
        while (number := self._waiting.get()) is not None and not self._stop.is_set():
            slide = self._slides[number]
            try:
                features = slide.features()
                with grounder.model_lock:  # released after each slide, so that requests are served in between
                    self._found[number] = grounder.predictor.encode_slide(features).slide
            except (ValueError, OSError, MemoryError) as error:
                print(f"slide {slide.slide_id} is left out of the search: {error}", file=sys.stderr)
            self._left -= 1

    def progress(self) -> dict[str, int | bool]:
        """Number of searchable slides, and whether more are being embedded."""
        return {
            "ready": len(self._found),
            "all": len(self._slides),
            "busy": self._left > 0,
        }

    def similarities(self, text: Float[np.ndarray, "D"]) -> dict[int, float]:
        """Cosine of a text with each slide that has an embedding, the highest first."""
        found = dict(self._found)
        if not found:
            return {}
        vectors = np.stack(list(found.values()))
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(text)
        cosines = vectors @ text / np.maximum(norms, 1e-12)
        numbers = list(found)
        return {numbers[i]: round(float(cosines[i]), 4) for i in np.argsort(-cosines)}


def read_slide_embeddings(
    path: Path, predictor: Predictor, slides: Sequence[SlideSource]
) -> dict[int, Float[np.ndarray, "D"]]:
    """Read the embeddings of the shown slides from a file of `pathflip embed`.

    Raises ValueError for a file of another run, whose embeddings are not in the space of this run's texts.
    """
    table, recorded = open_embeddings(path)
    if recorded.get("checkpoint_hash") != checkpoint_hash(predictor):
        raise ValueError(
            f"{path}: embeddings of another run ({recorded.get('checkpoint') or 'unnamed'}), expected those of "
            f"{predictor.name}; compute them with `pathflip embed RECORDS --checkpoint {predictor.name}`, or leave out "
            "--embeddings"
        )
    rows = dict(zip(table["slide_id"].to_pylist(), table["embedding"].to_numpy(), strict=True))
    return {i: rows[slide.slide_id] for i, slide in enumerate(slides) if slide.slide_id in rows}

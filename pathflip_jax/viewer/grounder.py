"""Interactive grounding: each slide is encoded once, after which a text costs a matrix product, less than a second.

The model runs one call at a time: two concurrent calls would share the cores, be slower and need twice the memory.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.grounding import maps
from pathflip_jax.grounding.maps import Grounding, Prepared
from pathflip_jax.grounding.methods import check_method, prepare, score
from pathflip_jax.inference.predictor import Predictor, TextEncoding
from pathflip_jax.inference.sources import SlideSource
from pathflip_jax.viewer.cache import Cache
from pathflip_jax.viewer.layers import Layer, make_layer

PREPARED_BYTES = 2**30  # cache of encoded slides; 10,000 patches of 256 numbers take 10 MB
LAYERS_BYTES = 256 * 2**20
TEXTS_BYTES = 16 * 2**20
WARM_TEXT, WARM_WORDS = "tissue", 24
LONGEST_TEXT, MOST_NEGATIVE = 2000, 8  # maximum characters of a text, maximum number of negative texts


class Grounder:
    """Scorer of texts on a viewer's slides by a trained run; caches encoded slides."""

    def __init__(self, predictor: Predictor, method: str | None = None, window: int = maps.WINDOW) -> None:
        self.predictor, self.method, self.window = predictor, check_method(predictor, method), window
        self.model_lock = threading.Lock()
        self._prepared = Cache(PREPARED_BYTES, _bytes_of)
        self._texts = Cache(TEXTS_BYTES, _bytes_of)
        self._layers = Cache(LAYERS_BYTES, lambda layer: layer.surface.values.nbytes + _bytes_of(layer.grounding))

    def prepared(self, slide: SlideSource) -> Prepared:
        """Encoded slide, cached. Raises ValueError or OSError for features that are unreadable or unsuitable."""

        def make() -> Prepared:
            features = slide.features()
            with self.model_lock:
                prepared = prepare(self.predictor, features, method=self.method, window=self.window)
            self._score(prepared, (WARM_TEXT,), ())  # compiles now rather than at the first query
            return prepared

        if slide.features is None:
            raise ValueError(f"slide {slide.slide_id}: found no features; {NO_FEATURES}")
        return self._prepared.get(slide.slide_id, make)

    def layer(self, slide: SlideSource, text: str, negative: Sequence[str] = (), mpp: float = 0.0) -> Layer:
        """Layer of a text on a slide, the negative texts subtracted; `mpp` is used for features that do not record it.

        Raises ValueError for a text without words."""
        text, negative = text.strip(), tuple(x.strip() for x in negative)
        for given in (text, *negative):
            if not given or len(given) > LONGEST_TEXT:
                raise ValueError(
                    f"the text has {len(given)} characters; enter what to look for in 1 to {LONGEST_TEXT} characters"
                )
        if len(negative) > MOST_NEGATIVE:
            raise ValueError(f"{len(negative)} negative texts: expected at most {MOST_NEGATIVE}")

        def make() -> Layer:
            grounding = self._score(self.prepared(slide), (text,), negative)
            return make_layer(grounding._replace(mpp=grounding.mpp or mpp))

        return self._layers.get((slide.slide_id, text, negative), make)

    def embed_text(self, text: str) -> Float[np.ndarray, "D"]:
        """Embed a text in the slide space. Raises ValueError for a text without words."""
        return self._encode_text(text).slide[0]

    def _encode_text(self, text: str) -> TextEncoding:
        def make() -> TextEncoding:
            with self.model_lock:
                return self.predictor.encode_texts(text)

        return self._texts.get(text, make)

    def warm(self) -> None:
        """Encode a text of each length up to a long sentence, so that no query waits for compilation."""
        for words in range(1, WARM_WORDS + 1):
            self.embed_text(" ".join([WARM_TEXT] * words))

    def _score(self, prepared: Prepared, texts: tuple[str, ...], negative: tuple[str, ...]) -> Grounding:
        each = [
            self._encode_text(text) for text in texts + negative
        ]  # one text per call, so that few shapes are compiled
        encoded = TextEncoding(*(np.concatenate(level) for level in zip(*each, strict=True)))
        with self.model_lock:
            return score(self.predictor, prepared, texts, negative=negative, encoded=encoded)


NO_FEATURES = "prepare the slide, and pass its records with --records or its feature files with --features"


def _bytes_of(found: NamedTuple) -> int:
    return sum(value.nbytes for value in found if isinstance(value, np.ndarray))

"""Interface of grounding methods: the encoder and slide that a method receives, and the functions it implements.

A method is a class in a file of this folder that is listed in `methods.py:FILES` and ends with the tuple `METHODS` of
the instances of its classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.grounding import maps
from pathflip_jax.grounding.maps import Prepared

# Parts of a model that a loss compares with texts; a method's map shows texts only if a loss has trained its parts.
SLIDES, REGIONS, ATTENTION = "slide embeddings", "region embeddings", "the attention of texts to regions"


class Encoder(Protocol):
    """Interface of a `Predictor` that methods use: encoding only, independent of maps.

    `encode_slots` returns a `SlideEncoding` of bags of patch indices [R, S], each with its own features;
    `attend_regions` the attention of texts over regions; `attend_single_regions` the text-conditioned embedding of
    each region as the only one of its slide. `untrained` and `unaligned` name parts of the model, each with the setting
    of the run to blame: those with weights that no loss trained, and those that were trained, but not by comparing them
    with texts.
    """

    patchwise: bool
    default_method: str
    name: str
    untrained: Mapping[str, str]
    unaligned: Mapping[str, str]

    def bag(self, slides) -> Any:
        """Features of the slide, and the patches in the slots of its regions."""

    def encode_slots(self, features: Sequence[np.ndarray], slots: Sequence[np.ndarray], attention: bool = False) -> Any:
        """Encoding of each bag."""

    def encode_texts(self, texts: Sequence[str]) -> Any:
        """Text embeddings in the slide space (`slide`) and in the region space (`region`)."""

    def attend_regions(
        self, texts: Float[np.ndarray, "C D"], regions: Float[np.ndarray, "R D"]
    ) -> Float[np.ndarray, "C R"]:
        """Attention, averaged over heads."""

    def attend_single_regions(self, regions: Float[np.ndarray, "R D"]) -> Float[np.ndarray, "R D"]:
        """Text-conditioned embeddings, the same for every text."""


class View(NamedTuple):
    """Input of a method's preparation: the slide's features, its regions, their encoding, and the window settings."""

    slide: Any
    features: Float[np.ndarray, "N F"]
    slots: Int[np.ndarray, "R S"]
    encoding: Any
    window: int
    context: int

    def window_slots(self) -> Int[np.ndarray, "N S"]:
        """Patches in each patch's window. Raises ValueError if neighbours cannot be determined."""
        if self.slide.patch_size <= 0 and self.window > 1:
            raise ValueError(
                f"slide {self.slide.slide_id}: the size of its patches is unknown, so neighbouring patches cannot be "
                "determined; import its features with --patch-size, or use a window of 1"
            )
        return maps.window_slots(self.slide.coords, self.slide.patch_size, self.window)


class Method(ABC):
    """Patch scoring method: preparation of a slide, and scoring of texts on it.

    `attention` requests the attention maps of the slide's encoding. `splits_regions`: the method is meaningful only
    where the model attends to regions of several patches; `rests_on`: only where these parts of the model are trained.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    attention: ClassVar[bool] = False
    splits_regions: ClassVar[bool] = False
    rests_on: ClassVar[tuple[str, ...]] = (REGIONS,)

    def prepare(self, encoder: Encoder, view: View) -> Float[np.ndarray, "N ..."] | None:
        """Text-independent state of a slide that the method precomputes, besides its regions."""
        return None

    @abstractmethod
    def score(
        self, encoder: Encoder, prepared: Prepared, text: Any, region_scores: Float[np.ndarray, "C R"]
    ) -> Float[np.ndarray, "C N"]:
        """Scores of every patch for each text, given those of the regions."""

"""Grounding methods: ways to turn one trained model into a score per patch for a text.

The model is trained to attend from a subcaption to regions (DESIGN section 3.6); a map wants patches. The methods
differ in how they get from one to the other; `docs/grounding_methods.md` compares them. A method is a class with an
entry in `METHODS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.data.storage.blocks import row_blocks
from pathflip_jax.grounding import maps
from pathflip_jax.grounding.maps import CONTEXT, WINDOW, Grounding, Prepared


class Encoder(Protocol):
    """The part of a `Predictor` that methods use: it encodes, and knows nothing of maps.

    `encode_slots` gives a `SlideEncoding` of bags of patch indices [R, S], each of features of its own;
    `attend_regions` the attention of texts over regions; `alone` the text-conditioned embedding of each region as the
    only one of its slide.
    """

    patchwise: bool
    default_method: str

    def bag(self, slides) -> Any:
        """The slide's features, and the patches in the slots of its regions."""

    def encode_slots(self, features: Sequence[np.ndarray], slots: Sequence[np.ndarray], attention: bool = False) -> Any:
        """The encoding of each bag."""

    def encode_texts(self, texts: Sequence[str]) -> Any:
        """The texts in the space of slides, `slide`, and of regions, `region`."""

    def attend_regions(
        self, texts: Float[np.ndarray, "C D"], regions: Float[np.ndarray, "R D"]
    ) -> Float[np.ndarray, "C R"]:
        """Attention, mean of the heads."""

    def alone(self, regions: Float[np.ndarray, "R D"]) -> Float[np.ndarray, "R D"]:
        """Text-conditioned embeddings, the same for every text."""


class View(NamedTuple):
    """A slide as a method prepares it: its features file, its regions, their encoding, and the settings of windows."""

    slide: Any
    features: Float[np.ndarray, "N F"]
    slots: Int[np.ndarray, "R S"]
    encoding: Any
    window: int
    context: int

    def window_slots(self) -> Int[np.ndarray, "N S"]:
        """The patches of each patch's window. Raises ValueError where neighbours cannot be told."""
        if self.slide.patch_size <= 0 and self.window > 1:
            raise ValueError(
                f"slide {self.slide.slide_id}: the size of its patches is unknown, so neighbours cannot be told; "
                "import it with --patch-size, or ground with a window of 1"
            )
        return maps.window_slots(self.slide.coords, self.slide.patch_size, self.window)


class Method(ABC):
    """A way to score patches: what it keeps of a slide, and how a text is scored on that.

    `attention` asks for the attention maps of the slide's encoding. `splits_regions`: it has a meaning only where the
    model attends to regions of several patches.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    attention: ClassVar[bool] = False
    splits_regions: ClassVar[bool] = False

    def prepare(self, encoder: Encoder, view: View) -> Float[np.ndarray, "N ..."] | None:
        """Whatever of a slide no text changes, beside its regions."""
        return None

    @abstractmethod
    def score(
        self, encoder: Encoder, prepared: Prepared, text: Any, region_scores: Float[np.ndarray, "C R"]
    ) -> Float[np.ndarray, "C N"]:
        """Scores of every patch for texts, given those of the regions."""


class Region(Method):
    """Attention of the text over regions: the logarithm of its ratio to uniform attention, 0 as anywhere else."""

    name = "region"
    description = "the attention of the text to a region, on all of its patches"

    def score(self, encoder, prepared, text, region_scores):
        """Each patch has its region's score."""
        return maps.spread(region_scores, prepared.slots, len(prepared.coords))


class RefinedRegion(Region):
    """`Region`, refined by the patch cross-attention of the Region Q-Former."""

    name = "attention"
    description = "the same, refined inside the region by the cross-attention of its queries to patches"
    attention = True
    splits_regions = True

    def prepare(self, encoder, view):
        """The share of each patch in the attention to its region [N]."""
        return maps.patch_shares(view.encoding.region_attention[0], view.slots, len(view.slide.features))

    def score(self, encoder, prepared, text, region_scores):
        """The score of the region and the logarithm of the share."""
        return super().score(encoder, prepared, text, region_scores) + np.log(np.maximum(prepared.kept, 1e-9))


class Patch(Method):
    """Windows as regions: attention of the text over them, as `Region` over regions."""

    name = "patch"
    description = "every patch with its window is a region; the attention of the text to those"

    def prepare(self, encoder, view):
        """The region embedding of each window [N, D]."""
        slots = view.window_slots()
        if encoder.patchwise:
            return maps.window_means(view.encoding.regions[0], slots)
        return maps.window_regions(_encode_of(encoder, view), slots, view.context)

    def score(self, encoder, prepared, text, region_scores):
        """The logarithm of attention over its uniform value."""
        return maps.log_ratio(encoder.attend_regions(text.region, prepared.kept))


class Cosine(Patch):
    """Cosine of the text with the region embedding of each window, past the text-region attention."""

    name = "cosine"
    description = "the cosine of the text with the region embedding of each window"

    def score(self, encoder, prepared, text, region_scores):
        """Cosines with regions."""
        return cosine(text.region, prepared.kept)


class Similarity(Cosine):
    """Cosine with each window alone before the text: the quantity that the region loss pulls (DESIGN section 4)."""

    name = "similarity"
    description = "the cosine of the text with the text-conditioned embedding of a slide that has this window only"

    def prepare(self, encoder, view):
        """The text-conditioned embedding of each window, alone [N, D]."""
        return encoder.alone(super().prepare(encoder, view))


class Slide(Method):
    """Cosine with each window as a slide of its own.

    No neighbour leaks in through the region transformer, and it asks nothing of weights that only the region loss
    trains: the fair map of a model that was trained without that loss.
    """

    name = "slide"
    description = "every patch with its window is a slide; the cosine of the text with its slide embedding"

    def prepare(self, encoder, view):
        """The slide embedding of each window [N, D]."""
        return maps.window_slides(_encode_of(encoder, view), view.window_slots(), view.context)

    def score(self, encoder, prepared, text, region_scores):
        """Cosines with slides."""
        return cosine(text.slide, prepared.kept)


METHODS: dict[str, Method] = {
    method.name: method for method in (Region(), RefinedRegion(), Patch(), Similarity(), Cosine(), Slide())
}


def describe_methods() -> str:
    """The methods by name, each with its description: the help of --method."""
    return "; ".join(f"{name}: {method.description}" for name, method in METHODS.items())


def prepare(
    encoder: Encoder, slide, *, method: str | None = None, window: int = WINDOW, context: int = CONTEXT
) -> Prepared:
    """Encode of a slide what no text changes, so that many texts can be scored on it (method None: the family's own).

    Raises ValueError for a method that there is not or that the family does not have, an even window, and a slide
    without coordinates: there is no place to put a score.
    """
    name = method or encoder.default_method
    if name not in METHODS:
        raise ValueError(f"method {name!r} is none of {', '.join(METHODS)}")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window}: a patch stands in the middle of its window; give an odd number")
    found = METHODS[name]
    if found.splits_regions and encoder.patchwise:
        raise ValueError(
            f"method {name!r} refines regions by their patches, and this model attends to patches; ground with 'region'"
        )
    if slide.coords is None:
        raise ValueError(
            f"slide {slide.slide_id}: its feature file holds no coordinates, so a text has no place on it; "
            "extract features in a format that stores them (CLAM or TRIDENT h5)"
        )
    bag = encoder.bag(slide)
    encoding = encoder.encode_slots([bag.features], [bag.slots], attention=found.attention)
    return Prepared(
        slide_id=slide.slide_id,
        coords=slide.coords,
        patch_size=slide.patch_size,
        mpp=slide.mpp,
        width=slide.width,
        height=slide.height,
        method=name,
        slots=bag.slots,
        regions=encoding.regions[0, : len(bag.slots)],
        kept=found.prepare(encoder, View(slide, bag.features, bag.slots, encoding, window, context)),
    )


def score(
    encoder: Encoder,
    prepared: Prepared,
    texts: str | Sequence[str],
    *,
    negative: str | Sequence[str] = (),
    encoded: Any = None,
) -> Grounding:
    """Score texts on a slide that `prepare` has encoded: a matrix product for each further text.

    The highest score of the `negative` texts is subtracted (`maps.subtract`). `encoded` is what `encode_texts` made of
    the texts and the negative ones behind them, where that is known.
    """
    texts, negative = as_tuple(texts), as_tuple(negative)
    text = encoder.encode_texts(texts + negative) if encoded is None else encoded
    region_scores = maps.log_ratio(encoder.attend_regions(text.region, prepared.regions))
    patch_scores = METHODS[prepared.method].score(encoder, prepared, text, region_scores)
    found = Grounding(
        slide_id=prepared.slide_id,
        texts=texts + negative,
        patch_scores=np.asarray(patch_scores, np.float32),
        region_scores=np.asarray(region_scores, np.float32),
        coords=prepared.coords,
        patch_size=prepared.patch_size,
        mpp=prepared.mpp,
        width=prepared.width,
        height=prepared.height,
        method=prepared.method,
    )
    return maps.subtract(found, len(negative))


def as_tuple(texts: str | Sequence[str]) -> tuple[str, ...]:
    """Texts as they are given, one or several."""
    return (texts,) if isinstance(texts, str) else tuple(texts)


def cosine(a: Float[np.ndarray, "C D"], b: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "C N"]:
    """The cosine of each a with each b, many at a time: b may be the patches of a large slide."""
    a = _unit(a)
    return np.concatenate([a @ _unit(part).T for _, part in row_blocks(b)], axis=1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _encode_of(encoder: Encoder, view: View):
    """The function by which windows of a slide are encoded: patch indices [B, R, S] to a `SlideEncoding`."""
    return lambda index: encoder.encode_slots([view.features] * len(index), index)

"""Grounding methods: patch scores for a text from a trained model.

The model is trained to attend from a subcaption to regions (DESIGN section 3.6); a map needs scores of patches. The
methods differ in how they derive one from the other; `docs/grounding_methods.md` compares them. A method is a class
with an entry in `METHODS`.
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
    """Interface of a `Predictor` that methods use: encoding only, independent of maps.

    `encode_slots` returns a `SlideEncoding` of bags of patch indices [R, S], each with its own features;
    `attend_regions` the attention of texts over regions; `attend_single_regions` the text-conditioned embedding of
    each region as the only one of its slide.
    """

    patchwise: bool
    default_method: str

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
        """Patches of each patch's window. Raises ValueError where neighbours cannot be determined."""
        if self.slide.patch_size <= 0 and self.window > 1:
            raise ValueError(
                f"slide {self.slide.slide_id}: the size of its patches is unknown, so neighbours cannot be told; "
                "import it with --patch-size, or ground with a window of 1"
            )
        return maps.window_slots(self.slide.coords, self.slide.patch_size, self.window)


class Method(ABC):
    """Patch scoring method: preparation of a slide, and scoring of texts on it.

    `attention` requests the attention maps of the slide's encoding. `splits_regions`: the method is meaningful only
    where the model attends to regions of several patches.
    """

    name: ClassVar[str]
    description: ClassVar[str]
    attention: ClassVar[bool] = False
    splits_regions: ClassVar[bool] = False

    def prepare(self, encoder: Encoder, view: View) -> Float[np.ndarray, "N ..."] | None:
        """Text-independent quantities of a slide, besides its regions."""
        return None

    @abstractmethod
    def score(
        self, encoder: Encoder, prepared: Prepared, text: Any, region_scores: Float[np.ndarray, "C R"]
    ) -> Float[np.ndarray, "C N"]:
        """Scores of every patch for each text, given those of the regions."""


class Region(Method):
    """Attention of the text over regions: the logarithm of its ratio to uniform attention, 0 where it is uniform."""

    name = "region"
    description = "the attention of the text to a region, on all of its patches"

    def score(self, encoder, prepared, text, region_scores):
        """Region scores copied to their patches."""
        return maps.copy_to_patches(region_scores, prepared.slots, len(prepared.coords))


class RefinedRegion(Region):
    """`Region`, refined by the patch cross-attention of the Region Q-Former."""

    name = "attention"
    description = "the same, refined inside the region by the cross-attention of its queries to patches"
    attention = True
    splits_regions = True

    def prepare(self, encoder, view):
        """Share of each patch in the attention to its region [N]."""
        return maps.patch_shares(view.encoding.region_attention[0], view.slots, len(view.slide.features))

    def score(self, encoder, prepared, text, region_scores):
        """Sum of the region's score and the logarithm of the share."""
        return super().score(encoder, prepared, text, region_scores) + np.log(np.maximum(prepared.kept, 1e-9))


class Patch(Method):
    """Attention of the text over windows, as `Region` over regions."""

    name = "patch"
    description = "every patch with its window is a region; the attention of the text to those"

    def prepare(self, encoder, view):
        """Region embedding of each window [N, D]."""
        slots = view.window_slots()
        if encoder.patchwise:
            return maps.window_means(view.encoding.regions[0], slots)
        return maps.window_regions(_encode_of(encoder, view), slots, view.context)

    def score(self, encoder, prepared, text, region_scores):
        """Logarithm of attention over its uniform value."""
        return maps.log_ratio(encoder.attend_regions(text.region, prepared.kept))


class Cosine(Patch):
    """Cosine of the text with the region embedding of each window, bypassing the text-region attention."""

    name = "cosine"
    description = "the cosine of the text with the region embedding of each window"

    def score(self, encoder, prepared, text, region_scores):
        """Cosines with window region embeddings."""
        return cosine(text.region, prepared.kept)


class Similarity(Cosine):
    """Cosine with the text-conditioned embedding of each window alone, as in the region loss (DESIGN section 4)."""

    name = "similarity"
    description = "the cosine of the text with the text-conditioned embedding of a slide that has this window only"

    def prepare(self, encoder, view):
        """Text-conditioned embedding of each window alone [N, D]."""
        return encoder.attend_single_regions(super().prepare(encoder, view))


class Slide(Method):
    """Cosine with the slide embedding of each window taken as a separate slide.

    No neighbour leaks in through the region transformer, and no weights that only the region loss trains are used: the
    fair map for a model trained without that loss.
    """

    name = "slide"
    description = "every patch with its window is a slide; the cosine of the text with its slide embedding"

    def prepare(self, encoder, view):
        """Slide embedding of each window [N, D]."""
        return maps.window_slides(_encode_of(encoder, view), view.window_slots(), view.context)

    def score(self, encoder, prepared, text, region_scores):
        """Cosines with window slide embeddings."""
        return cosine(text.slide, prepared.kept)


METHODS: dict[str, Method] = {
    method.name: method for method in (Region(), RefinedRegion(), Patch(), Similarity(), Cosine(), Slide())
}


def describe_methods() -> str:
    """Methods by name, each with its description: the help of --method."""
    return "; ".join(f"{name}: {method.description}" for name, method in METHODS.items())


def prepare(
    encoder: Encoder, slide, *, method: str | None = None, window: int = WINDOW, context: int = CONTEXT
) -> Prepared:
    """Encode a slide independently of texts, so that many can be scored on it (method None: the family's default).

    Raises ValueError for a method that does not exist or that the family does not support, an even window, and a slide
    without coordinates, on which no score can be located.
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
    """Score texts on a slide that `prepare` has encoded: one matrix product per additional text.

    The highest score of the `negative` texts is subtracted (`maps.subtract`). `encoded` is the result of `encode_texts`
    for the texts followed by the negative ones, where available.
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
    """One or several texts as a tuple."""
    return (texts,) if isinstance(texts, str) else tuple(texts)


def cosine(a: Float[np.ndarray, "C D"], b: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "C N"]:
    """Cosine of each a with each b, in blocks: b may be the patches of a large slide."""
    a = _unit(a)
    return np.concatenate([a @ _unit(part).T for _, part in row_blocks(b)], axis=1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _encode_of(encoder: Encoder, view: View):
    """Encoder of a slide's windows: a function from patch indices [B, R, S] to a `SlideEncoding`."""
    return lambda index: encoder.encode_slots([view.features] * len(index), index)

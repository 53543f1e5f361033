"""Inference with a trained model: embeddings of slides and texts, and grounding of texts on slides.

Slides have any number of regions, and XLA compiles once per shape. Regions and patch slots are therefore padded to a
few sizes (masked, hence without effect), and a cohort costs a handful of compilations.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from pathflip_jax.data.readers.feature_recipe import FeatureRecipe, objection
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.records.regions import EDGE_UM, Regions, cut_regions
from pathflip_jax.grounding import maps, methods
from pathflip_jax.grounding.maps import Grounding
from pathflip_jax.grounding.method import ATTENTION, REGIONS, SLIDES
from pathflip_jax.inference import large_slides
from pathflip_jax.inference.families import SERVING
from pathflip_jax.inference.sources import choose_one
from pathflip_jax.losses.pathflip import CosinePooling
from pathflip_jax.model.families import family_of
from pathflip_jax.model.pathflip import SlideEncoding
from pathflip_jax.runtime import memory
from pathflip_jax.runtime.buckets import bucket
from pathflip_jax.vision.recipes import registry_name

log = logging.getLogger(__name__)

QUEUE_BYTES = 4 << 30  # bytes of features at which no more slides are queued for encoding
LARGE = 16  # memory is checked for features above 1 / LARGE of the free memory


class TextEncoding(NamedTuple):
    """Text embeddings in the slide space and in the region space: identical for PathFLIP, distinct for PathFLIP2."""

    slide: Float[np.ndarray, "n D"]
    region: Float[np.ndarray, "n D"]


class Embedding(NamedTuple):
    """Slide in the joint space: its embedding, its regions' and their grid columns and rows (-1 in `scan`)."""

    slide_id: str
    slide: Float[np.ndarray, "D"]
    regions: Float[np.ndarray, "R D"]
    grid: Int[np.ndarray, "R 2"]


@functools.partial(jax.jit, static_argnames="attention")
def _encode_slides(model, patches, mask, attention):
    return model.encode_slides(patches, mask, attention=attention)


@jax.jit
def _encode_texts(model, rows, text_index):
    states = model.read_texts(rows, text_index)
    return TextEncoding(model.project_texts(states, "slide"), model.project_texts(states, "region"))


@jax.jit
def _attend(attention, texts, regions, mask):
    return attention(texts, regions, mask)


def region_slots(order: Int[np.ndarray, "N"], rows: Int[np.ndarray, "R+1"]) -> Int[np.ndarray, "R S"]:
    """Patch index in every slot of every region, -1 where a region has fewer patches than the fullest one."""
    counts = np.diff(rows)
    slots = np.full((len(counts), int(counts.max(initial=1))), -1, np.int32)
    region = np.repeat(np.arange(len(counts)), counts)
    slots[region, np.arange(rows[-1]) - np.repeat(rows[:-1], counts)] = order[: rows[-1]]
    return slots


class CutSlides(NamedTuple):
    """Patches of a slide, or of all slides of a case, and their assignment to regions."""

    slide_id: str
    features: Float[np.ndarray, "N F"]
    slots: Int[np.ndarray, "R S"]
    grid: Int[np.ndarray, "R 2"]


class Predictor:
    """Trained run that encodes slides and texts, and grounds texts on slides.

    Takes `SlideFeatures` of any origin, cut into regions as the run's records were.
    """

    def __init__(self, model, config: dict, tokenizer, name: str = "") -> None:
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.name = name
        data = config.get("data", {})
        try:
            self.encoder = str(data.get("encoder") or "")
            self.recipe = FeatureRecipe.from_dict(data["recipe"]) if data.get("recipe") else None
            self.cut = str(data.get("cut") or "grid")
            self.edge_um = float(data.get("edge_um") or EDGE_UM)
            self.edge_px = None if data.get("edge_px") is None else int(data["edge_px"])
            self.caption_length = int(data.get("caption_length") or 384)
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f'{name}: its config.json has no valid section "data" ({error}); restore a copy') from None
        #: Settings that the run does not state and that were assumed: older runs, and third-party weights.
        self.assumed = tuple(map(str, config.get("assumed") or ())) or self._assumed_settings(data)
        #: Whether patches take the role that regions have in other families.
        self.patchwise = family_of(model.config).patchwise
        self._serving = SERVING[model.config.family]
        loss = config.get("loss")
        self._read_loss(loss if isinstance(loss, dict) else {})
        self.default_method = self._serving.default_method
        self._encoders: dict[tuple, Callable] = {}  # by input size

    def _read_loss(self, loss: dict) -> None:
        """Set how texts pool regions, as in the loss of the run, and which parts of the model it left untrained."""
        self._pooling = None  # of regions by a text without parameters of its own; None: the model's attention
        if loss.get("region_pooling") == "cosine":
            try:
                self._pooling = CosinePooling(float(loss["pooling_temperature"]))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f'{self.name}: its config.json has no valid "pooling_temperature" in its section "loss" '
                    f"({error!r}); restore a copy"
                ) from None
        weights = {SLIDES: "slide_weight", REGIONS: "region_weight"}
        left = {part: f"loss.{weight} is 0" for part, weight in weights.items() if loss.get(weight) == 0}
        #: Parts of the model that no loss trained, and parts that none compared with texts, as in `grounding.method`.
        self.untrained, self.unaligned = (left, {}) if self._serving.own_projections else ({}, left)
        if REGIONS in left and self._pooling is None:
            self.untrained = self.untrained | {ATTENTION: left[REGIONS]}

    @property
    def _attention(self):
        """Pooling of regions by a text, as trained."""
        return self._pooling or self.model.text_region

    def _assumed_settings(self, data: dict) -> tuple[str, ...]:
        """Settings that a run does not state, with the values assumed for them."""
        lines = [] if "encoder" in data else ["the patch encoder is not known: features of any encoder are accepted"]
        lines += [] if data.get("cut") else [f"regions are cut by {self.cut}"]
        if self.cut == "grid" and data.get("edge_um") is None and data.get("edge_px") is None:
            lines.append(f"regions are {self.edge_um:g} um wide")
        if self.tokenizer is not None and not data.get("caption_length"):
            lines.append(f"captions of at most {self.caption_length} tokens")
        return tuple(lines)

    def check_records(self, records: Records) -> None:
        """Raise ValueError for records of another width, patch encoder or recipe than the run was trained on."""
        self.check_features(records.where, records.feature_dim, records.encoder, records.recipe)

    def check_features(self, where: str, width: int, encoder: str, recipe: FeatureRecipe | None = None) -> None:
        """Raise ValueError for features of another width, patch encoder or recipe than the run was trained on.

        What either side does not know is no reason; the spellings of a published encoder's name are equal.
        """
        name, trained = self.name or "the model", self.model.config.feature_dim
        if width != trained:
            raise ValueError(
                f"{where}: features are {width} wide, {name} was trained on {trained}; extract them again with its "
                f"patch encoder {self.encoder or '(not recorded)'}"
            )
        if self.encoder and encoder and registry_name(encoder) != registry_name(self.encoder):
            raise ValueError(
                f"{where}: features come from {encoder!r}, {name} was trained on {self.encoder!r}; features of two "
                f"encoders do not share a space: extract them again with {self.encoder!r}"
            )
        if found := objection(_in_registry(recipe), _in_registry(self.recipe)):
            raise ValueError(
                f"{where}: features are not made as those that {name} was trained on: {found}; prepare the slides with "
                f"`--encoder {self.encoder or 'ENCODER'}` and the weights, patch size and mpp of that run (data.recipe "
                "in its config.json)"
            )

    def read(self, path, slide_id: str | None = None, **settings) -> SlideFeatures:
        """Read one slide for this run: a slide file or DICOM series, a feature file, or a slide of records or a folder.

        A slide file is tiled and encoded as the slides of the run's training were, with a progress bar, and kept in a
        cache on disk. `slide_id` chooses from several slides, `settings` are those of `reading.ReadingSettings`: cache,
        weights of the patch encoder, patch_size and mpp where neither file nor run states them.
        Raises ValueError for a run whose encoder is unknown or not at hand, and for a slide that cannot be encoded.
        """
        from pathflip_jax.inference.reading import ReadingSettings, SlideReader

        reader = SlideReader(self, ReadingSettings(**settings))
        return reader.read(choose_one(reader.find(path, [slide_id] if slide_id else None), path))

    def bag(self, slides: SlideFeatures | Sequence[SlideFeatures]) -> CutSlides:
        """Cut slides into regions; several slides form one bag, their regions concatenated (DESIGN section 4).

        Raises ValueError for features of another width, patch encoder or recipe than the run was trained on.
        """
        slides = [slides] if isinstance(slides, SlideFeatures) else list(slides)
        slots, grids, start = [], [], 0
        for slide in slides:
            recipe = slide.recipe or FeatureRecipe(patch_um=slide.patch_size * slide.mpp)
            self.check_features(f"slide {slide.slide_id}", slide.features.shape[1], slide.encoder, recipe)
            regions = self._patches(slide) if self.patchwise else self._regions(slide)
            cut = region_slots(regions.order, regions.rows)
            slots.append(np.where(cut >= 0, cut + start, -1))
            grids.append(regions.grid)
            start += len(slide.features)
        widest = max(cut.shape[1] for cut in slots)
        slots = [np.pad(cut, ((0, 0), (0, widest - cut.shape[1])), constant_values=-1) for cut in slots]
        features = slides[0].features if len(slides) == 1 else np.concatenate([slide.features for slide in slides])
        return CutSlides("+".join(s.slide_id for s in slides), features, np.concatenate(slots), np.concatenate(grids))

    def region_patches(self, slide: SlideFeatures) -> Int[np.ndarray, "R S"]:
        """Patches of the regions that `encode_regions` embeds, -1 where a region has fewer than the fullest."""
        regions = self._regions(slide)
        return region_slots(regions.order, regions.rows)

    def _regions(self, slide: SlideFeatures) -> Regions:
        return cut_regions(slide, cut=self.cut, edge_um=self.edge_um, edge_px=self.edge_px)

    def _patches(self, slide: SlideFeatures) -> Regions:
        return cut_regions(slide, cut="patch")

    def encode_slots(
        self, features: Sequence[np.ndarray], slots: Sequence[np.ndarray], attention=False
    ) -> SlideEncoding:
        """Encode several bags of patch indices [R, S] in one padded call; returns NumPy arrays, still padded."""
        rows = bucket(max(s.shape[0] for s in slots))
        columns = bucket(max(s.shape[1] for s in slots))
        if rows * columns > large_slides.MOST_PATCHES and not attention and self._serving.in_blocks:
            return large_slides.encode(self.model, features, slots)
        patches, mask = large_slides.padded(features, slots, (bucket(len(slots)), rows, columns))
        size = (patches.shape, patches.dtype, attention)
        if size not in self._encoders:
            what = f"{len(slots)} slides of up to {max(map(len, features)):,} patches"
            self._encoders[size] = self._encoder(patches, mask, attention, what)
        return jax.device_get(self._encoders[size](self.model, patches, mask))

    def _encoder(self, patches: np.ndarray, mask: np.ndarray, attention: bool, what: str) -> Callable:
        """Encoder for inputs of one size: compiled once for all runs; large inputs get a program that fits."""
        free = memory.free_bytes(jax.local_devices()[0])
        if free is None or patches.nbytes <= free / LARGE:
            return functools.partial(_encode_slides, attention=attention)
        program = _encode_slides.lower(self.model, patches, mask, attention).compile()
        memory.check_slide(program, what)
        return program

    def encode_slide(self, slide: SlideFeatures | Sequence[SlideFeatures]) -> Embedding:
        """Embed a slide with all its regions; a list of slides is embedded as one case."""
        return next(self.encode_slides([slide]))

    def encode_slides(self, slides: Iterable, batch_size: int = 8) -> Iterator[Embedding]:
        """Embed slides (or lists of slides) in order; those of one padded size share a call."""
        for window in _windows(map(self.bag, slides), 4 * batch_size):
            sizes: dict[tuple[int, int], list[int]] = {}
            for i, bag in enumerate(window):
                sizes.setdefault((bucket(bag.slots.shape[0]), bucket(bag.slots.shape[1])), []).append(i)
            found: dict[int, Embedding] = {}
            for members in sizes.values():
                for first in range(0, len(members), batch_size):
                    batch = members[first : first + batch_size]
                    encoding = self.encode_slots([window[i].features for i in batch], [window[i].slots for i in batch])
                    for row, i in enumerate(batch):
                        regions = encoding.regions[row, : len(window[i].slots)]
                        found[i] = Embedding(window[i].slide_id, encoding.slide[row], regions, window[i].grid)
            yield from (found[i] for i in range(len(window)))

    def encode_regions(self, slides: Iterable, batch_size: int = 8) -> Iterator[Embedding]:
        """Embed slides as `encode_slides`, with regions in the text space in which the region loss compares them.

        A PathFLIP2 region is the mean of its patches, which are cut into regions as the run's records were.
        """
        slides, again = itertools.tee(slides)
        for slide, embedding in zip(again, self.encode_slides(slides, batch_size), strict=True):
            regions = self.attend_single_regions(embedding.regions)
            if self.patchwise:
                cut = self._regions(slide)
                regions = np.add.reduceat(regions[cut.order], cut.rows[:-1]) / np.diff(cut.rows)[:, None]
                embedding = embedding._replace(grid=cut.grid)
            yield embedding._replace(regions=regions)

    def encode_text(self, texts: str | Sequence[str], batch_size: int = 32) -> Float[np.ndarray, "n D"]:
        """Embed texts in the slide space, in order. Raises ValueError for a text without words."""
        return self.encode_texts(texts, batch_size).slide

    def encode_texts(self, texts: str | Sequence[str], batch_size: int = 32) -> TextEncoding:
        """Embed texts, in order, for comparison with slides and with regions.

        Where a PathFLIP2 pools "mean_padded", an embedding depends on the longest of the texts given together, as in
        the released code. Raises ValueError for a text without words.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for number, text in enumerate(texts):
            if not any(letter.isalnum() for letter in text):
                raise ValueError(f"text {number} has no words: {text!r}; leave it out or write what to look for")
        tokens = self.tokenizer.encode(texts, self.caption_length)
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))  # texts of one length share a call
        found = TextEncoding(*(np.zeros((len(texts), self.model.config.embed_dim), np.float32) for _ in range(2)))
        padded = max(map(len, tokens)) if self._serving.shares_padding(self.model.config) else 0
        for first in range(0, len(order), batch_size):
            members = order[first : first + batch_size]
            rows, length = bucket(len(members)), padded or bucket(max(len(tokens[i]) for i in members))
            length = min(length, self.model.config.max_positions)
            ids, segments = np.zeros((1, rows, length), np.int32), np.zeros((1, rows, length), np.int32)
            segments[:, :, 0] = 1  # rows without a text hold one padding token, so that no row is all masked
            for row, i in enumerate(members):
                ids[0, row, : len(tokens[i])] = tokens[i]
                segments[0, row, : len(tokens[i])] = 1
            positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
            starts = np.arange(rows, dtype=np.int32)[None] * length
            encoded = _encode_texts(self.model, [(ids, segments, positions)], starts)
            for whole, part in zip(found, encoded, strict=True):
                whole[members] = np.asarray(part, np.float32)[0, : len(members)]
        return found

    def ground(
        self,
        slide: SlideFeatures,
        texts: str | Sequence[str],
        *,
        negative: str | Sequence[str] = (),
        method: str | None = None,
        window: int = maps.WINDOW,
        context: int = maps.CONTEXT,
    ) -> Grounding:
        """Score every patch of a slide for every text, by one of `grounding.methods.METHODS` (None: the family's own).

        The highest score of the `negative` texts is subtracted (`maps.subtract`). `window` (an odd number of patches)
        and `context` matter to the methods that look at patches one by one.
        Raises ValueError for a slide without coordinates, on which no score can be located, and for a method whose
        weights the run never trained.
        """
        texts, negative = methods.as_tuple(texts), methods.as_tuple(negative)
        encoded = self.encode_texts(texts + negative)  # first: refuses a text without words early
        prepared = methods.prepare(self, slide, method=method, window=window, context=context)
        return methods.score(self, prepared, texts, negative=negative, encoded=encoded)

    def check_query(self, texts: Sequence[str], method: str | None = None) -> None:
        """Raise ValueError for a text without words, and for a method whose weights the run never trained."""
        methods.check_method(self, method)
        self.encode_texts(texts)

    def attend(self, slide: SlideFeatures) -> Float[np.ndarray, "N"]:
        """Text-independent attention map: log of the Slide Q-Former's cross-attention to each patch over its mean.

        Baseline that a grounding must beat: the model attends to some patches more than to others whatever the text.
        """
        bag = self.bag(slide)
        encoding = self.encode_slots([bag.features], [bag.slots], attention=True)
        weights = maps.patch_weights(encoding.slide_attention[0], bag.slots, len(slide.features))
        return np.log(np.maximum(weights, 1e-9))

    def attend_regions(self, texts: np.ndarray, regions: np.ndarray) -> np.ndarray:
        """Attention of each text over the regions [C, R], averaged over heads."""
        count, size, rows = len(regions), bucket(len(regions)), bucket(len(texts))
        keys = np.zeros((1, size, regions.shape[1]), np.float32)
        keys[0, :count] = regions
        queries = np.zeros((1, rows, regions.shape[1]), np.float32)
        queries[0, : len(texts)] = texts
        _, weights = _attend(self._attention, queries, keys, np.arange(size)[None] < count)
        return np.asarray(weights, np.float32)[0, : len(texts), :count]

    def attend_single_regions(self, regions: np.ndarray) -> np.ndarray:
        """Text-conditioned embedding of each region taken as the only one of its slide [R, D].

        A single region receives all the attention whatever the text, so the embedding is the same for every text.
        """
        size = bucket(len(regions))
        keys = np.zeros((size, 1, regions.shape[1]), np.float32)
        keys[: len(regions), 0] = regions
        pooled, _ = _attend(self._attention, np.zeros_like(keys), keys, np.ones((size, 1), bool))
        return np.asarray(pooled, np.float32)[: len(regions), 0]


def _in_registry(recipe: FeatureRecipe | None) -> FeatureRecipe | None:
    return recipe and replace(recipe, encoder=registry_name(recipe.encoder))


def _windows(bags: Iterable[CutSlides], most: int) -> Iterator[list[CutSlides]]:
    """Bags in order, in groups of at most `most`, or fewer where features in memory reach QUEUE_BYTES."""
    window, held = [], 0
    for bag in bags:
        window.append(bag)
        held += bag.features.nbytes if isinstance(bag.features, np.ndarray) else 0
        if len(window) == most or held >= QUEUE_BYTES:
            yield window
            window, held = [], 0
    if window:
        yield window

"""Grounding scored against true outlines: do patches inside a concept's outline score above the others?

One ROC AUC per slide and concept, over the patches of the slide; a slide's figure is the mean over the concepts
present in it, a cohort's the mean over slides. A random map has 0.5.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from pathflip_jax.data.features import SlideFeatures
from pathflip_jax.evaluate import colour, scores
from pathflip_jax.grounding.outlines import area_fraction, patches_inside, read_outlines

TRAIN_PATCHES = 100  # per training slide, for the colour baseline
TRAIN_SLIDES = 100


def true_patches(
    folder, slide: SlideFeatures, concepts: list[str], clear: float | None = None
) -> tuple[Bool[np.ndarray, "C N"], Bool[np.ndarray, "N"]]:
    """Which patches lie in each concept's outlines, and which patches count.

    A patch lies where its centre lies. With `clear` (say 0.25), patches that an outline cuts with a share of their
    area between `clear` and 1 - `clear` do not count: nobody can say what they show.
    """
    path = Path(folder) / f"{slide.slide_id}.geojson"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no outlines of slide {slide.slide_id}; expected <slide_id>.geojson")
    outlines = read_outlines(path)
    inside = np.stack([patches_inside(outlines.get(c, []), slide.coords, slide.patch_size) for c in concepts])
    counts = np.ones(len(slide.coords), bool)
    if clear is not None:
        for concept in concepts:
            share = area_fraction(outlines.get(concept, []), slide.coords, slide.patch_size)
            counts &= (share <= clear) | (share >= 1 - clear)
    return inside, counts


def concept_scores(predictor, slide: SlideFeatures, concepts: dict[str, list[str]], **how) -> Float[np.ndarray, "C N"]:
    """The patch scores of each concept: the mean over its texts, each grounded by itself."""
    texts = [text for listed in concepts.values() for text in listed]
    found = predictor.ground(slide, texts, **how).patch_scores
    ends = np.cumsum([len(listed) for listed in concepts.values()])
    return np.stack([part.mean(0) for part in np.split(found, ends[:-1])])


def concept_aucs(
    inside: Bool[np.ndarray, "C N"], found: Float[np.ndarray, "C N"], counts=None
) -> Float[np.ndarray, "C"]:
    """The ROC AUC of each concept's map, NaN where the slide has no patch of it or nothing else."""
    counts = np.ones(inside.shape[1], bool) if counts is None else counts
    ones = np.ones((1, int(counts.sum())))
    return np.array([scores.auc(t[counts], s[counts])(ones)[0] for t, s in zip(inside, found, strict=True)])


class ColourMap:
    """The mean-colour baseline: a patch scores the share of a concept among the training patches of its colour."""

    def __init__(self, slides, files: dict[str, Path], folder, concepts: list[str], seed: int = 0) -> None:
        """Gather colours of patches of the training slides; `slides` yields their `SlideFeatures`."""
        rng = np.random.default_rng(seed)
        colours, inside = [], []
        for slide in slides:
            if slide.slide_id not in files or not (Path(folder) / f"{slide.slide_id}.geojson").exists():
                continue
            kept = rng.permutation(len(slide.coords))[:TRAIN_PATCHES]
            colours.append(colour.patch_colours(files[slide.slide_id], slide.coords[kept], slide.patch_size))
            inside.append(true_patches(folder, slide, concepts)[0][:, kept].T)
            if len(colours) == TRAIN_SLIDES:
                break
        if not colours:
            raise ValueError(f"no training slide has both a slide file and outlines in {folder}: no colour baseline")
        self.files, self.colours, self.inside = files, np.concatenate(colours), np.concatenate(inside)

    def __call__(self, slide: SlideFeatures) -> Float[np.ndarray, "C N"]:
        """The scores of every concept on a slide that has a slide file."""
        found = colour.patch_colours(self.files[slide.slide_id], slide.coords, slide.patch_size)
        return colour.concept_shares(self.colours, self.inside, found).T

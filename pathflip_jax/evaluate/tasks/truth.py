"""The ground truth of a cohort's slides: patches inside the outlines of each concept, and lesions."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.readers.outlines import (
    Polygon,
    area_fraction,
    of_concept,
    patches_inside,
    read_annotations,
    read_outlines,
    unknown_classes,
)
from pathflip_jax.evaluate.cohort import Cohort
from pathflip_jax.evaluate.prompt_files import read_prompts
from pathflip_jax.evaluate.tasks import froc
from pathflip_jax.grounding.placement import check_on_slide

THRESHOLD_SLIDES = 30  # maximum number of training slides on which the thresholds are chosen

Truth = tuple[Bool[np.ndarray, "C N"], Bool[np.ndarray, "N"]]  # patches inside, and patches that count


class LesionTask(NamedTuple):
    """The number of the concept whose outlines are lesions, and the lesions of each slide."""

    concept: int
    slides: dict[str, froc.Lesions]


class Outlined(NamedTuple):
    """The texts of each concept, and the ground truth of the slides with outlines.

    `training` slides choose thresholds and are not scored.
    """

    concepts: dict[str, list[str]]
    truth: dict[str, Truth]  # by slide id
    training: dict[str, Truth]
    lesions: LesionTask | None


def read_outlined(
    cohort: Cohort, concepts, outlines, *, clear: float | None, lesions: str | None, seed: int
) -> Outlined:
    """Read the texts of concepts (`read_prompts`) and the outlines of a cohort, `<slide_id>.geojson` in a folder.

    `clear` is that of `true_patches`, `lesions` the concept whose outlines are lesions; `seed` draws the slides on
    which thresholds are chosen. Slides, annotations and classes that are left out become warnings of the cohort.
    """
    named, folder = read_prompts(concepts).classes, Path(outlines)
    if not folder.is_dir():
        raise FileNotFoundError(f"{outlines}: no such folder of outlines (<slide_id>.geojson)")
    outlined = [slide for slide in cohort.slide_ids if (folder / f"{slide}.geojson").exists()]
    if not outlined:
        raise ValueError(
            f"{outlines}: no outlines for any slide of the split; expected files such as {cohort.slide_ids[0]}.geojson"
        )
    if len(outlined) < len(cohort.slide_ids):
        left = len(cohort.slide_ids) - len(outlined)
        cohort.warnings.append(f"{left} slides have no outlines and are left out of grounding")
    truth, unknown = {}, Counter()
    for slide in map(cohort.features, outlined):
        annotations = read_annotations(folder / f"{slide.slide_id}.geojson")
        truth[slide.slide_id] = patches_of(annotations.outlines, slide, list(named), clear)
        if note := annotations.note():
            cohort.warnings.append(f"{slide.slide_id}.geojson: {note}")
        unknown.update(unknown_classes(annotations.outlines, named))
        if slide.width and slide.height:
            try:
                check_on_slide(slide, slide.width, slide.height, "the slide according to its record")
            except ValueError as error:
                cohort.warnings.append(str(error))
    if not any(inside.any() for inside, _ in truth.values()):
        raise ValueError(
            f"{concepts}: none of its concepts ({', '.join(named)}) is outlined in {outlines}{_on_slides(unknown)}"
        )
    if unknown:
        cohort.warnings.append(
            f"outlines of classes that are not among the concepts count as background{_on_slides(unknown)}"
        )
    training: dict[str, Truth] = {}
    for slide in cohort.train_features(seed):
        if len(training) == THRESHOLD_SLIDES:
            break
        if (folder / f"{slide.slide_id}.geojson").exists():
            training[slide.slide_id] = true_patches(folder, slide, list(named), clear)
    if not training:
        cohort.warnings.append(
            "no training slide has outlines on which thresholds could be chosen, so grounding is scored without Dice"
        )
    task = None
    if lesions is not None:
        task = read_lesion_task(folder, map(cohort.features, outlined), list(named), lesions)
    return Outlined(named, truth, training, task)


def _on_slides(classes: Counter) -> str:
    """The number of slides with each of these classes, as the end of a sentence."""
    shown = [f"{name!r} on {count} slide{'s' * (count > 1)}" for name, count in classes.most_common(5)]
    return "".join([": ", ", ".join(shown), ", ..." if len(classes) > 5 else ""]) if shown else ""


def true_patches(folder, slide: SlideFeatures, concepts: list[str], clear: float | None = None) -> Truth:
    """The patches inside each concept's outlines, and the patches that count.

    A patch is inside if its centre is. With `clear` (say 0.25), patches of which an outline covers a fraction between
    `clear` and 1 - `clear` do not count: their label is ambiguous.
    """
    path = Path(folder) / f"{slide.slide_id}.geojson"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no outlines of slide {slide.slide_id}; expected <slide_id>.geojson")
    return patches_of(read_outlines(path), slide, concepts, clear)


def patches_of(
    outlines: dict[str, list[Polygon]], slide: SlideFeatures, concepts: list[str], clear: float | None = None
) -> Truth:
    """`true_patches` of outlines by class."""
    inside = np.stack([patches_inside(of_concept(outlines, c), slide.coords, slide.patch_size) for c in concepts])
    counts = np.ones(len(slide.coords), bool)
    if clear is not None:
        for concept in concepts:
            share = area_fraction(of_concept(outlines, concept), slide.coords, slide.patch_size)
            counts &= (share <= clear) | (share >= 1 - clear)
    return inside, counts


def read_lesion_task(folder, slides: Iterable[SlideFeatures], concepts: list[str], concept: str) -> LesionTask:
    """The lesions that the outlines of a concept form on each slide.

    Raises ValueError for an unknown concept, slides of unknown size or mpp, and a cohort without a lesion that counts.
    """
    if concept not in concepts:
        raise ValueError(f"lesions of {concept!r}: no such concept; expected one of {', '.join(concepts)}")
    found = {}
    for slide in slides:
        if not (slide.width and slide.height and slide.mpp):
            raise ValueError(
                f"slide {slide.slide_id}: its size or mpp is unknown, and lesions are measured in micrometres; prepare "
                "the slide, or import its features with --mpp from files that say the size (CLAM, TRIDENT)"
            )
        polygons = of_concept(read_outlines(Path(folder) / f"{slide.slide_id}.geojson"), concept)
        found[slide.slide_id] = froc.read_lesions(polygons, slide.width, slide.height, slide.mpp)
    if not any(area.counts for lesions in found.values() for area in lesions.areas):
        raise ValueError(f"{folder}: no outline of {concept!r} is a lesion of {froc.ISOLATED_UM:g} um or more")
    return LesionTask(concepts.index(concept), found)

"""The slides of a split to score, with warnings about the split."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.records.splits import unknown_split_message
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.text import read_slide_table, rename_rows
from pathflip_jax.evaluate import colour
from pathflip_jax.evaluate.patients import name_patients
from pathflip_jax.evaluate.splits import NO_SIDE, check_split


class Cohort(NamedTuple):
    """One split of a slide table: records, ids, patients and labels of its slides, and the rows of the whole table.

    `train` are the rows of the training split, empty if that is the one to score; `table` are all rows. `slide_files`
    are those found, by slide id, and `colours` what `mean_colour` has read from them; copies of a cohort share it.
    """

    records: Records
    slide_ids: list[str]
    patients: list[str]
    labels: list[str | None]
    train: list[dict]
    warnings: list[str]
    split: str
    table: list[dict]
    slide_files: dict[str, Path]
    colours: dict[str, Float[np.ndarray, "3"] | None]

    def rows(self, split: str) -> list[dict]:
        """The rows of a split whose slides are in the records."""
        known = set(self.records.slides.column("slide_id"))
        return [row for row in self.table if row["split"] == split and row["slide_id"] in known]

    @property
    def known_train(self) -> list[dict]:
        """The rows of `train` whose slides are in the records."""
        known = set(self.records.slides.column("slide_id"))
        return [row for row in self.train if row["slide_id"] in known]

    @property
    def patient_of(self) -> dict[str, str]:
        """The patient of each slide of the split."""
        return dict(zip(self.slide_ids, self.patients, strict=True))

    @property
    def cases(self) -> list[tuple[str, str]]:
        """The two names that texts may use for each slide's case: the records' case id and the table's patient."""
        patients = {row["slide_id"]: row["patient_id"] for row in self.table}
        slides = self.records.slides
        pairs = zip(slides.column("slide_id"), slides.column("case_id"), strict=True)
        return [(case_id, patients.get(slide_id, "")) for slide_id, case_id in pairs]

    def features(self, slide_id: str) -> SlideFeatures:
        """The features of a slide."""
        return open_slide(self.records, self.records.position(slide_id))

    def mean_colour(self, slide_id: str) -> Float[np.ndarray, "3"] | None:
        """The mean RGB of a slide's patches, its pixels read once; None without a slide file or places of patches."""
        if slide_id not in self.slide_files:
            return None
        if slide_id not in self.colours:
            slide, mean = self.features(slide_id), None
            if slide.coords is not None and slide.patch_size > 0:
                mean = colour.patch_colours(self.slide_files[slide_id], slide.coords, slide.patch_size).mean(0)
            self.colours[slide_id] = mean
        return self.colours[slide_id]

    def train_features(self, seed: int = 0) -> Iterator[SlideFeatures]:
        """The features of the training slides in the records, in random order."""
        ids = [row["slide_id"] for row in self.known_train]
        for i in np.random.default_rng(seed).permutation(len(ids)):
            yield self.features(ids[i])


def read_cohort(records, slides, split: str, strict: bool = False, images=None) -> Cohort:
    """The slides of one split, with the slide files found in the folder `images`.

    Raises ValueError for a split without slides and for slides without records. Faults that make scores optimistic
    (patients in two splits) become warnings in the report, or with `strict` errors.
    """
    table = read_slide_table(slides)
    if not any(row["split"] == split for row in table):
        raise ValueError(f"{unknown_split_message(slides, split, table)}; choose another with --split")
    check = check_split(table)
    records = Records(records)
    known = set(records.slides.column("slide_id"))
    table, notes = rename_rows(name_patients(table), list(known), slides)
    rows = [row for row in table if row["split"] == split]
    unknown = [row["slide_id"] for row in rows if row["slide_id"] not in known]
    if unknown:
        raise ValueError(
            f"{slides}: {preview(unknown)} of split {split!r} are not among the {len(known)} slides of the records; "
            "prepare them, or remove them from the table (scores of the other slides would hide that they are missing)"
        )
    train = [row for row in table if row["split"] == "train" and split != "train"]
    if strict and check.faults:
        listed = "; ".join(fault.text for fault in check.faults)
        raise ValueError(f"{slides}: faulty split: {listed}. Correct it (pathflip split), or score without --strict")
    warnings = [*notes, *(finding.text for finding in check.findings if finding.kind != NO_SIDE)]
    if split == "train":
        warnings.append("the scored slides are training slides: the scores do not estimate performance on new slides")
    return Cohort(
        records,
        [row["slide_id"] for row in rows],
        [row["patient_id"] for row in rows],
        [row["label"] or None for row in rows],
        train,
        warnings,
        split,
        table,
        slide_files={} if images is None else colour.slide_files(images),
        colours={},
    )


def name_labels(cohort: Cohort, class_of: Callable[[str | None], str | None]) -> Cohort:
    """The cohort with its labels replaced by the classes that they are spellings of."""
    table = [row | {"label": class_of(row["label"] or None) or ""} for row in cohort.table]
    train = [row for row in table if row["split"] == "train" and cohort.split != "train"]
    return cohort._replace(labels=[class_of(label) for label in cohort.labels], train=train, table=table)

"""Assignment of slides to cases and patients, reconciled across slide table, records and text table.

Slides of one case or one patient by any of these sources are never negatives of each other (DESIGN section 4).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from pathflip_jax.data.texts.identity import Key, barcode_patient, clean_id, fold, fold_slide, is_missing, patient_keys
from pathflip_jax.data.texts.text import SlideText


class Sources(NamedTuple):
    """Slide table, and the names of all sources for messages.

    `rows` are those of `read_slide_table` by slide id, in the spelling of the records.
    """

    rows: Mapping[str, Mapping[str, str]] = {}
    slides: str = "the slide table"
    records: str = "the records"
    texts: str = "the text table"


NO_TABLE = Sources()


class _Statement(NamedTuple):
    """Case, patient, or both, of a slide in one source."""

    source: str
    names: Sequence[str]

    def folded(self) -> set[str]:
        return {fold(name) for name in (*self.names, *map(barcode_patient, self.names)) if name}

    def described(self) -> str:
        return f"{' / '.join(dict.fromkeys(self.names))} in {self.source}"


def bag_keys(
    members: Sequence[tuple[str, ...]],
    grouped: Mapping[tuple[str, ...], Sequence[SlideText]],
    case_of: Mapping[str, str],
    sources: Sources,
) -> list[set[Key]]:
    """Keys of each bag of slides: bags that share a key, directly or through others, are of one patient.

    The records (`case_of`) and the texts name a case or a patient without distinction: a name in the slide table has
    its meaning there. A slide's own id and its barcode add no information. Raises ValueError if two sources name
    different ones.
    """
    keys_of = _keys_of(sources.rows.values())
    keys: list[set[Key]] = []
    faults: dict[str, tuple[_Statement, _Statement]] = {}
    for slides in members:
        own: set[Key] = set()
        cases = [text.case_id for text in grouped[slides] if _is_informative(text.case_id, slides)]
        for slide in slides:
            row = sources.rows.get(slide, {})
            table = [row.get("case_id", ""), row.get("patient_id", "")]
            own |= patient_keys(slide, *table)
            statements = [_Statement(sources.slides, [name for name in table if _is_informative(name, [slide])])]
            if _is_informative(case_of[slide], [slide]):
                statements.append(_Statement(sources.records, [case_of[slide]]))
            statements += [_Statement(sources.texts, [case]) for case in cases]
            statements = [one for one in statements if one.names]
            if not statements or statements[0].source != sources.slides:  # else they repeat the table, or are faults
                own |= {key for one in statements for name in one.names for key in keys_of(name)}
            for other in statements[1:]:
                if not statements[0].folded() & other.folded():
                    faults[slide] = statements[0], other
        keys.append(own)
    if faults:
        raise ValueError(_disagreement(faults, sources))
    return keys


def slides_of_case(rows: Iterable[Mapping[str, str]]) -> Callable[[str], tuple[str, ...]]:
    """Function from the name of a case, or of a patient if no case has that name, to its slides in a table."""
    cases: defaultdict[str, list[str]] = defaultdict(list)
    patients: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        for column, slides in (("case_id", cases), ("patient_id", patients)):
            if not is_missing(row[column]):
                slides[fold(row[column])].append(row["slide_id"])

    def find(name: str) -> tuple[str, ...]:
        return () if is_missing(name) else tuple(cases.get(fold(name)) or patients.get(fold(name), ()))

    return find


def _is_informative(name: str, slides: Sequence[str]) -> bool:
    """Whether a name adds information on the patient beyond the slides' own ids."""
    if is_missing(name):
        return False
    barcodes = {barcode_patient(clean_id(slide)) for slide in slides} - {""}
    return fold(name) not in map(fold_slide, slides) and barcode_patient(name) not in barcodes


def _keys_of(rows: Iterable[Mapping[str, str]]) -> Callable[[str], set[Key]]:
    """Function from a name to its keys: of a case, or of a patient in the table if no case has that name."""
    rows = list(rows)
    cases, patients = ({fold(row[name]) for row in rows} for name in ("case_id", "patient_id"))

    def keys(name: str) -> set[Key]:
        patient = fold(name) in patients and fold(name) not in cases
        return patient_keys(patient_id=name) if patient else patient_keys(case_id=name)

    return keys


def _disagreement(faults: Mapping[str, tuple[_Statement, _Statement]], sources: Sources) -> str:
    (slide, (one, other)), more = next(iter(faults.items())), len(faults) - 1
    involved = {one.source, other.source}
    cures = []
    if sources.slides in involved:
        cures.append(f"correct case_id or patient_id of the slide in {sources.slides}")
    if sources.texts in involved:
        cures.append(f"correct the case of its text in {sources.texts}")
    if sources.records in involved:
        cures.append(f"write {sources.records} again, with --slides and a correct table")
    if not sources.rows:
        cures.append("give a slide table with both, as case_id and patient_id (--config.data.slides)")
    return (
        f"slide {slide} belongs to {one.described()}, but to {other.described()}"
        + (f", and the sources disagree on {more} more slides" if more else "")
        + f". Slides of one patient are never negatives of each other, so these must agree: {', or '.join(cures)}"
    )

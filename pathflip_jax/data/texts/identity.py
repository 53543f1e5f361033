"""Identity of slides, cases and patients: equivalent spellings of ids, and missing values.

Tables pass through spreadsheets, data frames and file systems: 123 becomes 123.0, "0045" becomes 45, an umlaut two
characters, a missing value the text "nan". All comparisons of ids in this project use `fold`ed ids, and `connected`
over `patient_keys` decides whether two slides are of one patient.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from numbers import Number
from typing import Any

import numpy as np

EMPTY = frozenset({"", "nan", "<na>", "nat", "null"})  # folded by `fold`, as are MISSING
MISSING = EMPTY | {
    "na", "n/a", "#n/a", "none", "unknown", "'--", "not available", "not reported", "[not available]", "[unknown]",
}  # fmt: skip
_BEGINNINGS = frozenset(word[:1] for word in MISSING)
_LONGEST_WORD = 64  # characters, including white space
SUFFIXES = re.compile(
    r"(\.(ome|h5|hdf5|pt|pth|npy|npz|csv|svs|tiff?|ndpi|mrxs|scn|vms|vmu|bif|czi|dcm|svslide|png|jpe?g))+$",
    re.IGNORECASE,
)
UUID = re.compile(r"\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)  # suffix of a TCGA slide id
_NUMBER = re.compile(r"(0*([0-9]+?))(?:\.0+)?")
_BARCODE = re.compile(r"TCGA-\w{2}-\w{4}(?!\w)|C3[LN]-\d{5}(?!\d)", re.IGNORECASE)

Key = tuple[str, str]
Cases = Sequence[str | tuple[str, ...]]


def is_missing(value: Any) -> bool:
    """Whether a cell is missing: None, NaN, an empty text, or a word that tables use for "not available"."""
    return _short(value) in MISSING if isinstance(value, str) else is_empty(value)


def is_empty(value: Any) -> bool:
    """Whether a free-text cell is empty; "None" and "unknown" are valid answers and options there."""
    if value is None or (isinstance(value, Number) and value != value):
        return True
    return isinstance(value, str) and _short(value) in EMPTY


def clean_id(name: str) -> str:
    """Slide id from a table, without folder and without the suffix of a slide or feature file."""
    last = name.strip().replace("\\", "/").rstrip("/").rpartition("/")[2]
    return _without_suffix(last.strip()).strip()


def fold(name: str, zeros: bool = False) -> str:
    """Id normalised for comparison: equal for spellings that differ in case, Unicode form, spaces, suffix or ".0".

    Leading zeros of a number are dropped too unless `zeros` keeps them: spreadsheets lose them, so "0045" and "45" are
    the same id.
    """
    text = _plain(_without_suffix(name.strip()))
    number = _NUMBER.fullmatch(text) if text[:1].isdigit() else None
    return number.group(1 if zeros else 2) if number else text


def fold_slide(name: str, zeros: bool = False) -> str:
    """Slide id normalised for comparison: `fold`, applied to the file name without its folder."""
    return fold(clean_id(name), zeros)


def preferred_spelling(spellings: Iterable[str]) -> str:
    """Preferred spelling of an id: 123 before 123.0, 0045 before 45, then the most frequent."""
    counts = Counter(spellings)
    return min(counts, key=lambda name: (name.endswith(".0"), -len(name) if name.isdigit() else 0, -counts[name]))


def barcode_patient(name: str) -> str:
    """Patient of a TCGA or CPTAC barcode ("TCGA-A7-A0CJ-01Z-00-DX2" -> "TCGA-A7-A0CJ"), else ""."""
    match = _BARCODE.match(name.strip())
    return match.group(0).upper() if match else ""


def patient_keys(slide_id: str = "", case_id: str = "", patient_id: str = "") -> set[Key]:
    """Identity keys of a slide's row: two slides that share a key are of one patient (`connected`)."""
    keys = {("slide", fold_slide(slide_id))} if slide_id else set()
    keys |= {(kind, fold(name)) for kind, name in (("case", case_id), ("patient", patient_id)) if not is_missing(name)}
    patients = {barcode_patient(name) for name in (clean_id(slide_id), case_id, patient_id)} - {""}
    return keys | {("patient", fold(patient)) for patient in patients}


def connected(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """Connected components of items that share keys, as group numbers in order of first appearance."""
    from scipy.sparse import coo_array  # takes 0.3 s, spent only where slides are grouped
    from scipy.sparse.csgraph import connected_components

    ids: dict[Hashable, int] = {}
    pairs = [(item, ids.setdefault(key, len(ids))) for item, own in enumerate(keys) for key in own]
    items, places = np.array(pairs, int).reshape(-1, 2).T
    size = len(keys) + len(ids)
    graph = coo_array((np.ones(len(pairs), bool), (items, places + len(keys))), shape=(size, size))
    labels = connected_components(graph, directed=False)[1][: len(keys)].tolist()
    numbers: dict[int, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in labels]


class SlideNames:
    """Lookup of slides by every name that a table may use, the only matching of names to slides.

    `case_ids` gives the case of each slide, by one id or several; TCGA and CPTAC barcodes name it too.
    """

    def __init__(self, slide_ids: Sequence[str], case_ids: Cases | None = None) -> None:
        self._levels: list[defaultdict[str, set[str]]] = [defaultdict(set) for _ in _SPELLINGS]
        self._bare: defaultdict[str, set[str]] = defaultdict(set)
        self._cases: defaultdict[str, list[str]] = defaultdict(list)
        for number, slide in enumerate(slide_ids):
            for names, spell in zip(self._levels, _SPELLINGS, strict=True):
                names[spell(slide)].add(slide)
            self._bare[_without_uuid(slide)].add(slide)
            cases = case_ids[number] if case_ids is not None else ()
            cases = (cases,) if isinstance(cases, str) else cases
            for case in {fold(one) for one in (*cases, barcode_patient(clean_id(slide))) if not is_missing(one)}:
                self._cases[case].append(slide)

    def find(self, name: str) -> list[str]:
        """Slide of this name; [] if there is none or the name is ambiguous.

        An identical spelling takes precedence, then a name without folder and suffix, then an equal folded name, then
        TCGA ids of which one lacks the `.UUID`: DX1 is not DX10, and another UUID is another slide.
        """
        found: set[str] = set()
        for names, spell in zip(self._levels, _SPELLINGS, strict=True):
            found = found or names.get(spell(name), set())
        if not found:
            bare, folded = _without_uuid(name), self._levels[-1]
            found = (folded if bare != fold_slide(name) else self._bare).get(bare, set())
        return list(found) if len(found) == 1 else []

    def of_case(self, case: str) -> list[str]:
        """Slides of a case or patient, in order."""
        return [] if is_missing(case) else list(self._cases.get(fold(case), []))


def _without_suffix(name: str) -> str:
    return SUFFIXES.sub("", name) if "." in name else name


def _without_uuid(name: str) -> str:
    name = clean_id(name)
    return fold(UUID.sub("", name) if "." in name else name)


def _short(text: str) -> str:
    """Text normalised by `_plain` if it may be a word for "missing", else unchanged."""
    text = text.strip()
    if text.isascii() and text[:1].lower() not in _BEGINNINGS:  # most cells: the rest takes ten times longer
        return text
    return _plain(text) if len(text) < _LONGEST_WORD else text


def _plain(text: str) -> str:
    """Text normalised in case, Unicode form and white space."""
    if text.isascii():
        return " ".join(text.casefold().split())
    for _ in range(2):  # a folded character may decompose again
        text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", text).split())


# Normalisations of a slide's name, from exact to widest: if two slides share one, an earlier one distinguishes them.
_SPELLINGS = (str, clean_id, lambda name: fold_slide(name, zeros=True), fold_slide)

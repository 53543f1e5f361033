"""Cases and pixel sizes from a slide table, for the preparation of records."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pathflip_jax.data.readers.h5_features import UM_TIMES_MAGNIFICATION
from pathflip_jax.data.storage.failures import Failure, preview
from pathflip_jax.data.storage.files import Place
from pathflip_jax.data.texts.identity import is_missing
from pathflip_jax.data.texts.text import match_rows, read_slide_table

SANE_MPP = (0.05, 10.0)  # from beyond a 100x objective to a 1x one
_SANE_MAGNIFICATION = (1.0, 200.0)
_ALIKE = 1.25  # nominal and measured resolution of one objective are within this factor


@dataclass(frozen=True)
class SlideTable:
    """Rows of a table by slide: `cases` and `mpp` (level 0) of those that have one; `absent`, rows without a file.

    `unlisted` are the slides that have no row.
    """

    cases: dict[str, str] = field(default_factory=dict)
    mpp: dict[str, float] = field(default_factory=dict)
    absent: list[Failure] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_table(table: Place | str, slide_ids: Sequence[str], known: Sequence[str] = ()) -> SlideTable:
    """Read a slide table for these slides; `known` are others that may be in it too.

    Raises ValueError when it has no row for any of the slides, for two rows of one slide, and for an impossible
    resolution.
    """
    rows = [row | {"listed": row["slide_id"]} for row in read_slide_table(table)]
    found, notes = match_rows(rows, sorted({*slide_ids, *known}), table)
    own = {slide: found[slide] for slide in slide_ids if slide in found}
    if slide_ids and not own:
        raise ValueError(
            f"{table}: none of its {len(rows)} slide ids is among the {len(slide_ids)} slides; it has "
            f"{preview(row['slide_id'] for row in rows)}, the slides are {preview(slide_ids)}; slide ids are file "
            "names without the extension"
        )
    matched = {row["listed"] for row in found.values()}
    error = f"{table}: a row without a file; add the file, or remove the row from the table"
    absent = [Failure(row["slide_id"], "", error) for row in rows if row["listed"] not in matched]
    mpp = {slide: value for slide, row in own.items() if (value := _mpp(row, f"{table}: slide {row['listed']}"))}
    if mpp:
        notes.append(f"mpp taken from {table}: {len(mpp)} slides ({preview(mpp)})")
    unlisted = [slide for slide in slide_ids if slide not in own]
    if unlisted:
        found = f"slides that are not in {table}: {len(unlisted)} ({preview(unlisted)})"
        notes.append(f"{found}; their cases are derived from their ids")
    return SlideTable({slide: row["case_id"] for slide, row in own.items()}, mpp, absent, unlisted, notes)


def _mpp(row: dict[str, str], where: str) -> float | None:
    """Resolution from a row's columns mpp and magnification; None where they are empty."""
    mpp = _number(row.get("mpp"), "mpp", SANE_MPP, where)
    power = _number(row.get("magnification"), "magnification", _SANE_MAGNIFICATION, where)
    nominal = UM_TIMES_MAGNIFICATION / power if power else None
    if mpp and nominal and not 1 / _ALIKE <= mpp / nominal <= _ALIKE:
        raise ValueError(
            f"{where}: mpp {mpp:g} and magnification {power:g} contradict each other ({power:g}x is about {nominal:g} "
            "um per pixel); correct one of them or leave it empty"
        )
    return mpp or nominal


def _number(text: str | None, name: str, sane: tuple[float, float], where: str) -> float | None:
    if is_missing(text):
        return None
    plain = re.sub(r"(?<=\d)\s*[x×]$", "", str(text).strip(), flags=re.IGNORECASE) if name == "magnification" else text
    plain = str(plain).strip()
    if re.fullmatch(r"\d*,\d+", plain):  # a decimal comma
        plain = plain.replace(",", ".")
    try:
        value = float(plain)
    except ValueError:
        value = float("nan")
    if not sane[0] <= value <= sane[1]:
        looks_like_power = name == "mpp" and value > sane[1]
        hint = "; is it the magnification? Then rename the column to magnification" if looks_like_power else ""
        raise ValueError(
            f"{where}: {name} {str(text)!r:.40}, expected a number from {sane[0]:g} to {sane[1]:g}, or an empty "
            f"cell{hint}"
        )
    return value

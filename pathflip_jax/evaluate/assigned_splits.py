"""Published splits, assigned to the slides of a table that has their labels and patients."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.texts.identity import SlideNames
from pathflip_jax.data.texts.split_files import SlideTableFile, folds_hint, read_split_rows
from pathflip_jax.data.texts.tables import write_csv
from pathflip_jax.data.texts.text import slide_row
from pathflip_jax.evaluate.splits import Check, Finding, check_split, with_sides

Row = Mapping[str, str]


def assign_split(rows: Sequence[Row], source: SlideTableFile) -> tuple[list[dict[str, str]], list[Finding]]:
    """The rows of a slide table with the split of another file, and a note on slides that the table lacks.

    Ids match as everywhere (`SlideNames`). A slide without a split there gets "", and one under two sides has two rows,
    for the check to find. Raises ValueError for a file without a split and for one of other slides.
    """
    given = [slide_row(row) for row in read_split_rows(source)]
    if not any(row["split"] for row in given):
        raise ValueError(f"{source}: no slide in it is in a split{folds_hint(given)}")
    names = SlideNames([row["slide_id"] for row in rows])
    sides: dict[str, list[str]] = {}
    absent = []
    for row in given:
        found = names.find(row["slide_id"])
        absent += [] if found else [row["slide_id"]]
        for slide in found:
            sides.setdefault(slide, []).append(row["split"])
    if not sides:
        raise ValueError(
            f"{source}: none of its {len(given)} slides ({preview(absent)}) is among the {len(rows)} slides of the "
            f"table ({preview(row['slide_id'] for row in rows)}); pass the table of the same slides"
        )
    assigned = [
        dict(row) | {"split": side}
        for row in rows
        for side in dict.fromkeys(filter(None, sides.get(row["slide_id"], []))) or [""]
    ]
    if not absent:
        return assigned, []
    text = f"{len(absent)} of {len(given)} slides of {source} are not in the table and left out: {preview(absent)}"
    return assigned, [Finding("slides not in the table", False, text, absent)]


def write_assigned(rows: Sequence[Row], source: SlideTableFile, out: Path) -> Check:
    """Write a slide table with the split of another file; returns its check.

    Raises ValueError as `assign_split`, and for slides under two sides.
    """
    table, notes = assign_split(rows, source)
    sides: dict[str, list[str]] = {}
    for row in table:
        sides.setdefault(row["slide_id"], []).append(row["split"])
    if twice := [f"{slide}: {' and '.join(own)}" for slide, own in sides.items() if len(own) > 1]:
        raise ValueError(
            f"{source}: {len(twice)} slides are in more than one split or listed twice ({preview(twice)}); keep each "
            "once"
        )
    write_csv(out, with_sides(table, [row["split"] for row in table]))
    check = check_split(table)
    return check._replace(findings=[*check.findings, *notes])

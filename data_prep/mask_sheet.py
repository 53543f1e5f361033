"""Contact sheet of a cohort's tissue masks: a thumbnail of every slide with the outlines of its tissue, for review."""

import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw, ImageFont

from data_prep.mask_files import FOLDER, MaskFacts, mask_files, read_facts
from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.files import Place, list_files, read_bytes

_WIDTH, _MARGIN, _HEAD, _CAPTION = 1920, 24, 76, 50  # pixels of a page
_COLUMNS = ((4, 2), (12, 4))  # up to so many slides, so many columns
_MOST_COLUMNS, _ROWS = 6, 4
_INK, _QUIET, _ALARM, _FRAME, _PAPER = (30, 30, 30), (110, 110, 110), (190, 30, 30), (205, 205, 205), (255, 255, 255)
_EMPTY = (238, 238, 238)
_DPI = 150.0


def masked_slides(out: Place) -> set[str]:
    """Ids of the slides whose masks are in a folder of records."""
    try:
        names = list_files(out / FOLDER)
    except FileNotFoundError:
        return set()
    return {name.removesuffix(".geojson") for name in names if name.endswith(".geojson")}


def write_sheet(out: Place, written: Collection[str], path: Path) -> list[Path]:
    """Draw the masks of a folder of records, by slide id; returns the files.

    `written` are the slides that have a record: others, and slides without tissue, are marked. More than a page of
    slides becomes the pages of a PDF, or numbered PNG files. Raises ValueError for a folder without slides.
    """
    slides = sorted({*written, *masked_slides(out)})
    if not slides:
        raise ValueError(f"{out}: no tissue mask to draw for --sheet, and no slide")
    facts = {slide: read_facts(out, slide) for slide in slides}
    columns = next((columns for most, columns in _COLUMNS if len(slides) <= most), _MOST_COLUMNS)
    page = columns * _ROWS
    groups = [slides[start : start + page] for start in range(0, len(slides), page)]
    shares = [found.share for found in facts.values() if found]
    title = f"{out.name}: tissue of {len(slides)} slide{'s' * (len(slides) > 1)}"
    title += f", median share {_percent(median(shares))}" if shares else ""
    titles = [title + (f", page {i + 1} of {len(groups)}" if len(groups) > 1 else "") for i in range(len(groups))]
    pages = (_page(out, group, facts, written, (text, columns)) for group, text in zip(groups, titles, strict=True))
    if path.suffix.lower() == ".pdf":
        return [_write_pdf(path, pages)]
    names = [path if len(groups) == 1 else path.with_stem(f"{path.stem}-{i + 1}") for i in range(len(groups))]
    for name, image in zip(names, pages, strict=True):
        data = io.BytesIO()
        image.save(data, "PNG", dpi=(_DPI, _DPI))
        with atomic_file(name) as file:
            file.write(data.getvalue())
    return names


def _write_pdf(path: Path, pages: Iterator[Image.Image]) -> Path:
    data = io.BytesIO()
    for number, image in enumerate(pages):  # one by one: a cohort has hundreds
        image.save(data, "PDF", resolution=_DPI, append=number > 0)
    with atomic_file(path) as file:
        file.write(data.getvalue())
    return path


def _page(
    out: Place,
    slides: Sequence[str],
    facts: dict[str, MaskFacts | None],
    written: Collection[str],
    head: tuple[str, int],
) -> Image.Image:
    title, columns = head
    cell = (_WIDTH - _MARGIN) // columns
    height = cell * 4 // 5 + _CAPTION
    rows = -(-len(slides) // columns)
    image = Image.new("RGB", (_WIDTH, _HEAD + rows * (height + _MARGIN)), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, 16), title, _INK, _font(26))
    draw.text((_MARGIN, 48), "green: outline of the tissue from which patches were taken", _QUIET, _font(15))
    for number, slide in enumerate(slides):
        left = _MARGIN + number % columns * cell
        top = _HEAD + number // columns * (height + _MARGIN)
        frame = (left, top, left + cell - _MARGIN, top + height - _CAPTION)
        picture = _picture(out, slide, (frame[2] - left - 2, frame[3] - top - 2))
        draw.rectangle(frame, fill=_PAPER if picture else _EMPTY, outline=_FRAME)
        if picture:
            place = (left + frame[2] - picture.width) // 2, (top + frame[3] - picture.height) // 2
            image.paste(picture, place)
        alarm, text = _caption(facts[slide], slide in written)
        draw.text((left, frame[3] + 6), _fitted(draw, slide, frame[2] - left, _font(18)), _INK, _font(18))
        line = _fitted(draw, text, frame[2] - left, _font(15))
        draw.text((left, frame[3] + 29), line, _ALARM if alarm else _QUIET, _font(15))
    return image


def _picture(out: Place, slide: str, room: tuple[int, int]) -> Image.Image | None:
    """Thumbnail of a slide, as large as there is room; None where there is none."""
    try:
        picture = Image.open(io.BytesIO(read_bytes(mask_files(out, slide)[1]))).convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None
    scale = min(room[0] / picture.width, room[1] / picture.height)
    size = tuple(max(1, int(edge * scale)) for edge in picture.size)
    return picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _caption(facts: MaskFacts | None, is_written: bool) -> tuple[bool, str]:
    """Whether a slide needs a look, and the line below its id."""
    if facts is None:
        return True, "no mask kept"
    size = f"{facts.width * facts.mpp / 1000:.1f} x {facts.height * facts.mpp / 1000:.1f} mm"
    found = "" if facts.found_by == "embedded" else f", {facts.found_by}"
    text = f"{_percent(facts.share)} tissue, {size}{found}"
    return (False, text) if is_written else (True, f"not in the records: {text}")


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Text with its middle left out where it is wider than its column: ids differ at both ends."""
    if draw.textlength(text, font) <= width:
        return text
    for kept in range(len(text) - 1, 2, -1):
        short = f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"
        if draw.textlength(short, font) <= width:
            return short
    return text[:1]


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)

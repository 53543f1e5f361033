"""Static viewer page: a folder of precomputed tiles, scores and areas, opened by double-clicking index.html.

A page opened from file:// may load only scripts and images, so the responses that a server would send as JSON are
stored as scripts that pass them to the page: `slides.js`, and `slides/N/slide.js` for each slide.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from pathflip_jax.data.storage.failures import Failure, list_failures
from pathflip_jax.grounding.maps import Grounding
from pathflip_jax.viewer.layers import STEPS, areas, layer_facts, make_layer
from pathflip_jax.viewer.page_files import page_files
from pathflip_jax.viewer.pictures import QUALITY, READERS, Pictures
from pathflip_jax.viewer.session import image_facts, patches_facts

MOST_PIXELS = 8192  # maximum longer side of the finest level
MARKER = "slides.js"  # present in a folder that this command wrote and may overwrite
TILES_AT_ONCE = 64


class PageSlide(NamedTuple):
    """Slide of the page: its file (None: drawn from coordinates alone), the grounding of the texts on it, and its
    similarity to each text where that is known."""

    slide_id: str
    image: Path | None
    ground: Callable[[], Grounding]
    similarities: Sequence[float] | None = None


@dataclass(frozen=True)
class Report:
    """Result of writing a page: slides `done`, slides that `failed`, and the tiles and bytes in the folder."""

    out: Path
    done: list[str]
    failed: list[Failure]
    tiles: int
    bytes: int
    skipped: tuple[str, ...] = ()

    def summary(self) -> str:
        """Final message, with failures by name."""
        size = f"{len(self.done)} slides, {self.tiles:,} tiles, {self.bytes / 1e6:.1f} MB"
        lines = [f"{self.out / 'index.html'}: {size}"]
        if self.failed:
            lines += ["left out:", *list_failures(self.failed)]
        return "\n".join(lines)


def write_page(
    out: Path,
    slides: Sequence[PageSlide],
    model: dict[str, Any],
    *,
    most_pixels: int = MOST_PIXELS,
    quality: int = QUALITY,
) -> Report:
    """Write the page of the given slides with the texts of their groundings; `model` is the result of `model_facts`.

    Tiles end at the level whose longer side has at most `most_pixels` pixels. The folder is written atomically and
    replaces an earlier page. A slide that cannot be read or grounded is reported and left out. Raises ValueError for a
    folder that is not a page, and where no slide is left.
    """
    check_out(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    pictures, shown, failed, tiles = Pictures(), [], [], 0
    texts: dict[str, None] = {}
    try:
        partial.mkdir(parents=True)
        for slide in tqdm(slides, unit="slide", desc="writing slides"):
            folder = partial / "slides" / str(len(shown))
            try:
                facts, count = _write_slide(folder, slide, len(shown), pictures, most_pixels, quality)
            except (ValueError, OSError, MemoryError) as error:
                shutil.rmtree(folder, ignore_errors=True)
                failed.append(Failure(slide.slide_id, str(slide.image or ""), str(error)))
                continue
            shown.append(facts)
            tiles += count
            texts |= dict.fromkeys(facts.pop("texts"))
        if not shown:
            raise ValueError(f"{out}: no slide could be shown:\n" + "\n".join(list_failures(failed)))
        page = {"live": False, **model, "texts": list(texts), "slides": shown}
        _write_script(partial / MARKER, f"globalThis.PATHFLIP = {json.dumps(page)};\n")
        (partial / "page").mkdir()
        for name, data in page_files().items():
            (partial / "index.html" if name == "index.html" else partial / "page" / name).write_bytes(data)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        _replace(partial, out)
    finally:
        pictures.close()
        shutil.rmtree(partial, ignore_errors=True)
    return Report(out, [slide["id"] for slide in shown], failed, tiles, size)


def check_out(out: Path) -> None:
    """Raise ValueError for an existing path that is not a page."""
    if out.exists() and not (out.is_dir() and ((out / MARKER).is_file() or not any(out.iterdir()))):
        raise ValueError(
            f"{out}: already exists and was not written by this command; choose another --out, or remove it"
        )


def _replace(partial: Path, out: Path) -> None:
    """Replace the previous folder by the finished one."""
    before = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        os.replace(out, before)
    os.replace(partial, out)
    shutil.rmtree(before, ignore_errors=True)


def _write_slide(
    folder: Path, slide: PageSlide, number: int, pictures: Pictures, most_pixels: int, quality: int
) -> tuple[dict[str, Any], int]:
    """Write the page's files for one slide; returns its entry in the table of slides and its number of tiles."""
    pyramid = None if slide.image is None else pictures.pyramid(slide.image)
    grounding = slide.ground()
    if pyramid is not None:
        grounding = grounding._replace(mpp=grounding.mpp or pyramid.mpp)
    facts = patches_facts(grounding, pyramid)
    image, count = None, 0
    folder.mkdir(parents=True)
    if pyramid is None:
        facts["warnings"].insert(0, "no slide file: maps are drawn on a blank slide at the coordinates of its patches")
    else:
        last = next(i for i in range(pyramid.levels - 1, -1, -1) if i == 0 or max(pyramid.size(i)) <= most_pixels)
        image = image_facts(pyramid, last)
        (folder / "thumbnail.jpg").write_bytes(pictures.thumbnail(slide.image))
        count = _write_tiles(folder / "tiles", slide, pictures, range(image["first"], last + 1), quality)
    layers = []
    for i in range(len(grounding.texts)):
        layer = make_layer(grounding, i)
        cut = {str(percent): areas(layer, percent) for percent in STEPS}
        layers.append(layer_facts(layer) | {"areas": cut})
    content = {"image": image, **facts, "layers": layers}
    _write_script(folder / "slide.js", f"globalThis.PATHFLIP.loaded({number}, {json.dumps(content)});\n")
    similarities = None if slide.similarities is None else [round(float(value), 4) for value in slide.similarities]
    row = {"id": slide.slide_id, "image": image is not None, "features": True, "similarities": similarities}
    return row | {"texts": grounding.texts}, count


def _write_tiles(folder: Path, slide: PageSlide, pictures: Pictures, levels: range, quality: int) -> int:
    pyramid = pictures.pyramid(slide.image)
    places = [(level, column, row) for level in levels for column, row in product(*map(range, pyramid.tiles(level)))]
    for level in levels:
        (folder / str(level)).mkdir(parents=True)

    def write(place: tuple[int, int, int]) -> None:
        level, column, row = place
        data = pictures.tile(slide.image, level, column, row, quality)
        (folder / str(level) / f"{column}_{row}.jpg").write_bytes(data)

    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=len(places), unit="tile", desc=slide.slide_id, leave=False) as bar,
    ):
        for first in range(0, len(places), TILES_AT_ONCE):  # so that the first error stops the slide early
            part = places[first : first + TILES_AT_ONCE]
            bar.update(len(list(pool.map(write, part))))
    return len(places)


def _write_script(path: Path, script: str) -> None:
    path.write_text(script, encoding="utf-8")

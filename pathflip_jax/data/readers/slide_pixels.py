"""Thumbnails, tiles, patches and mean colours of slide files; runs only in the worker of `guarded.py`.

The files are those that `pathflip prepare` reads, by the same readers (`pixels.sources`). OpenSlide and its
dependencies (libtiff, libjpeg, OpenJPEG) parse any file that claims to be a slide, and some files crash or hang the
process. `data_prep` opens slides in separate worker processes. Labels and macro images, which can name the patient, are
never read here.
"""

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import openslide
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from pathflip_jax.data.pixels.ome import read_ome
from pathflip_jax.data.pixels.source import DamagedPixels, PixelSource, Unreadable
from pathflip_jax.data.pixels.sources import open_source
from pathflip_jax.data.readers.guarded import Parsed, Refused

WHOLE_LEVEL = 2**26  # pixels of a level read in one call, or in one strip, for a thumbnail or a tile
TILE, OVERLAP = 254, 1  # Deep Zoom: with overlap on both sides a tile has 256 pixels
OPEN_SLIDES = 4  # kept open by a worker for tiles; each may hold 32 MB of decoded pixels


def detect(path: str) -> Parsed:
    """Slide format as the fact `format`: that which OpenSlide detects, else the reader that opens it; None if none."""
    found = openslide.OpenSlide.detect_format(path)
    if found is None:
        with contextlib.suppress(Unreadable), contextlib.closing(open_source(Path(path))) as slide:
            found = slide.reader
    return {"format": found}, {}


def measures(path: str) -> Parsed:
    """Size, resolution and bounds of a slide: the facts `width` and `height` at level 0, `mpp` and `bounds`.

    `mpp` is 0 if the file does not give it. `bounds` is the top-left corner (x, y) of the non-empty area, 0, 0 for most
    formats; viewers that crop a slide to its bounds use it as the origin.
    """
    with _opened(path) as slide:

        def number(name: str) -> float:
            try:
                return float(slide.properties.get(name, 0))
            except ValueError:
                return 0.0

        ome = read_ome(slide.properties.get("tiff.ImageDescription", ""), *slide.dimensions)
        mpp = (ome.across if ome else 0.0) or number(openslide.PROPERTY_NAME_MPP_X)
        bounds = [int(number(name)) for name in (openslide.PROPERTY_NAME_BOUNDS_X, openslide.PROPERTY_NAME_BOUNDS_Y)]
        width, height = slide.dimensions
        return {"width": width, "height": height, "mpp": mpp if 0 < mpp < 1e4 else 0.0, "bounds": bounds}, {}


def thumbnail(path: str, pixels: int) -> Parsed:
    """Thumbnail as `picture` [h, w, 3], at most `pixels` on its longer side; the fact `width` is that at level 0."""
    with _opened(path) as slide:
        level = slide.get_best_level_for_downsample(max(slide.dimensions) / pixels)
        if np.prod(slide.level_dimensions[level], dtype=float) <= WHOLE_LEVEL:
            picture = slide.get_thumbnail((pixels, pixels)).convert("RGB")
        else:
            picture = _reduced(slide, level, pixels)
        return {"width": slide.dimensions[0]}, {"picture": np.asarray(picture)}


def _reduced(slide: PixelSource, level: int, pixels: int) -> Image.Image:
    """Downsampled image of a level too large for one read: averaged strip by strip, then resized."""
    width, height = slide.level_dimensions[level]
    step, scale = max(1, max(width, height) // pixels), slide.level_downsamples[level]
    tall = max(1, WHOLE_LEVEL // width // step) * step
    small = Image.new("RGB", (-(-width // step), -(-height // step)))
    ground = f"#{slide.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, 'ffffff')}"
    for top in range(0, height, tall):
        strip = slide.read_region((0, round(top * scale)), level, (width, min(tall, height - top)))
        flat = Image.new("RGB", strip.size, ground)
        flat.paste(strip, None, strip)
        small.paste(flat.reduce(step), (0, top // step))
    small.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    return small


def colours(path: str, coords: list[list[int]], patch_size: int, whole: int) -> Parsed:
    """Lowest-resolution level with at least 8 pixels per patch, for patches' mean colours, and the fact `scale`.

    `picture` [h, w, 4] is the whole level; instead, `colours` [N, 3] holds the means if it exceeds `whole` pixels.
    """
    with _opened(path) as slide:
        level = slide.get_best_level_for_downsample(max(patch_size / 8, 1))
        size = slide.level_dimensions[level]
        scale = slide.dimensions[0] / size[0]
        if size[0] * size[1] <= whole:
            return {"scale": scale}, {"picture": np.asarray(slide.read_region((0, 0), level, size))}
        edge = max(round(patch_size / scale), 1)
        patches = (slide.read_region((int(x), int(y)), level, (edge, edge)) for x, y in coords)
        return {"scale": scale}, {"colours": np.array([_mean_on_white(patch) for patch in patches]).reshape(-1, 3)}


def patches(path: str, coords: list[list[int]], patch_size: int, pixels: int) -> Parsed:
    """Patches [n, pixels, pixels, 3] of `patch_size` level-0 pixels at `coords`, on the slide's background colour.

    Read at the lowest-resolution level with at least `pixels` pixels per patch, then resized. Areas beyond the slide
    are background.
    """
    with _opened(path) as slide:
        level = slide.get_best_level_for_downsample(max(patch_size / pixels, 1))
        edge = max(round(patch_size / slide.level_downsamples[level]), 1)
        ground = f"#{slide.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, 'ffffff')}"
        found = np.empty((len(coords), pixels, pixels, 3), np.uint8)
        for number, (x, y) in enumerate(coords):
            patch = slide.read_region((int(x), int(y)), level, (edge, edge))
            flat = Image.new("RGB", patch.size, ground)
            flat.paste(patch, None, patch)
            found[number] = np.asarray(flat.resize((pixels, pixels), Image.Resampling.LANCZOS))
        return {}, {"patches": found}


def mask(path: str, most: int) -> Parsed:
    """Binary `mask` [h, w] of the pixels above half of the maximum, at a level of at most `most` pixels.

    These are the 1 of a mask with values 0 and 1, the 2 of one with 0, 1 (tissue) and 2, the 255 of one with 0 and 255.
    The fact `downsample` is that of the level.
    """
    with _opened(path) as slide:
        sizes = [width * height for width, height in slide.level_dimensions]
        level = next((number for number, size in enumerate(sizes) if size <= most), len(sizes) - 1)
        if sizes[level] > WHOLE_LEVEL:
            raise ValueError(f"its smallest level has {sizes[level]:,} pixels; expected a pyramid, as usual for masks")
        picture = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
        values = np.where(picture[..., 3] > 0, picture[..., 0], 0)
        return {"downsample": slide.level_downsamples[level]}, {"mask": values > values.max() / 2}


def _mean_on_white(patch: Image.Image) -> np.ndarray:
    pixels = np.asarray(patch, np.float64)
    return (255 + (pixels[..., :3] - 255) * pixels[..., 3:] / 255).mean((0, 1))


def pyramid(path: str) -> Parsed:
    """Size of a slide, and its Deep Zoom pyramid.

    Level k of its `levels` has half the pixels of level k + 1 per side; the last one is level 0 of the slide. Tiles
    have `tile` pixels per side, plus `overlap` at each neighbour.
    """
    facts, _ = measures(path)
    with _opened(path) as slide:
        levels = DeepZoomGenerator(slide, TILE, OVERLAP).level_count
    return facts | {"levels": levels, "tile": TILE, "overlap": OVERLAP}, {}


def tile(path: str, level: int, column: int, row: int, quality: int) -> Parsed:
    """Deep Zoom tile as `jpeg` [bytes]. The slide stays open for the next tile until its file changes.

    Raises Refused for a tile outside of the slide.
    """
    state = os.stat(path)
    try:
        tiles = _tiles(path, state.st_mtime_ns, state.st_size)
        if not 0 <= level < tiles.level_count:
            raise Refused(f"no level {level}: the slide has {tiles.level_count} levels")
        across, down = tiles.level_tiles[level]
        if not (0 <= column < across and 0 <= row < down):
            raise Refused(f"no tile {column}, {row}: level {level} has {across} x {down} tiles")
        _, _, (width, height) = tiles.get_tile_coordinates(level, (column, row))
        if width * height > WHOLE_LEVEL:
            raise Refused(
                "it has no low-resolution level from which to show the whole slide; convert it, for example "
                f"`vips tiffsave {os.path.basename(path)} OUT.tiff --tile --pyramid --compression jpeg`"
            )
        picture = tiles.get_tile(level, (column, row))
    except Unreadable as error:
        raise ValueError(str(error)) from None
    except (openslide.OpenSlideError, DamagedPixels) as error:
        close_tiles()  # OpenSlide handles are unusable after an error
        raise ValueError(f"its pixels cannot be read ({error}); the file is damaged: copy it again") from None
    with io.BytesIO() as out:
        picture.save(out, "JPEG", quality=quality)
        return {}, {"jpeg": np.frombuffer(out.getvalue(), np.uint8)}


_open: dict[tuple[str, int, int], tuple[PixelSource, DeepZoomGenerator]] = {}  # the last used one last


def _tiles(*file: str | int) -> DeepZoomGenerator:
    """Deep Zoom tiles of a slide, which is kept open, by its file's path, modification time and size."""
    found = _open.pop(file, None)
    if found is None:
        source = open_source(Path(file[0]))
        found = source, DeepZoomGenerator(source, TILE, OVERLAP)
    _open[file] = found
    close_tiles(OPEN_SLIDES)
    return found[1]


def close_tiles(but: int = 0) -> None:
    """Close the slides that are open for tiles, but for the last ones used."""
    while len(_open) > but:
        _open.pop(next(iter(_open)))[0].close()


class _opened:
    """Context manager for an open slide, which converts the readers' errors to ValueError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> PixelSource:
        try:
            self.slide = open_source(Path(self.path))
        except Unreadable as error:
            raise ValueError(f"{error}; leave the picture out, or repair the file") from None
        return self.slide

    def __exit__(self, kind, error, trace) -> None:
        self.slide.close()
        if isinstance(error, openslide.OpenSlideError | DamagedPixels):
            raise ValueError(f"it cannot be read ({error}); leave the picture out, or repair the file") from None

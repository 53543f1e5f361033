"""Thumbnails, tiles, patches and mean colours of slide files; runs in the worker of `guarded.py` only.

OpenSlide and what it stands on (libtiff, libjpeg, OpenJPEG) parse whatever claims to be a slide, and some of it ends or
stalls the process. `data_prep` opens slides in worker processes of its own. Labels and macro images, which can name the
patient, are read by nothing here.
"""

import functools
import io
import os

import numpy as np
import openslide
from openslide.deepzoom import DeepZoomGenerator
from PIL import Image

from pathflip_jax.data.readers.guarded import Parsed, Refused
from pathflip_jax.data.readers.ome import read_ome

WHOLE_LEVEL = 2**26  # pixels of a level that is read in one go for a thumbnail or a tile, or in one strip
TILE, OVERLAP = 254, 1  # of Deep Zoom: with its overlap on both sides a tile has 256 pixels
OPEN_SLIDES = 4  # that a worker keeps open for tiles; each may hold 32 MB of decoded pixels


def detect(path: str) -> Parsed:
    """The format that OpenSlide takes a file for: the fact `format`, None for none."""
    return {"format": openslide.OpenSlide.detect_format(path)}, {}


def measures(path: str) -> Parsed:
    """The facts `width`, `height` at level 0, `mpp` (0 where the file does not say) and `bounds` (x, y of what is not
    empty; 0, 0 for most formats): viewers that crop a slide to its bounds count from there."""
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
    """`picture` [h, w, 3] of at most `pixels` on its longer side; the fact `width` is the slide's at level 0."""
    with _opened(path) as slide:
        level = slide.get_best_level_for_downsample(max(slide.dimensions) / pixels)
        if np.prod(slide.level_dimensions[level], dtype=float) <= WHOLE_LEVEL:
            picture = slide.get_thumbnail((pixels, pixels)).convert("RGB")
        else:
            picture = _reduced(slide, level, pixels)
        return {"width": slide.dimensions[0]}, {"picture": np.asarray(picture)}


def _reduced(slide: openslide.OpenSlide, level: int, pixels: int) -> Image.Image:
    """A level that is too large for one piece: averaged strip by strip, then made as small as wanted."""
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
    """The lowest level at which a patch still has 8 pixels, for the mean colours of patches; the fact `scale`.

    `picture` [h, w, 4] is all of it; `colours` [N, 3] the means instead, where it has more than `whole` pixels.
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
    """`patches` [n, pixels, pixels, 3]: squares of `patch_size` level-0 pixels at `coords`, on the slide's background.

    Read at the lowest level that still has `pixels` pixels of a patch, then resized. What lies beyond the slide is
    background.
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
    """`mask` [h, w], where a level of at most `most` pixels has more than half of its highest value: 1 of 0 and 1, 2 of
    0, 1 (tissue) and 2, 255 of 0 and 255. The fact `downsample` is that level's."""
    with _opened(path) as slide:
        sizes = [width * height for width, height in slide.level_dimensions]
        level = next((number for number, size in enumerate(sizes) if size <= most), len(sizes) - 1)
        if sizes[level] > WHOLE_LEVEL:
            raise ValueError(f"its smallest level has {sizes[level]:,} pixels; expected a pyramid, as masks come")
        picture = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
        values = np.where(picture[..., 3] > 0, picture[..., 0], 0)
        return {"downsample": slide.level_downsamples[level]}, {"mask": values > values.max() / 2}


def _mean_on_white(patch: Image.Image) -> np.ndarray:
    pixels = np.asarray(patch, np.float64)
    return (255 + (pixels[..., :3] - 255) * pixels[..., 3:] / 255).mean((0, 1))


def pyramid(path: str) -> Parsed:
    """The measures of a slide, and how Deep Zoom cuts it.

    Level k of its `levels` has half the pixels of level k + 1 a side; the last one is level 0 of the slide. Tiles have
    `tile` pixels a side, and `overlap` more where they have a neighbour.
    """
    facts, _ = measures(path)
    with _opened(path) as slide:
        levels = DeepZoomGenerator(slide, TILE, OVERLAP).level_count
    return facts | {"levels": levels, "tile": TILE, "overlap": OVERLAP}, {}


def tile(path: str, level: int, column: int, row: int, quality: int) -> Parsed:
    """One Deep Zoom tile as `jpeg` [bytes]. The slide stays open for the next one until its file changes.

    Raises Refused for a tile that the slide does not have.
    """
    state = os.stat(path)
    try:
        tiles = _tiles(path, state.st_mtime_ns, state.st_size)
        if not 0 <= level < tiles.level_count:
            raise Refused(f"no level {level} among its {tiles.level_count}")
        across, down = tiles.level_tiles[level]
        if not (0 <= column < across and 0 <= row < down):
            raise Refused(f"no tile {column}, {row} among the {across} x {down} of level {level}")
        _, _, (width, height) = tiles.get_tile_coordinates(level, (column, row))
        if width * height > WHOLE_LEVEL:
            raise Refused(
                "it has no low level to show its whole from; convert it, for example "
                f"`vips tiffsave {os.path.basename(path)} OUT.tiff --tile --pyramid --compression jpeg`"
            )
        picture = tiles.get_tile(level, (column, row))
    except openslide.OpenSlideError as error:
        _tiles.cache_clear()  # a slide that failed once answers nothing any more
        raise ValueError(f"OpenSlide cannot read it ({error}); the file is damaged: copy it again") from None
    with io.BytesIO() as out:
        picture.save(out, "JPEG", quality=quality)
        return {}, {"jpeg": np.frombuffer(out.getvalue(), np.uint8)}


@functools.lru_cache(OPEN_SLIDES)
def _tiles(path: str, changed: int, size: int) -> DeepZoomGenerator:
    """The tiles of a slide as it was when its file had this time of change and size."""
    return DeepZoomGenerator(openslide.OpenSlide(path), TILE, OVERLAP)


class _opened:
    """An open slide; what OpenSlide raises becomes ValueError."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> openslide.OpenSlide:
        try:
            self.slide = openslide.OpenSlide(self.path)
        except openslide.OpenSlideError as error:
            raise ValueError(f"OpenSlide cannot open it ({error}); leave the picture out, or repair it") from None
        return self.slide

    def __exit__(self, kind, error, trace) -> None:
        self.slide.close()
        if isinstance(error, openslide.OpenSlideError):
            raise ValueError(f"OpenSlide cannot read it ({error}); leave the picture out, or repair it") from None

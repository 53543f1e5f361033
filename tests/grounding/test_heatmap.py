"""Heatmaps: every patch lands on its own pixels, whatever the scale of the picture under it."""

import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize

from pathflip_jax.data.readers.outlines import Polygon
from pathflip_jax.grounding import heatmap
from pathflip_jax.grounding.canvas import Canvas, blank_canvas, read_thumbnail
from pathflip_jax.grounding.heatmap import Panel
from pathflip_jax.grounding.pictures import write_picture


def slow_paint(scores, coords, patch_size, canvas):
    rows, columns = canvas.picture.shape[:2]
    total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
    for score, (x, y) in zip(scores, coords, strict=True):
        x0, x1 = (round((x + d - canvas.origin[0]) / canvas.downsample) for d in (0, patch_size))
        y0, y1 = (round((y + d - canvas.origin[1]) / canvas.downsample) for d in (0, patch_size))
        x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
        total[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] += score
        count[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] += 1
    with np.errstate(invalid="ignore"):
        return total / count


@pytest.mark.parametrize("downsample", [1.0, 3.0, 7.3, 40.0])
@pytest.mark.parametrize("origin", [(0.0, 0.0), (130.0, -50.0)])
def test_paint_equals_a_loop_over_patches(downsample, origin):
    rng = np.random.default_rng(0)
    coords = rng.integers(-20, 400, (60, 2))  # overlapping, and some beyond the canvas
    scores = rng.normal(size=60) + 1000
    canvas = Canvas(np.zeros((int(350 / downsample), int(420 / downsample), 3), np.uint8), origin, downsample)
    found = heatmap.paint(scores, coords, 33, canvas)
    expected = slow_paint(scores, coords, 33, canvas)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert found[np.isfinite(found)] == pytest.approx(expected[np.isfinite(expected)], abs=1e-8)


@pytest.fixture
def slide_file(tmp_path):
    """A tiled pyramid, white but for one black patch of 64 pixels at (448, 192)."""
    level0 = np.full((640, 960, 3), 255, np.uint8)
    level0[192:256, 448:512] = 0
    path = tmp_path / "slide.tiff"
    with tifffile.TiffWriter(path) as writer:
        writer.write(level0, tile=(128, 128), photometric="rgb", subifds=0)
        writer.write(level0[::2, ::2], tile=(128, 128), photometric="rgb", subfiletype=1)
    return path


@pytest.mark.parametrize("pixels", [960, 480, 333, 120])
def test_the_hot_patch_covers_its_tissue(slide_file, pixels):
    """Pixels of the hot patch are the black pixels of the thumbnail, at every thumbnail size."""
    canvas = read_thumbnail(slide_file, pixels)
    assert max(canvas.picture.shape) == pixels
    x, y = np.meshgrid(np.arange(0, 960, 64), np.arange(0, 640, 64))
    coords = np.stack([x.ravel(), y.ravel()], 1)
    scores = np.all(coords == [448, 192], axis=1).astype(float)
    hot = heatmap.paint(scores, coords, 64, canvas) > 0.5
    dark = canvas.picture.mean(2) < 128
    assert hot.any()
    assert (hot != dark).sum() <= 2 * (64 * pixels / 960 + 1)  # at most the resampled rim on one side


def test_the_drawn_picture_glows_where_the_tissue_is(slide_file, tmp_path):
    """The same, through the whole figure: the panel's brightest spot lies where the slide's panel is darkest."""
    coords = np.stack(np.meshgrid(np.arange(0, 960, 64), np.arange(0, 640, 64)), -1).reshape(-1, 2)
    scores = np.all(coords == [448, 192], axis=1).astype(float)[None]
    scores[0, 0] = scores[0].max()  # a second hot patch, so that the 99th percentile is hot
    grounding = SimpleNamespace(
        texts=("a black square",), patch_scores=scores, coords=coords, patch_size=64, mpp=0.5,
        width=960, height=640, slide_id="S1",
    )  # fmt: skip
    outline = {"a black square": [Polygon(np.array([[448, 192], [512, 192], [512, 256], [448, 256]], float))]}
    write_picture(
        tmp_path / "with.png", heatmap.draw_grounding(grounding, read_thumbnail(slide_file), outline), dpi=150
    )
    again = heatmap.draw_grounding(grounding, image=slide_file, outlines=outline)
    write_picture(tmp_path / "of_file.png", again, dpi=150)
    assert (tmp_path / "of_file.png").read_bytes() == (tmp_path / "with.png").read_bytes()
    write_picture(tmp_path / "without.png", heatmap.draw_grounding(grounding), dpi=150)
    assert (tmp_path / "with.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    widths = [struct.unpack(">I", (tmp_path / n).read_bytes()[16:20])[0] for n in ("with.png", "without.png")]
    assert widths[0] == 2 * widths[1]  # the slide beside the map

    canvas = read_thumbnail(slide_file)
    figure = heatmap.draw_panels(canvas, [Panel("t", scores[0])], coords, 64, mpp=0.5, heading="S1")
    slide_axis, heat_axis = figure.axes[:2]
    painted = heat_axis.images[0].get_array()
    assert slide_axis.images[0].get_extent() == heat_axis.images[0].get_extent()
    dark = np.asarray(slide_axis.images[0].get_array()).mean(2) < 128
    assert painted[dark][:, 0].mean() > painted[~dark][:, 0].mean() - 1  # both hot: red is high
    assert painted[dark][:, :2].min() > 0.4 and painted[300, 300, 1] < 0.5  # yellow on the tissue, cold elsewhere


def test_outlines_are_drawn_in_thumbnail_pixels():
    canvas = Canvas(np.zeros((100, 200, 3), np.uint8), (50.0, 10.0), 4.0)
    polygon = Polygon(np.array([[50, 10], [450, 10], [450, 210]], float))
    coords = np.array([[50, 10], [114, 10]])
    panel = Panel("t", np.array([0.0, 1.0]), [polygon])
    figure = heatmap.draw_panels(canvas, [panel], coords, 64, reference=None)
    line = figure.axes[0].lines[0]
    assert line.get_xdata() == pytest.approx(np.array([0, 100, 100]) - 0.5)
    assert line.get_ydata() == pytest.approx(np.array([0, 0, 50]) - 0.5)


def test_blend_leaves_bare_glass_grey():
    picture = np.full((2, 2, 3), 200, np.uint8)
    heat = np.array([[np.nan, 0.0], [1.0, np.nan]])
    found = heatmap.blend(picture, heat, Normalize(0, 1))
    assert found[0, 0] == pytest.approx(np.full(3, 200 / 255), abs=1e-6)
    assert found[1, 0, 0] > found[0, 1, 0]


def test_a_canvas_without_a_slide_holds_every_patch():
    coords = np.array([[1000, 5000], [9000, 5256]])
    canvas = blank_canvas(coords, 256)
    heat = heatmap.paint(np.array([1.0, 2.0]), coords, 256, canvas)
    assert sorted(np.unique(heat[np.isfinite(heat)])) == [1.0, 2.0]
    whole = blank_canvas(coords, 256, width=20_000, height=10_000)
    assert whole.origin == (0.0, 0.0) and whole.picture.shape[:2] == (512, 1024)


@pytest.mark.parametrize(
    ("mpp", "downsample", "columns", "label"),
    [(0.5, 32.0, 1000, "2 mm"), (0.5, 2.0, 800, "200 µm"), (0.0, 10.0, 1000, "2000 px"), (0.25, 1.0, 17, "1 µm")],
)
def test_scale_bar_is_as_long_as_it_says(mpp, downsample, columns, label):
    length, found = heatmap.scale_bar(mpp, downsample, columns)
    assert found == label
    number, unit = label.split()
    micrometres = float(number) * {"mm": 1000, "µm": 1, "px": 1}[unit]
    assert length * downsample * (mpp or 1) == pytest.approx(micrometres)
    assert length <= columns / 4


def test_a_constant_map_draws(tmp_path):
    coords = np.array([[0, 0], [10, 0]])
    canvas = blank_canvas(coords, 10)
    heatmap.draw_panels(canvas, [Panel("same", np.zeros(2))], coords, 10).savefig(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no patches"):
        heatmap.draw_panels(canvas, [Panel("none", np.zeros(0))], coords[:0], 10)


def test_unreadable_slides_are_named(tmp_path):
    (tmp_path / "broken.tiff").write_bytes(b"II*\0 not a slide")
    with pytest.raises(ValueError, match=r"broken\.tiff"):
        read_thumbnail(tmp_path / "broken.tiff")
    with pytest.raises(FileNotFoundError, match=r"gone\.svs"):
        read_thumbnail(tmp_path / "gone.svs")


def test_a_real_slide():
    slide = Path(os.environ.get("PATHFLIP_TEST_DATA", "../shared/data")) / "slides/cmu-1-small-region.svs"
    if not slide.exists():
        pytest.skip(f"{slide} is not here; set PATHFLIP_TEST_DATA")
    canvas = read_thumbnail(slide, 512)
    assert canvas.picture.shape == (512, 383, 3)
    assert canvas.downsample == pytest.approx(2967 / 512, rel=0.01)


def test_titles_of_any_length_are_drawn_whole_and_over_their_own_panel():
    rng = np.random.default_rng(0)
    coords = np.stack(np.meshgrid(np.arange(8), np.arange(6)), -1).reshape(-1, 2) * 40
    canvas = Canvas(np.full((240, 320, 3), 240, np.uint8), (0.0, 0.0), 1.0)
    long = "infiltrating irregular glands of an adenocarcinoma in desmoplastic stroma with angulated tumor glands"
    panels = [Panel(title, rng.normal(size=len(coords)), (), "a note") for title in ("fat", long, "x" * 64, long, long)]
    figure = heatmap.draw_panels(canvas, panels, coords, 40, heading="S1")
    FigureCanvasAgg(figure).draw()
    titles = [axis._left_title for axis in figure.axes if axis._left_title.get_text()]
    assert [title.get_text().replace("\n", " ") for title in titles] == [
        "S1",
        "fat",
        long,
        "x" * 30 + " " + "x" * 30 + " xxxx",
        long,
        long,
    ]
    for title in titles:
        box = title.get_window_extent()
        assert (
            figure.bbox.x0 <= box.x0
            and box.x1 <= figure.bbox.x1
            and figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
        )
        for axis in figure.axes:
            assert axis is title.axes or not axis.get_window_extent().overlaps(box), title.get_text()


def test_notes_of_any_length_stay_below_their_own_panel_and_above_its_colour_bar():
    rng = np.random.default_rng(0)
    coords = np.stack(np.meshgrid(np.arange(8), np.arange(6)), -1).reshape(-1, 2) * 40
    canvas = Canvas(np.full((240, 320, 3), 240, np.uint8), (0.0, 0.0), 1.0)
    notes = ["normal: ROC AUC 0.97", "high-grade intraepithelial neoplasia: ROC AUC 1.00", "polyp: ROC AUC 0.50"]
    figure = heatmap.draw_panels(canvas, [Panel("a", rng.normal(size=len(coords)), (), n) for n in notes], coords, 40)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for axis in figure.axes for text in axis.texts if "AUC" in text.get_text()]
    assert len(boxes) == 3 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    bars = [bar.get_tightbbox() for axis in figure.axes for bar in axis.child_axes]
    assert len(bars) == 3 and not any(box.overlaps(bar) for box in boxes for bar in bars)
    assert all(bar.y0 >= figure.bbox.y0 for bar in bars)

"""`pathflip ground`: grounding of texts on a slide."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from pathflip_jax.commands.options import (
    RUN_HELP,
    add_grounding_options,
    add_shared_options,
    command,
    local_path,
    number,
    place,
)
from pathflip_jax.commands.slide_sources import add_fact_options, add_source_options, print_failures, slide_reader
from pathflip_jax.data.storage.failures import Failure
from pathflip_jax.runtime.collection import paused_collection

if TYPE_CHECKING:
    from pathflip_jax.grounding.writer import GroundingWriter


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "ground",
        _run,
        'pathflip ground slides/S1.svs "tumor necrosis" --checkpoint runs/base --out maps',
        'pathflip ground slides "tumor necrosis" --checkpoint runs/base --without artefacts --out maps',
        'pathflip ground features/S1.h5 "tumor necrosis" --checkpoint runs/base --image slides/S1.svs --out maps',
        'pathflip ground records --slide-id S1 "invasive carcinoma" "lymphocytes" --negative "normal stroma" '
        "--checkpoint runs/base --threshold 0.05 --out maps",
    )
    add_source_options(parser)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="one or several texts")
    parser.add_argument("--checkpoint", type=place, required=True, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--image",
        type=local_path,
        metavar="FILE",
        help="slide file, drawn under the heatmap; pictures of the best patches are cut out of it (default: the slide "
        "itself, where SLIDE is one)",
    )
    parser.add_argument(
        "--within",
        type=local_path,
        metavar="GEOJSON",
        help="ground only patches inside these outlines, exported from QuPath; a file, or a folder of <slide "
        "id>.geojson",
    )
    parser.add_argument(
        "--without", type=local_path, metavar="GEOJSON", help="leave out the patches inside these outlines"
    )
    parser.add_argument(
        "--negative",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to contrast with (may be repeated): the highest score of these is subtracted, so that a patch "
        "scores above 0 if it matches the text better than any of them",
    )
    add_grounding_options(parser)
    add_shared_options(parser, "smooth")
    _add_output_options(parser)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for areas, pictures and files, and for facts that the feature file lacks."""
    parser.add_argument(
        "--threshold",
        type=number("threshold"),
        metavar="SCORE",
        help="areas are where the smoothed score exceeds SCORE (default: 0 with --negative, else halfway from a map's "
        "median to its maximum, which finds areas on any slide)",
    )
    parser.add_argument(
        "--min-patches",
        type=number("min-patches"),
        default=2.0,
        metavar="N",
        help="drop areas of fewer than N patches (default 2)",
    )
    parser.add_argument(
        "--top",
        type=number("top"),
        metavar="N",
        help="pictures of the N best patches of each text (default 8 where there is a slide file)",
    )
    add_fact_options(parser)
    parser.add_argument(
        "--page",
        action="store_true",
        help="also write DIR/page, a deep-zoom view of the slide and its maps for the browser",
    )
    parser.add_argument(
        "--spatialdata",
        action="store_true",
        help="also write DIR/<slide>.zarr: patches with their scores, areas and best patches as SpatialData",
    )
    parser.add_argument("--out", type=local_path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--json", action="store_true", help="print the paths of the files as JSON")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.grounding.writer import GroundingWriter

    if options.top is not None and options.top < 1:
        raise ValueError(f"--top {options.top}: expected a number above 0")
    if options.spatialdata:
        from pathflip_jax.grounding.spatialdata_file import require_spatialdata

        require_spatialdata()
    with GroundingWriter() as writer:
        return _ground_all(options, writer)


def _ground_all(options: argparse.Namespace, writer: "GroundingWriter") -> int:
    """Ground the texts on all slides; returns the exit code."""
    with paused_collection():
        from pathflip_jax.inference.load import load

        predictor = load(options.checkpoint)
        reader = slide_reader(options, predictor)
    found = reader.find(options.slide, options.slide_id)
    alone = len(found.slides) + len(found.failed) == 1
    if options.image is not None and not alone:
        raise ValueError(
            f"--image {options.image}: one slide file for {len(found.slides)} slides; choose one of them by "
            "--slide-id, or put slide files and features in one folder"
        )
    if found.slides and (image := options.image or found.slides[0].image):
        writer.open(image)
    if any(source.features is None for source in found.slides):  # a fault of the texts shows before slides are encoded
        predictor.check_query([*options.texts, *options.negative], options.method)
    failed, written, pages = list(found.failed), {}, []
    for source, slide in reader.read_each(found.slides, failed):
        try:
            written[slide.slide_id] = _ground(options, predictor, slide, options.image or source.image, writer, pages)
        except (ValueError, OSError) as error:
            if alone:
                raise
            failed.append(Failure(slide.slide_id, str(source.place or source.image), str(error)))
    if alone and failed:
        raise ValueError(failed[0].error)
    if pages:
        _write_page(options, predictor, pages, written)
    _print(list(written.values())[0] if alone else written, options.json)
    return print_failures(failed)


def _ground(options: argparse.Namespace, predictor, slide, image, writer: "GroundingWriter", pages: list) -> dict:
    """Ground the texts on a slide and write its files, and add it to the `pages`, if any are asked for."""
    from pathflip_jax.grounding.patch_selection import select_patches
    from pathflip_jax.grounding.placement import check_on_slide, check_same_slide
    from pathflip_jax.grounding.top_patches import TOP

    if options.top is not None and image is None:
        raise ValueError(f"--top {options.top}: expected --image, the slide file to cut patches from")
    measures = None
    if slide.coords is not None:
        if slide.width and slide.height:
            check_on_slide(slide, slide.width, slide.height, "the slide according to its feature file")
        if image is not None:
            measures = writer.measures(image)
            check_same_slide(slide, measures, image)
    bounds = (0, 0) if measures is None else measures.bounds
    grounding = predictor.ground(
        select_patches(slide, options.within, options.without, bounds),
        list(dict.fromkeys(options.texts)),
        negative=options.negative,
        method=options.method,
        window=options.window,
    )
    if options.page:
        from pathflip_jax.viewer.static import PageSlide

        pages.append(PageSlide(slide.slide_id, image, lambda: grounding))
    areas = {name: getattr(options, name) for name in ("smooth", "min_patches")}
    areas |= {"measures": measures, "threshold": options.threshold, "top": options.top or TOP}
    if options.threshold is None and options.negative:
        areas["threshold"] = 0.0
    written = writer.write(options.out, grounding, image=image, **areas)
    if options.spatialdata:
        from pathflip_jax.grounding.spatialdata_file import write_spatialdata

        written["spatialdata"] = write_spatialdata(options.out, grounding, **areas)
    return written


def _write_page(options: argparse.Namespace, predictor, pages: list, written: dict[str, dict]) -> None:
    """Write the page of all slides, and list it among the files of each."""
    from pathflip_jax.viewer.session import model_facts
    from pathflip_jax.viewer.static import write_page

    method = pages[0].ground().method
    page = write_page(options.out / "page", pages, model_facts(predictor, method))
    for files in written.values():
        files["page"] = str(page.out / "index.html")


def _print(written: dict[str, Any], as_json: bool) -> None:
    """Print the files of one slide, or of several by slide id."""
    if as_json:
        print(json.dumps(written))
        return
    for files in written.values() if all(isinstance(found, dict) for found in written.values()) else [written]:
        listed = (path for found in files.values() for path in (found if isinstance(found, list) else [found]))
        print("\n".join(listed))

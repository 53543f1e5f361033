"""`pathflip ground`: grounding of texts on a slide."""

import argparse
import json

from pathflip_jax.commands.options import (
    RUN_HELP,
    add_grounding_options,
    add_shared_options,
    command,
    local_path,
    number,
    place,
)


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "ground",
        _run,
        "map where on a slide a text matches",
        'pathflip ground features/S1.h5 "tumor necrosis" --checkpoint runs/base --image slides/S1.svs --out maps',
        'pathflip ground records --slide-id S1 "invasive carcinoma" "lymphocytes" --negative "normal stroma" '
        "--checkpoint runs/base --threshold 0.05 --out maps",
    )
    parser.add_argument("slide", type=place, metavar="SLIDE", help="feature file, or folder of records with --slide-id")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="one or several texts")
    parser.add_argument("--slide-id", help="id of the slide to read from a folder of records")
    parser.add_argument("--checkpoint", type=place, required=True, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--image",
        type=local_path,
        metavar="FILE",
        help="slide file, drawn under the heatmap; pictures of the best patches are cut out of it",
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
        help="pictures of the N best patches of each text (default 8 with --image)",
    )
    parser.add_argument(
        "--patch-size",
        type=number("patch-size"),
        metavar="PX",
        help="edge length of a patch in level-0 pixels, if its file does not state it",
    )
    parser.add_argument(
        "--mpp", type=number("mpp"), metavar="UM", help="level-0 micrometres per pixel, if its file does not state it"
    )
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
    from pathflip_jax.grounding.placement import check_on_slide, check_same_slide, read_measures
    from pathflip_jax.grounding.spatialdata_file import require_spatialdata, write_spatialdata
    from pathflip_jax.grounding.write import write_grounding
    from pathflip_jax.inference.load import load, read_slide

    if options.top is not None and (options.top < 1 or options.image is None):
        raise ValueError(
            f"--top {options.top}: expected a number above 0, and --image, the slide file to cut patches from"
        )
    if options.spatialdata:
        require_spatialdata()
    known = {"patch_size": options.patch_size, "mpp": options.mpp}
    slide = read_slide(
        options.slide, slide_id=options.slide_id, **{name: value for name, value in known.items() if value is not None}
    )
    measures = None
    if slide.coords is not None:
        if slide.width and slide.height:
            check_on_slide(slide, slide.width, slide.height, "the slide according to its feature file")
        if options.image is not None:
            measures = read_measures(options.image)
            check_same_slide(slide, measures, options.image)
    predictor = load(options.checkpoint)
    grounding = predictor.ground(
        slide,
        list(dict.fromkeys(options.texts)),
        negative=options.negative,
        method=options.method,
        window=options.window,
    )
    areas = {name: getattr(options, name) for name in ("smooth", "min_patches")}
    areas |= {"measures": measures, "threshold": options.threshold, "top": options.top or 8}
    if options.threshold is None and options.negative:
        areas["threshold"] = 0.0
    written = write_grounding(options.out, grounding, image=options.image, **areas)
    if options.spatialdata:
        written["spatialdata"] = write_spatialdata(options.out, grounding, **areas)
    if options.page:
        from pathflip_jax.viewer.session import model_facts
        from pathflip_jax.viewer.static import PageSlide, write_page

        shown = PageSlide(slide.slide_id, options.image, lambda: grounding)
        page = write_page(options.out / "page", [shown], model_facts(predictor, grounding.method))
        written["page"] = str(page.out / "index.html")
    if options.json:
        print(json.dumps(written))
    else:
        files = (path for found in written.values() for path in (found if isinstance(found, list) else [found]))
        print("\n".join(files))
    return 0

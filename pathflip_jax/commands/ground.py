"""`pathflip ground`: where on a slide a text is seen."""

import argparse
import json
from pathlib import Path

import numpy as np

from pathflip_jax.commands.options import add_grounding_options, command, place


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "ground",
        _run,
        "show where on a slide a text is seen",
        'pathflip ground features/S1.h5 "tumor necrosis" --checkpoint runs/base --image slides/S1.svs --out maps',
    )
    parser.add_argument("slide", type=place, metavar="SLIDE", help="feature file, or folder of records with --slide-id")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="one or several texts")
    parser.add_argument("--slide-id", help="slide of a folder of records")
    parser.add_argument("--checkpoint", type=place, required=True, metavar="RUN", help="run folder")
    parser.add_argument("--image", type=Path, metavar="FILE", help="the slide file, drawn under the heatmap")
    add_grounding_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument("--json", action="store_true", help="print the files written as JSON")


def _run(options: argparse.Namespace) -> int:
    from pathflip_jax.grounding.heatmap import draw_grounding
    from pathflip_jax.inference import load, read_slide

    predictor = load(options.checkpoint)
    slide = read_slide(options.slide, slide_id=options.slide_id)
    grounding = predictor.ground(slide, options.texts, method=options.method, window=options.window)
    options.out.mkdir(parents=True, exist_ok=True)
    picture = options.out / f"{slide.slide_id}.png"
    draw_grounding(grounding, picture, image=options.image)
    scores = options.out / f"{slide.slide_id}.npz"
    np.savez(scores, texts=grounding.texts, patch_scores=grounding.patch_scores, coords=grounding.coords)
    if options.json:
        print(json.dumps({"picture": str(picture), "scores": str(scores)}))
    else:
        print(f"{picture}\n{scores}")
    return 0

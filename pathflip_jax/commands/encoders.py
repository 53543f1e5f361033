"""`pathflip encoders`: registered patch encoders, and a check of their weights."""

import argparse
import json
from pathlib import Path

from pathflip_jax.commands.options import command, local_path

_HEADER = ("encoder", "width", "patches", "parameters", "weights here", "access", "licence")


def add(commands) -> None:
    """Add the command and its options."""
    parser = command(
        commands,
        "encoders",
        _run,
        "pathflip encoders",
        "pathflip encoders --check weights/uni2-h",
    )
    parser.add_argument(
        "--check",
        type=local_path,
        metavar="WEIGHTS",
        help="file or folder of weights: print the encoders that it fits, or what is wrong with it",
    )
    parser.add_argument("--encoder", metavar="NAME", help="with --check: the encoder that the weights should be of")
    parser.add_argument("--json", action="store_true", help="print as JSON, with repositories, transforms and notes")


def _run(options: argparse.Namespace) -> int:
    if options.encoder and options.check is None:
        raise ValueError("--encoder names the encoder whose weights --check should find; pass --check WEIGHTS too")
    return _check(options) if options.check is not None else _list(options)


def _list(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from data_prep.hub import cached
    from pathflip_jax.vision.recipes import RECIPES

    here = {name: cached(recipe) for name, recipe in RECIPES.items()}
    if options.json:
        facts = {name: asdict(recipe) | {"width": recipe.width} for name, recipe in RECIPES.items()}
        print(json.dumps({name: fact | {"weights": here[name] and str(here[name])} for name, fact in facts.items()}))
        return 0
    rows = [_HEADER]
    for name, recipe in RECIPES.items():
        patches = f"{recipe.patch_size} px at {recipe.mpp:g} um"
        access = "gated" if recipe.gated else "open"
        size = f"{recipe.parameters / 1e6:,.0f} M"
        rows.append((name, str(recipe.width), patches, size, "yes" if here[name] else "no", access, recipe.licence))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\npathflip prepare SLIDES --encoder NAME --weights FOLDER --out RECORDS; the licence of an encoder may bind")
    print("what is trained on its features.")
    return 0


def _check(options: argparse.Namespace) -> int:
    from pathflip_jax.convert.vision import check_vision, fitting
    from pathflip_jax.vision.recipes import RECIPES, known_recipe

    place: Path = options.check
    if options.encoder:
        recipe = known_recipe(options.encoder)
        found = {recipe.name: check_vision(recipe, place)}
    else:
        found = fitting(place)
    if options.json:
        print(json.dumps({name: str(path) for name, path in found.items()}))
        return 0
    for name, path in found.items():
        recipe = RECIPES[name]
        print(f"{path}: complete weights of the shape of {name} ({recipe.repository}; {recipe.licence})")
    if len(found) > 1:
        print("These encoders have the same shape: the file itself does not say of which it is.")
    return 0

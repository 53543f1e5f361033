"""Recipe of the features in a folder of records: claimed by `prepare`, gathered by `import`."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

from data_prep.encoders import PatchEncoder
from data_prep.plan_file import has_records
from pathflip_jax.data.readers.feature_recipe import SRGB, FeatureRecipe, is_same_size, objection
from pathflip_jax.data.records.cohort import Cohort
from pathflip_jax.data.records.columns import SlideInfo
from pathflip_jax.data.records.recipe import RECIPE, read_recipe, write_recipe
from pathflip_jax.data.storage.files import Place, remove
from pathflip_jax.vision.recipes import Recipe, find_recipe, registry_name

_FEATURES_OF = re.compile(r"features_(.+)")  # TRIDENT's folders


def claim_recipe(out: Place, encoder: PatchEncoder, settings: Mapping[str, Any]) -> None:
    """Bind a folder of records to the recipe of an encoder, before the first slide and in every process.

    Records of an earlier version, without encoder.json, keep an unknown recipe. Raises ValueError where the folder is
    bound to a recipe that contradicts.
    """
    _claim(out, json.dumps(features_recipe(encoder, settings).to_dict()))


def features_recipe(encoder: PatchEncoder, settings: Mapping[str, Any]) -> FeatureRecipe:
    """Recipe of the features that an encoder makes with the settings of a folder of records."""
    facts = {"encoder": encoder.name, "feature_dim": encoder.dim, "source": "prepare"}
    facts |= {name: settings[name] for name in ("patch_size", "mpp")} | getattr(encoder, "recipe_facts", dict)()
    facts["colours"] = SRGB if settings.get("icc") else ""
    return FeatureRecipe(**facts)


@lru_cache(maxsize=1)  # once for each process
def _claim(out: Place, facts: str) -> None:
    recipe = FeatureRecipe.from_dict(json.loads(facts))
    if read_recipe(out) is None:
        if has_records(out):
            return
        write_recipe(out, recipe)
    if found := objection(recipe, read_recipe(out)):  # read again: another task may have written it
        raise ValueError(
            f"{out / RECIPE}: the features of this folder are made by another recipe than that of this run: {found}; "
            "choose another --out, or run with the encoder, weights and patch size that the folder was begun with"
        )


def release_recipe(out: Place) -> None:
    """Free a folder that was bound to a recipe, but got no record."""
    if not has_records(out):
        remove(out / RECIPE)


def write_imported_recipe(out: Place, slides: Sequence[SlideInfo]) -> None:
    """Write the recipe of imported features, as far as their files state it."""
    edges = [info.patch_size * info.mpp for info in slides if info.patch_size and info.mpp]
    encoder = next((info.encoder for info in slides if info.encoder), "")
    facts = {"encoder": encoder, "feature_dim": slides[0].feature_dim, "patch_um": median(edges) if edges else 0.0}
    write_recipe(out, FeatureRecipe(**facts, source="import"))


def encoder_name(named: str, file: Path) -> str:
    """Encoder of a feature file in the registry's spelling; that of TRIDENT's folder where the file names none."""
    if not named and (folder := _FEATURES_OF.fullmatch(file.parent.name)):
        named = folder[1] if find_recipe(folder[1]) else ""
    return registry_name(named)


def contradictions(cohort: Cohort) -> Iterator[str]:
    """Notes on imported features that contradict the published recipe of the encoder that they name."""
    recipe = find_recipe(cohort.common["encoder"].value)
    if recipe is None:
        return
    width = cohort.common["feature_dim"].value
    if width != recipe.width:
        yield (
            f"features of {recipe.name} are {width} wide, its published recipe gives {recipe.width}: "
            f"{_width_meaning(recipe, width)}; models of the published features cannot use them"
        )
    expected = recipe.patch_size * recipe.mpp
    edge = cohort.size.value if cohort.size is not None and cohort.unit == "um" else 0.0
    if not is_same_size(edge, expected):
        yield (
            f"patches are {edge:.4g} um wide, {recipe.name} expects {expected:g} um ({recipe.patch_size} px at "
            f"{recipe.mpp:g} um per px): perhaps another magnification than the encoder knows, which weakens its "
            "features, or a wrong mpp"
        )


def _width_meaning(recipe: Recipe, width: int) -> str:
    """Reason that a width other than the published one suggests."""
    tokens = recipe.network.width
    if (width, recipe.width) == (tokens, 2 * tokens):
        return "perhaps the class token alone, without the mean of the patch tokens"
    if (width, recipe.width) == (2 * tokens, tokens):
        return "perhaps the class token with the mean of the patch tokens"
    if width == tokens:
        return "perhaps tokens before the encoder's pooling or projection"
    return "perhaps another encoder, or another version of it"

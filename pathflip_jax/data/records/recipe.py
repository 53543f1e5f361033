"""Recipe of a folder of records (encoder.json): how the features of all its slides were made."""

from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.storage.files import Place, as_path, make_folder, read_bytes
from pathflip_jax.data.storage.json_files import write_json
from pathflip_jax.data.storage.json_values import json_object

RECIPE = "encoder.json"
VERSION = 1


def read_recipe(folder: Place | str) -> FeatureRecipe | None:
    """Recipe of a folder; None for one without encoder.json, whose recipe is unknown, as in earlier versions.

    Raises ValueError naming the file if it is damaged or of a later version.
    """
    path = as_path(folder) / RECIPE
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return None
    values = json_object(path, data)
    version = values.pop("version", None)
    if type(version) is not int or version != VERSION:
        cure = "read it with the version of pathflip that wrote it, or copy the folder again"
        raise ValueError(f"{path}: version {version!r:.40}, expected {VERSION}; {cure}")
    try:
        return FeatureRecipe.from_dict(values)
    except ValueError as error:
        raise ValueError(
            f"{path}: not the recipe of features ({error}); copy the file again, or delete it: the recipe of the "
            "folder is then unknown, and records of another one are not told apart from it"
        ) from None


def write_recipe(folder: Place | str, recipe: FeatureRecipe) -> None:
    """Write encoder.json of a folder atomically."""
    make_folder(as_path(folder))
    write_json(as_path(folder) / RECIPE, {"version": VERSION, **recipe.to_dict()}, indent=1)

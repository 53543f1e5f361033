"""Weights of registered encoders from the Hugging Face hub: from its local cache, else downloaded."""

from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from pathflip_jax.convert.vision import how_to_get
from pathflip_jax.vision.recipes import Recipe


def cached(recipe: Recipe) -> Path | None:
    """Weights of a recipe in the local cache of the hub; None where they are not there."""
    for name in recipe.files:
        found = huggingface_hub.try_to_load_from_cache(recipe.repository, name)
        if isinstance(found, str):
            return Path(found)
    return None


def from_hub(recipe: Recipe) -> Path:
    """Weights of a recipe in the local cache of the hub, downloaded if they are not there yet.

    Raises FileNotFoundError where they cannot be had, with the reason and the commands that get them: a gated
    repository without access, no connection, or a repository without the expected files.
    """
    if (found := cached(recipe)) is not None:
        return found
    try:
        for name in recipe.files:
            try:
                return Path(huggingface_hub.hf_hub_download(recipe.repository, name))
            except errors.LocalEntryNotFoundError:  # no connection
                raise
            except errors.EntryNotFoundError:
                continue
        reason = f"{recipe.repository} has no {' or '.join(recipe.files)}"
    except errors.GatedRepoError:
        reason = f"{recipe.repository} is gated, and this account or machine has no access"
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        reason = f"{recipe.repository} cannot be reached ({str(error).splitlines()[0][:200]})"
    raise FileNotFoundError(
        f"encoder {recipe.name}: no weights here, and {reason}; {how_to_get(recipe)}, and pass their folder with "
        f"`--weights {recipe.name}`"
    )

"""Folder of a run by any of its names: a path, the name of a bundled run, or a repository of the Hugging Face hub."""

from pathlib import Path

from pathflip_jax.convert.exported import CONFIG, LANGUAGE, read_exported
from pathflip_jax.data.storage import hub
from pathflip_jax.data.storage.files import Place
from pathflip_jax.runs import bundled
from pathflip_jax.runs.files import MODEL

ABOUT_RUN = (CONFIG, MODEL, LANGUAGE)  # the files that tell a run or an export from other models


def find_run(place: Place | str) -> Place | str:
    """Folder of the run that `place` names; one on the hub is downloaded to its cache.

    Raises OSError for a repository that cannot be had, ValueError for one without a model of this package, before its
    weights are downloaded.
    """
    if not hub.is_on_hub(place):
        return bundled.find(place)
    repository = hub.read_name(place)
    about = hub.download(repository, ABOUT_RUN)
    if not holds_run(about):
        found = "a config.json of another model" if (about / CONFIG).exists() else "no config.json"
        raise ValueError(
            f"{repository}: {found} in it, expected a run that `pathflip push` wrote, or an export of `pathflip export`"
        )
    return hub.download(hub.Repository(repository.name, about.name))


def holds_run(folder: Path) -> bool:
    """Whether the files `ABOUT_RUN` in a folder are those of a run, or of an export of one."""
    return any((folder / name).exists() for name in (MODEL, LANGUAGE)) or read_exported(folder) is not None

"""Small trained runs that come with the package, loaded by their names.

Each is an export in a folder of `bundled_runs/`, with a card that states its data, licence and scores. They demonstrate
the tools for research; none is a general model of pathology.
"""

from pathlib import Path

from pathflip_jax.data.storage.files import Place

FOLDER = Path(__file__).with_name("bundled_runs")


def names() -> list[str]:
    """Names of the bundled runs."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) if FOLDER.is_dir() else []


def find(place: Place | str) -> Place | str:
    """Folder of the bundled run that `place` names; `place` itself where it exists, or names no bundled run."""
    name = str(place)
    return FOLDER / name if name in names() and not Path(name).exists() else place

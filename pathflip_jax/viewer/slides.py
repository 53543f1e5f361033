"""Slide table of a viewer: slide files and features, matched by slide id at start-up.

Requests name a slide by its number in this table, so neither an id nor other client input becomes a path.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pathflip_jax.data.readers.feature_files import find_feature_files
from pathflip_jax.data.readers.feature_format import slide_id_of
from pathflip_jax.data.readers.features import SlideFeatures, read_features
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage.failures import preview
from pathflip_jax.data.storage.files import Place
from pathflip_jax.evaluate.colour import slide_files
from pathflip_jax.inference.sources import SlideSource


def list_slides(
    slides_dir: Path | None,
    *,
    records: Records | Place | None = None,
    features: Path | None = None,
    only: Sequence[str] | None = None,
) -> list[SlideSource]:
    """List the slides of a folder of slide files and of records or feature files, in order of their ids.

    Records may be open already. A slide found in only one of them is shown as far as possible. `only` chooses slides by
    id. Raises ValueError if files and features have no slide in common, and for an id of `only` that is not found.
    """
    images = {} if slides_dir is None else slide_files(slides_dir)
    readers: dict[str, Callable[[], SlideFeatures]] = {}
    if records is not None:
        archive = records if isinstance(records, Records) else Records(records)
        records = archive.where
        readers = {name: partial(archive.read, i) for i, name in enumerate(archive.slides.column("slide_id"))}
    elif features is not None:
        readers = {slide_id_of(path): partial(read_features, path) for path in find_feature_files(features).files}
    if images and readers and not images.keys() & readers.keys():
        raise ValueError(
            f"{slides_dir}: none of its {len(images)} slides ({preview(images)}) is among the {len(readers)} slides of "
            f"{records or features} ({preview(readers)}); slides are matched by file name without its extension"
        )
    found = sorted(images.keys() | readers.keys())
    if only is not None:
        if absent := [name for name in only if name not in images and name not in readers]:
            raise ValueError(f"no slide {absent[0]!r} among the {len(found)} slides found ({preview(found)})")
        found = list(dict.fromkeys(only))
    if not found:
        raise ValueError(f"{slides_dir}: found no file that OpenSlide can open; pass the folder of the slide files")
    return [SlideSource(name, images.get(name), readers.get(name)) for name in found]

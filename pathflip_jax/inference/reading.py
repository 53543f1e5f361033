"""Features of slides from any source for a trained run: slide files are encoded its way, once, into a cache."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from data_prep.encoding_task import Encoded, Task
from data_prep.settings import PrepareSettings
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.columns import DTYPES
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.recipe import read_recipe
from pathflip_jax.data.records.records import Records, finish_folder, shard_name, write_shard
from pathflip_jax.data.storage.failures import Failure
from pathflip_jax.data.storage.files import Place
from pathflip_jax.inference.run_encoder import EncodedRun, settings_of_run
from pathflip_jax.inference.slide_cache import CAPACITY, Entry, SlideCache, fingerprint
from pathflip_jax.inference.sources import SlideSource, Sources, choose, find_sources
from pathflip_jax.vision.recipes import registry_name

if TYPE_CHECKING:
    from data_prep.slide_encoder import SlideEncoder

log = logging.getLogger(__name__)
_ATTEMPTS = 3  # to open an entry of the cache before it is removed again
OnProgress = Callable[[str, int, int], Any]


@dataclass(frozen=True)
class ReadingSettings:
    """Ways to read slides: the cache of encoded ones, and what files and runs do not state.

    `cache` is its folder (None: the user's), `cache_bytes` its capacity, `whole_files` whether slides are told apart by
    all of their bytes. `weights` are those of the patch encoder, `workers` the processes that read slides. `patch_size`
    (level-0 pixels) and `mpp` fill in what a feature file, a slide or the run lacks; `min_tissue` and `keep_ink` are as
    in `PrepareSettings`.
    """

    cache: Path | None = None
    cache_bytes: float = CAPACITY
    whole_files: bool = False
    weights: Path | None = None
    workers: int | None = None
    patch_size: int | None = None
    mpp: float | None = None
    min_tissue: float = 0.25
    keep_ink: bool = False

    @property
    def known(self) -> dict[str, Any]:
        """Facts for feature files that lack them."""
        given = {"patch_size": self.patch_size, "mpp": self.mpp}
        return {name: value for name, value in given.items() if value is not None}


class SlideReader:
    """Reader of slides for a run. Slides that need it are encoded with its encoder and patches, and cached."""

    def __init__(self, run: EncodedRun, settings: ReadingSettings | None = None) -> None:
        self._run, self.settings = run, settings or ReadingSettings()

    @cached_property
    def _how(self) -> PrepareSettings:
        own = self.settings
        how = settings_of_run(
            self._run, weights=own.weights, patch_size=own.patch_size, mpp=own.mpp, workers=own.workers
        )
        return replace(how, min_tissue=own.min_tissue, keep_ink=own.keep_ink)

    @cached_property
    def _encoder(self) -> "SlideEncoder":
        # With all that reads slides, which those in the cache do not need.
        from data_prep.slide_encoder import SlideEncoder

        recipe = self._run.recipe
        return SlideEncoder(self._how, recipe and replace(recipe, encoder=registry_name(recipe.encoder)))

    @cached_property
    def cache(self) -> SlideCache:
        """Cache of encoded slides."""
        return SlideCache(self.settings.cache, self.settings.cache_bytes, self.settings.whole_files)

    def check(self) -> None:
        """Raise ValueError, OSError or ImportError where slides cannot be encoded for the run, before any is.

        A network is loaded with the first slide; here its name and its patches are checked, and the cache.
        """
        _ = self._encoder, self.cache

    def find(self, place: Place | str, slide_ids: Sequence[str] | None = None) -> Sources:
        """Slides below a path, as `find_sources`; `slide_ids` choose among them, or name that of a feature file."""
        name = slide_ids[0] if slide_ids and len(slide_ids) == 1 else ""
        return choose(find_sources(place, self.settings.known, name), slide_ids, place)

    def read(self, source: SlideSource, on_progress: OnProgress | None = None) -> SlideFeatures:
        """Features of a slide, encoded first where it has none. Raises ValueError or OSError where that fails."""
        if source.features is not None:
            return source.features()
        for _ in range(_ATTEMPTS):
            (found,) = self.encode([source], on_progress)
            if found.error:
                raise ValueError(found.error)
            with suppress(FileNotFoundError):  # another process has just removed it from a full cache
                return open_slide(Records(found.folder), 0)
        raise OSError(f"{found.folder}: removed by other processes as soon as it is there; raise --cache-size")

    def encode(self, sources: Sequence[SlideSource], on_progress: OnProgress | None = None) -> Iterator[Encoded]:
        """Encode the slides that are not in the cache yet, together; yields each, cached ones first.

        A slide that another process is encoding is awaited. An entry that is damaged is made again.
        """
        entries = {source.slide_id: self._entry(source) for source in sources}
        left = []
        for source in sources:
            entry = entries[source.slide_id]
            if isinstance(entry, Encoded):
                yield entry
            elif self._is_sound(entry):
                yield Encoded(source.slide_id, entry.folder)
            else:
                left.append((source, entry))
        if left:
            yield from self._encode_missing(left, on_progress)
            self.cache.trim(keep=[entry.folder for entry in entries.values() if isinstance(entry, Entry)])

    def read_each(
        self, sources: Sequence[SlideSource], failed: list[Failure]
    ) -> Iterator[tuple[SlideSource, SlideFeatures]]:
        """Features of slides in order; slides to encode are encoded before, together. Bad slides go to `failed`."""
        folders = self._encoded(sources, failed)
        for source in sources:
            try:
                if source.features is not None or source.slide_id in folders:
                    yield source, self.read(source)
            except (ValueError, OSError) as error:
                failed.append(Failure(source.slide_id, str(source.place or source.image), str(error)))

    def records(self, sources: Sequence[SlideSource], failed: list[Failure]) -> Records:
        """Records of slides, all that their shards hold; slides and feature files get theirs in the cache.

        Slides that cannot be read are added to `failed`. Raises ValueError where none is left.
        """
        folders = self._encoded(sources, failed)
        shards = {source.place for source in sources if source.is_recorded}
        for source in sources:
            if source.features is not None and not source.is_recorded:
                try:
                    folders[source.slide_id] = self._import(source)
                except (ValueError, OSError) as error:
                    failed.append(Failure(source.slide_id, str(source.place), str(error)))
        shards |= {folder / shard_name(0) for folder in folders.values()}
        if not shards:
            raise ValueError(f"none of {len(sources)} slides can be read; the first: {failed[0].error}")
        records = Records(sorted(shards))
        records.recipe = read_recipe(records.shards[0].parent)
        return records

    def _encoded(self, sources: Sequence[SlideSource], failed: list[Failure]) -> dict[str, Path]:
        """Folders of the slides that are encoded, by id."""
        folders, images = {}, {source.slide_id: source.image for source in sources if source.features is None}
        for found in self.encode([source for source in sources if source.features is None]):
            if found.error:
                failed.append(Failure(found.slide_id, str(images[found.slide_id]), found.error))
            else:
                folders[found.slide_id] = found.folder
        return folders

    def _encode_missing(
        self, left: Sequence[tuple[SlideSource, Entry]], on_progress: OnProgress | None
    ) -> Iterator[Encoded]:
        """Encode slides whose entries are free, in one pass, then those that other processes had taken."""
        taken = []
        with ExitStack() as locks:
            tasks, own = [], {}
            for source, entry in left:
                try:
                    locks.enter_context(entry.locked(timeout=0))
                except Timeout:
                    taken.append((source, entry))
                    continue
                if entry.is_ready:  # finished by another process just now
                    yield Encoded(source.slide_id, entry.folder)
                    continue
                locks.callback(entry.abandon)  # what is not published
                tasks.append(Task(source.slide_id, source.image, entry.begin()))
                own[source.slide_id] = entry
            for found in self._encoder.encode(tasks, on_progress) if tasks else ():
                entry = own[found.slide_id]
                if not found.error:
                    entry.publish()
                for note in found.notes:
                    log.warning("slide %s: %s", found.slide_id, _in_own_options(note))
                yield replace(found, folder=entry.folder, error=_in_own_options(found.error))
        for source, entry in taken:
            log.warning("slide %s: another process is encoding it; waiting for it", source.slide_id)
            with entry.locked():
                pass
            yield from self._encode_missing([(source, entry)], on_progress)

    def _entry(self, source: SlideSource) -> Entry | Encoded:
        """Cache entry of a slide file, or the error of one that cannot be read."""
        how, recipe, cache = self._how, self._run.recipe, self.cache
        names = ("encoder", "half", "patch_size", "mpp", "assume_mpp", "min_tissue", "keep_ink", "icc", "dtype")
        facts = {name: value for name, value in how.of_records().items() if name in names}
        facts["encoder_version"] = recipe.encoder_version if recipe else ""
        try:
            facts["weights"] = recipe.weights if recipe and recipe.weights else how.weights and fingerprint(how.weights)
            return cache.entry(source.slide_id, source.image, facts)
        except OSError as error:
            return Encoded(source.slide_id, source.image, f"{source.image}: cannot be read ({error.strerror})")

    def _is_sound(self, entry: Entry) -> bool:
        """Whether an entry is there and whole; a damaged one is removed, with a warning."""
        if not entry.is_ready:
            return False
        try:
            entry.check()
            records = Records(entry.folder)
            self._run.check_records(records)
            open_slide(records, 0)
        except (ValueError, OSError) as error:
            log.warning("cache of encoded slides: %s; the slide is encoded again", error)
            entry.remove()
            return False
        return True

    def _import(self, source: SlideSource) -> Path:
        """Entry of a slide that holds the features of its feature file."""
        from data_prep.recipe import write_imported_recipe

        entry = self.cache.entry(source.slide_id, source.place, {"known": self.settings.known})
        if self._is_sound(entry):
            return entry.folder
        with entry.locked(), ExitStack() as undo:
            undo.callback(entry.abandon)  # where it is not published
            slide = source.features()
            shard = entry.begin() / shard_name(0)
            dtype = "bfloat16" if slide.features.dtype == DTYPES["bfloat16"] else "float16"
            infos = write_shard(shard, [slide], cut="grid" if slide.coords is not None else "scan", dtype=dtype)
            write_imported_recipe(entry.part, infos)
            finish_folder(entry.part)
            self._run.check_records(Records(entry.part))
            entry.publish()
        return entry.folder


def _in_own_options(message: str) -> str:
    """Message of the preparation with the option that gives the resolution here."""
    return message.replace("--assume-mpp", "--mpp")

"""Slides that arrive while the viewer runs, and the queue in which slides without features are encoded.

One thread looks for new slide files and one encodes, so that requests never wait for either. The slide that a visitor
opens goes to the head of the queue.
"""

import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.slide_files import find_slides
from pathflip_jax.data.records.large import open_slide
from pathflip_jax.data.records.records import Records
from pathflip_jax.inference.reading import SlideReader
from pathflip_jax.inference.slide_cache import fingerprint
from pathflip_jax.inference.sources import SlideSource

LOOK_SECONDS = 3.0  # between two looks at the folder, and at least
LOOK_SHARE = 20  # times as long as a look takes: a share with many slides is not searched all the time


class Waiting(Exception):
    """Question about a slide that is not encoded yet; its `progress` is that of `Intake.progress`."""

    def __init__(self, slide_id: str, progress: dict[str, Any]) -> None:
        super().__init__(f"slide {slide_id} is being encoded; the question waits its turn")
        self.progress = progress


class _State(NamedTuple):
    """Patches done of a slide and all of its patches, and why it could not be encoded; "" otherwise."""

    done: int = 0
    patches: int = 0
    error: str = ""


class Intake:
    """Encoder of the slides of a viewer that have no features, and watcher of the folder from which more may come.

    `slides` is the viewer's table, to which new slides are appended. `reader` encodes them, None where the run's
    encoder is not at hand, for the reason `refusal`. `encoded(number)` is called when a slide has got its features.
    """

    def __init__(
        self,
        slides: list[SlideSource],
        reader: SlideReader | None,
        folder: Path | None = None,
        refusal: str = "",
        encoded: Callable[[int], Any] = lambda number: None,
    ) -> None:
        self.slides, self._reader, self._folder, self.refusal = slides, reader, folder, refusal
        self._encoded = encoded
        self._states: dict[int, _State] = {}
        self._queue: list[int] = []
        self._current: int | None = None
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        self._unfinished: dict[str, Any] = {}  # fingerprints of files that may still be written
        for number, slide in enumerate(slides):
            self._enqueue(number, slide)

    def start(self) -> None:
        """Begin to encode, and to look for new slides."""
        work = [self._encode_all] * (self._reader is not None) + [self._watch] * (self._folder is not None)
        self._threads = [threading.Thread(target=one, daemon=True) for one in work]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the threads; a slide that is being encoded is given up."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=LOOK_SECONDS)

    def progress(self, number: int) -> dict[str, Any] | None:
        """State of a slide without features: `state` (waiting, encoding, failed), `done`, `of`, `ahead`, `error`.

        None for a slide with features, and for one that cannot be encoded.
        """
        with self._changed:
            if self.slides[number].features is not None or number not in self._states:
                return None
            found = self._states[number]
            if found.error:
                return {"state": "failed", "error": found.error}
            if number == self._current:
                return {"state": "encoding", "done": found.done, "of": found.patches}
            return {"state": "waiting", "ahead": self._queue.index(number) + (self._current is not None)}

    def require(self, number: int) -> None:
        """Return if a slide has features, else let it be encoded next.

        Raises Waiting until it is, and ValueError for a slide that cannot be encoded.
        """
        slide = self.slides[number]
        if slide.features is not None:
            return
        progress = self.progress(number)
        if progress is None:
            raise ValueError(f"slide {slide.slide_id}: found no features{self.refusal and f', and {self.refusal}'}")
        if progress["state"] == "failed":
            raise ValueError(progress["error"])
        with self._changed:
            if number in self._queue:
                self._queue.remove(number)
                self._queue.insert(0, number)
        raise Waiting(slide.slide_id, progress)

    def _enqueue(self, number: int, slide: SlideSource) -> None:
        if slide.features is None and slide.image is not None and self._reader is not None:
            self._states[number] = _State()
            self._queue.append(number)

    def _encode_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped.is_set())
                if self._stopped.is_set():
                    return
                number = self._current = self._queue.pop(0)
            error = self._encode(number)
            with self._changed:
                self._current = None
                if error:
                    self._states[number] = _State(error=error)

    def _encode(self, number: int) -> str:
        """Encode a slide, give it its features and announce it; returns the error, "" for none."""
        slide = self.slides[number]

        def report(_: str, done: int, patches: int) -> None:
            self._states[number] = _State(done, patches)

        try:
            (found,) = self._reader.encode([slide], report)
            error = found.error
            if not error:
                records = Records(found.folder)
                self.slides[number] = slide._replace(features=partial(open_slide, records, 0))
                self._encoded(number)
        except Exception as fault:  # such as a device out of memory: the slides behind it still get their turn
            error = str(fault) or type(fault).__name__
        if error:
            error = error.replace(str(slide.image), slide.image.name)  # the page shows no folder of this machine
            print(f"slide {slide.slide_id} is not encoded: {error}", file=sys.stderr)
        return error

    def _watch(self) -> None:
        pause, told = LOOK_SECONDS, ""
        while not self._stopped.wait(pause):
            begin, fault = time.monotonic(), ""
            try:
                self._look()
            except (OSError, ValueError) as error:
                fault = str(error)
            if fault and fault != told:
                print(f"{self._folder}: no new slides can be seen: {fault}", file=sys.stderr)
            told, pause = fault, max(LOOK_SECONDS, LOOK_SHARE * (time.monotonic() - begin))

    def _look(self) -> None:
        """Add the slide files that are new, once they are whole: unchanged since the look before."""
        try:
            files, _ = find_slides(self._folder)
        except FileNotFoundError:  # none yet
            return
        known = {slide.slide_id for slide in self.slides}
        before, self._unfinished = self._unfinished, {}
        for name, path in files.items():
            if name in known:
                continue
            now = fingerprint(path)
            if before.get(name) == now:
                self._add(SlideSource(name, path, None))
            else:
                self._unfinished[name] = now

    def _add(self, slide: SlideSource) -> None:
        with self._changed:
            self.slides.append(slide)
            self._enqueue(len(self.slides) - 1, slide)
            self._changed.notify_all()

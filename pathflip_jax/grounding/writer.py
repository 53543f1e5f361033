"""Writing of groundings in a second process, which loads its libraries while this one loads a model.

Importing the libraries that draw takes a second, as long as a small model takes to load and to score a slide. The slide
file is read meanwhile, too, by the process that reads all slide files (`data/readers/guarded.py`).
"""

import importlib
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pathflip_jax.data.readers import guarded
from pathflip_jax.grounding.canvas import SLIDE_PIXELS, Canvas, panel_pixels, read_thumbnail
from pathflip_jax.grounding.maps import Grounding
from pathflip_jax.grounding.placement import Measures, read_measures
from pathflip_jax.grounding.top_patches import TOP, read_top_patches, write_patches
from pathflip_jax.runtime import workers
from pathflip_jax.runtime.collection import paused_collection


class GroundingWriter:
    """A process that draws and writes groundings, and a thread that reads their slides; a context manager.

    Both start at once. Slides are opened one after the other.
    """

    def __init__(self) -> None:
        self._worker = workers.Worker()
        self._worker.submit(_load)
        self._reader = ThreadPoolExecutor(1)
        self._reader.submit(guarded.start, SLIDE_PIXELS)
        self._opened: tuple[Path, Future, Future] | None = None  # slide file, its measures and its thumbnail

    def open(self, image: Path) -> None:
        """Begin to read a slide file. Its faults are raised by `measures`."""
        if self._opened is None or self._opened[0] != image:
            measures = self._reader.submit(read_measures, image)
            self._opened = image, measures, self._reader.submit(_read_canvas, image, measures)

    def measures(self, image: Path) -> Measures:
        """Measures of a slide file. Raises OSError or ValueError, naming the file, if it is not a slide."""
        self.open(image)
        return self._opened[1].result()

    def write(
        self, out: Path, grounding: Grounding, image: Path | None = None, top: int = TOP, **settings: Any
    ) -> dict[str, str | list[str]]:
        """Write a grounding as `write_grounding`, and the `top` patches of each text, cut out of the file `image`.

        Returns the files by kind. Raises the errors of `write_grounding`, and OSError where the process ends.
        """
        best = None
        if image is not None:
            self.open(image)
            best = read_top_patches(grounding, image, top)
            settings |= {"canvas": self._opened[2].result(), "best": best}
        job = self._worker.submit(_write, out, grounding, settings)
        if best is not None:
            write_patches(out / "patches" / grounding.slide_id, grounding, best)
        try:
            return job.result()
        except workers.DEATHS as death:
            raise OSError(
                f"{out}: the process that writes maps ended ({workers.exit_name(death) or 'cause unknown'}), probably "
                "because memory ran out; end other programs, and run the same command again"
            ) from None

    def __enter__(self) -> "GroundingWriter":
        return self

    def __exit__(self, *_) -> None:
        self._reader.shutdown(wait=False, cancel_futures=True)
        self._worker.stop()


def _read_canvas(image: Path, measures: "Future[Measures]") -> Canvas:
    found = measures.result()
    return read_thumbnail(image, panel_pixels(found.width, found.height))


# ---- in the second process ----


def _load() -> None:
    """Import what `write_grounding` needs, and draw once: the first figure loads fonts."""
    with paused_collection():
        write = importlib.import_module("pathflip_jax.grounding.write")
        corner = np.array([[0, 0], [1, 1]])
        with tempfile.TemporaryDirectory() as folder:
            made = Grounding("", ("",), np.eye(2)[:1], np.zeros((1, 1)), corner, 1, 1.0, 2, 2, "")
            write.write_grounding(Path(folder), made, canvas=Canvas(np.zeros((2, 2, 3), np.uint8), (0.0, 0.0), 1.0))


def _write(out: Path, grounding: Grounding, settings: dict[str, Any]) -> dict[str, str | list[str]]:
    from pathflip_jax.grounding.write import write_grounding

    return write_grounding(out, grounding, **settings)

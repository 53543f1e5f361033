"""Python's garbage collection while a command starts."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """Pause the search for reference cycles while libraries are imported and a model is loaded.

    These create a million objects, nearly all of which stay until the process ends; searching them for garbage again
    and again takes a tenth of the time until the first result. Afterwards they are left out of every search.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

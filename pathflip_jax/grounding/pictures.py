"""Pictures as files, and the names of files of a text."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pathflip_jax.data.storage.atomic_files import atomic_file

if TYPE_CHECKING:  # matplotlib takes a second to import
    from matplotlib.figure import Figure

FAST_PNG = {"compress_level": 1}  # a third of the time of the default, for files that are a tenth larger


def short_name(number: int, text: str) -> str:
    """File name for a text: its number among the texts, from 1, and its first words."""
    words = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:16].strip("-")
    return f"{number}-{words}" if words else str(number)


def write_atomically(path: Path, data: bytes) -> Path:
    """Write a file atomically."""
    with atomic_file(path) as out:
        out.write(data)
    return path


def write_picture(path: Path, figure: "Figure", dpi: int) -> Path:
    """Write a figure as PNG."""
    figure.set_dpi(dpi)
    if (layout := figure.get_layout_engine()) is not None:
        layout.execute(figure)
        figure.set_layout_engine("none")  # `savefig` would draw all of it twice, the first time for the layout alone
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, facecolor="white", pil_kwargs=FAST_PNG)
    return write_atomically(path, stream.getvalue())

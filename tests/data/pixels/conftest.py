"""Shared fixtures of the tests of readers: where the writer of DICOM slides is, and a real slide."""

import os
import sys
from pathlib import Path

import pytest

from pathflip_jax.data.readers import slide_pixels

sys.path.append(str(Path(__file__).parent))
DATA = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[4] / "shared/data"))


@pytest.fixture(autouse=True)
def closed():
    """Close the slides that stay open for tiles, as the end of a worker process does."""
    yield
    slide_pixels.close_tiles()


@pytest.fixture
def real_slide():
    """DICOM slide that the library highdicom tests with."""
    path = DATA / "slides" / "highdicom_sm_image.dcm"
    if not path.exists():
        pytest.skip(f"{path} is absent: set PATHFLIP_TEST_DATA")
    return path

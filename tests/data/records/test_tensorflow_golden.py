"""Reading of records that TensorFlow and TFDS wrote (tests/golden/tensorflow, kept by the peer `tensorflow`)."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from pathflip_jax.data.records.records import Records

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize("shard", ["tensorflow.tfrecord", "pathflip-train.tfrecord-00000-of-00001"])
def test_records_of_tensorflow_hold_what_ours_do(tmp_path, shard):
    """Six slides of the golden run, written again by TensorFlow in their order and by TFDS in an order of its own."""
    shutil.copy(GOLDEN / "tensorflow" / shard, tmp_path)
    ours = Records(GOLDEN / "runs" / "0.1.0" / "records")
    expected = {slide.slide_id: slide for slide in map(ours.read, range(6))}
    records = Records(tmp_path)
    found = {slide.slide_id: slide for slide in map(records.read, range(len(records.slides)))}
    assert found.keys() == expected.keys()
    for name, slide in found.items():
        for fact in ("case_id", "encoder", "patch_size", "mpp", "width", "height"):
            assert getattr(slide, fact) == getattr(expected[name], fact)
        np.testing.assert_array_equal(slide.features, expected[name].features)
        np.testing.assert_array_equal(slide.coords, expected[name].coords)

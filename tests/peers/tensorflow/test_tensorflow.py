"""Our records read by TensorFlow's parser and by TFDS; both write the files in tests/golden/tensorflow."""

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

INPUT = Path(os.environ["PEER_INPUT"])
GOLDEN = Path(__file__).parents[2] / "golden"
RECORDS = GOLDEN / "runs" / "0.1.0" / "records"
SHARDS = ["pathflip-00000.tfrecord", "pathflip-00001.tfrecord"]
TEXTS = ("slide_id", "case_id", "encoder", "feature_dtype")
NUMBERS = ("feature_dim", "num_patches", "patch_size", "width", "height")
LISTS = ("region_rows", "region_grid", "region_crc32c")
SCHEMA = (
    {key: tf.io.FixedLenFeature([], tf.string) for key in (*TEXTS, "features", "coords")}
    | {key: tf.io.FixedLenFeature([], tf.int64) for key in NUMBERS}
    | {key: tf.io.VarLenFeature(tf.int64) for key in LISTS}
    | {"mpp": tf.io.FixedLenFeature([], tf.float32)}
)
# TFDS 4.9.10 calls a function of protobuf that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:label\\(\\) is deprecated:DeprecationWarning")


@pytest.fixture(params=["float16", "bfloat16"])
def records(request):
    """A folder of records of one dtype, and its expected content."""
    return INPUT / request.param, dict(np.load(INPUT / f"{request.param}.npz"))


def test_tensorflow_parses_every_record(records):
    folder, expected = records
    dtype = {"float16": tf.float16, "bfloat16": tf.bfloat16}[folder.name]
    found = [tf.io.parse_single_example(x, SCHEMA) for x in tf.data.TFRecordDataset([str(folder / x) for x in SHARDS])]
    assert [slide["slide_id"].numpy() for slide in found] == [b"S0", b"S1", b"S2"]
    for slide in found:
        name = slide["slide_id"].numpy().decode()
        features = tf.reshape(tf.io.decode_raw(slide["features"], dtype), [-1, slide["feature_dim"]])
        np.testing.assert_array_equal(tf.cast(features, tf.float32).numpy(), expected[f"{name}/features"])
        coords = tf.reshape(tf.io.decode_raw(slide["coords"], tf.int32), [-1, 2])
        np.testing.assert_array_equal(coords.numpy(), expected[f"{name}/coords"])
        rows = tf.sparse.to_dense(slide["region_rows"]).numpy()
        assert rows[0] == 0 and rows[-1] == slide["num_patches"] == len(coords)
        assert slide["mpp"].numpy() == 0.5 and slide["encoder"].numpy() == b"enc"


def test_tfds_opens_the_folder(records):
    folder, expected = records
    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["train"].num_examples == 3
    found = list(builder.as_dataset(split="train"))
    assert {slide["slide_id"].numpy() for slide in found} == {b"S0", b"S1", b"S2"}
    for slide in found:
        name, features = slide["slide_id"].numpy().decode(), slide["features"]
        if folder.name == "bfloat16":
            features = tf.bitcast(features, tf.bfloat16)
        np.testing.assert_array_equal(tf.cast(features, tf.float32).numpy(), expected[f"{name}/features"])
        np.testing.assert_array_equal(slide["coords"].numpy(), expected[f"{name}/coords"])


def test_tensorflow_sees_a_byte_flipped(records, tmp_path):
    data = bytearray((records[0] / SHARDS[0]).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    with pytest.raises(tf.errors.DataLossError):
        list(tf.data.TFRecordDataset(str(tmp_path / "flipped")))


def examples(path: Path) -> list[bytes]:
    """The examples of a file, sorted, their keys too: TFDS writes both in an order that changes between runs."""
    parsed = [tf.train.Example.FromString(data.numpy()) for data in tf.data.TFRecordDataset(str(path))]
    return sorted(example.SerializeToString(deterministic=True) for example in parsed)


def compare(written: Path, name: str) -> None:
    """Compare a file with the golden file, which is created if it does not exist."""
    kept = GOLDEN / "tensorflow" / name
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(written.read_bytes())
    writers = f"TensorFlow {tf.__version__}, TFDS {tfds.__version__}"
    assert examples(written) == examples(kept), (
        f"{kept}: {writers} write other values; if right, delete it and run again"
    )


def test_what_tensorflow_writes_is_the_golden_file(tmp_path):
    """The first six slides of the golden run, rewritten as tf.train.Example by TensorFlow."""
    with tf.io.TFRecordWriter(str(tmp_path / "out")) as out:
        for data in tf.data.TFRecordDataset(str(RECORDS / SHARDS[0])):
            example = tf.train.Example.FromString(data.numpy())
            again = {key: example.features.feature[key] for key in reversed(sorted(example.features.feature))}
            out.write(tf.train.Example(features=tf.train.Features(feature=again)).SerializeToString(deterministic=True))
    compare(tmp_path / "out", "tensorflow.tfrecord")


def test_what_tfds_writes_is_the_golden_file(tmp_path):
    """The same slides as a tf.data.Dataset, stored by TFDS with its own encoders."""
    source = tfds.builder_from_directory(RECORDS)
    slides = source.as_dataset(split="train[:6]", shuffle_files=False)
    builder = tfds.dataset_builders.store_as_tfds_dataset(
        "pathflip", version="1.0.0", features=source.info.features, split_datasets={"train": slides}, data_dir=tmp_path
    )
    (shard,) = Path(builder.data_path).glob("*.tfrecord*")
    compare(shard, shard.name)

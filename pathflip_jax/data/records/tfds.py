"""TFDS metadata of a records folder, which `tfds.builder_from_directory(folder)` loads with TensorFlow.

It is written here and not by TFDS, whose TFRecord writer needs TensorFlow.
"""

TENSOR = "tensorflow_datasets.core.features.tensor_feature.Tensor"
TEXT = "tensorflow_datasets.core.features.text_feature.Text"
# TFDS has no bfloat16 outside TensorFlow: such features are loaded as uint16, for tf.bitcast(x, tf.bfloat16).
STORED = {"float16": "float16", "bfloat16": "uint16"}


def _tensor(dtype: str, *shape: int, encoding: str = "none") -> dict:
    dimensions = {"dimensions": [str(size) for size in shape]} if shape else {}
    return {"pythonClassName": TENSOR, "tensor": {"shape": dimensions, "dtype": dtype, "encoding": encoding}}


def feature_schema(feature_dim: int, feature_dtype: str) -> dict:
    """Content of features.json; a size of -1 varies between slides."""
    features = {
        key: {"pythonClassName": TEXT, "text": {}} for key in ("slide_id", "case_id", "encoder", "feature_dtype")
    }
    features |= {key: _tensor("int64") for key in ("feature_dim", "num_patches", "patch_size", "width", "height")}
    features |= {
        "mpp": _tensor("float32"),
        "features": _tensor(STORED[feature_dtype], -1, feature_dim, encoding="bytes"),
        "coords": _tensor("int32", -1, 2, encoding="bytes"),
        "region_rows": _tensor("int64", -1),
        "region_grid": _tensor("int64", -1, 2),
        "region_crc32c": _tensor("int64", -1),
    }
    return {
        "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": {"features": features},
    }


def dataset_info(shard_lengths: list[int], num_bytes: int) -> dict:
    """Content of dataset_info.json, with one TFDS split `train`, as our splits are a column of a slide table."""
    return {
        "name": "pathflip",
        "version": "1.0.0",
        "description": "Patch features of whole slide images, stored region by region. For research use only.",
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": "train",
                "filepathTemplate": "{DATASET}-{SHARD_INDEX}.{FILEFORMAT}",
                "numBytes": str(num_bytes),
                "shardLengths": [str(length) for length in shard_lengths],
            }
        ],
    }

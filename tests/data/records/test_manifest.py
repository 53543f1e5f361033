"""Manifest of a folder of records: a mismatch is refused with the file and the cure."""

import json
import shutil

import numpy as np
import pytest

from pathflip_jax.commands.data_checks import examine_data
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.index import index_path
from pathflip_jax.data.records.records import (
    Records,
    find_shards,
    finish_folder,
    manifest_hash,
    shard_name,
    write_shard,
)
from pathflip_jax.data.records.verify import verify


def write(folder, *names, number=0, scale=1.0):
    """A shard of slides of four patches, whose size follows from their number alone."""
    coords = np.stack(np.meshgrid(np.arange(2), np.arange(2)), -1).reshape(-1, 2).astype(np.int32) * 64
    features = np.arange(12, dtype=np.float32).reshape(4, 3) * scale
    slides = [SlideFeatures(name, f"P{name}", features + i, coords, 64, 0.5, 128, 128) for i, name in enumerate(names)]
    folder.mkdir(exist_ok=True)
    write_shard(folder / shard_name(number), slides, edge_um=64.0)
    return folder / shard_name(number)


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        write(tmp_path / "r", f"A{number}", f"B{number}", number=number)
    finish_folder(tmp_path / "r", edge_um=64.0)
    return tmp_path / "r"


def refused(folder, *words):
    """Opening fails with a message that has these words, and doctor says the same without opening."""
    with pytest.raises(ValueError) as error:
        Records(folder)
    message = str(error.value)
    assert all(word in message for word in (*words, str(folder))), message
    faults = verify(folder)
    assert any(message.startswith(fault) for fault in faults), faults
    found = [finding for finding in examine_data(folder, None, None, None) if finding.state == "fault"]
    assert len(found) == len(faults)


@pytest.mark.parametrize("number", [1, 2])
def test_a_shard_that_is_missing(folder, number):
    """Of the last one no gap in the numbers tells."""
    shard = folder / shard_name(number)
    shard.unlink()
    index_path(shard).unlink()
    refused(folder, f"{shard}: listed in manifest.json but missing: 2 shards found, 3 listed", "pathflip prepare")


def test_shards_that_are_missing_are_counted(folder):
    for number in (0, 2):
        (folder / shard_name(number)).unlink()
    with pytest.raises(ValueError, match="1 more of its shards .*doctor --records"):
        Records(folder)


def test_a_shard_under_another_name(folder):
    for suffix in ("", ".idx"):
        (folder / f"{shard_name(1)}{suffix}").rename(folder / f"pathflip-1.tfrecord{suffix}")
    refused(folder, f"{shard_name(1)}: listed", "if pathflip-1.tfrecord, of the same size, is this shard, rename it")


def test_a_shard_that_is_left_of_another_cohort(folder, tmp_path):
    shard = write(tmp_path / "other", "C0", number=3)
    for path in (shard, index_path(shard)):
        shutil.copy(path, folder)
    refused(folder, f"{folder / shard.name}: not in manifest.json, which lists 3 shards", "remove it and its .idx")


def test_a_shard_of_another_size(folder, tmp_path):
    size = (folder / shard_name(1)).stat().st_size
    shard = write(folder, "A1", number=1)
    refused(folder, f"{shard}: not the shard", f": {shard.stat().st_size} bytes, expected {size}")


def test_a_shard_of_the_same_size_with_its_own_index(folder):
    """The slides of one cohort through two encoders of one width."""
    size = (folder / shard_name(1)).stat().st_size
    for scale in range(2, 100):  # CRCs are numbers of 4 or 5 bytes
        shard = write(folder, "A1", "B1", number=1, scale=scale)
        if shard.stat().st_size == size:
            break
    refused(folder, f"{shard}: not the shard that manifest.json describes: 2 slides and CRC32C", "copy it again")


def test_files_with_a_dot_before_their_name_are_no_shards(folder):
    (folder / f"._{shard_name(0)}").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    (folder / f".{shard_name(0)}").write_bytes(b"half of a copy")
    assert len(Records(folder)) == 6 and len(find_shards(folder)) == 3 and verify(folder) == []


def test_a_folder_that_is_not_finished_is_warned_of(folder, caplog):
    (folder / "manifest.json").unlink()
    (folder / shard_name(2)).unlink()
    records = Records(folder)
    assert len(records) == 4 and records.manifest is None
    assert f"{folder}: no manifest.json, so missing shards cannot be detected" in caplog.text
    finish_folder(folder, edge_um=64.0)
    assert len(Records(folder)) == 4


def test_shards_named_one_by_one_are_taken_as_they_are(folder, caplog):
    (folder / shard_name(2)).unlink()
    assert len(Records([folder / shard_name(0)])) == 2 and not caplog.text


def test_a_finished_folder_is_finished_again_after_a_change(folder):
    write(folder, "C0", number=3)
    assert finish_folder(folder, edge_um=64.0)["num_slides"] == 7 == len(Records(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, expected 1"),
        ({"shards": 3}, "not a manifest"),
        ({"shards": [{"name": shard_name(0), "bytes": "1", "crc32c": "0", "slides": []}]}, "not a manifest"),
    ],
)
def test_a_manifest_of_something_else(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        Records(folder)


def test_the_hash_of_open_records_is_that_of_the_folder(folder, monkeypatch):
    records, expected = Records(folder), json.loads((folder / "manifest.json").read_text())["sha256"]
    monkeypatch.setattr("pathflip_jax.data.records.records.read_indexes", None)  # nothing is read again
    assert manifest_hash(records) == expected


def test_doctor_holds_the_hash_against_the_shards(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "0" * 64}))
    (fault,) = verify(folder)
    assert fault.startswith(f"{path}: its sha256 does not match its shards; delete it")

"""Embedding an archive: rows are the predictor's own, a kill costs little, two jobs never mix, faults are named."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx

from pathflip_jax import cli
from pathflip_jax.commands.options import FAILED_SLIDES
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.recipe import write_recipe
from pathflip_jax.data.records.records import Records, finish_folder, manifest_hash, shard_name, write_shard
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.inference import embed, embedding_files, load
from pathflip_jax.inference import predictor as inference
from pathflip_jax.inference.language_run import read_aligner
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.runs.folder import save_run

CONFIG = PathFLIPConfig(
    feature_dim=16, embed_dim=12, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2, vocab_size=200,
    max_positions=128, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
)  # fmt: skip
IDS = [f"S{number:02d}" for number in range(24)]


def make_run(folder, cohort, seed=0, encoder="tiny", **more):
    data = {"encoder": encoder, "cut": "grid", "edge_um": 64.0, "edge_px": None, "caption_length": 96} | more
    save_run(folder, PathFLIP(CONFIG, nnx.Rngs(seed)), {"data": data}, TextTokenizer(cohort.vocabulary))
    return folder


@pytest.fixture(scope="module")
def run(tiny_cohort, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_cohort)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embed, "PART_SLIDES", 5)


@pytest.fixture
def reads(monkeypatch):
    """The slides that are read, in no order."""
    found, read = [], Records.read

    def spy(records, position):
        found.append(records.slides[position].slide_id)
        return read(records, position)

    monkeypatch.setattr(Records, "read", spy)
    return found


def vectors(column, width):
    """A column of fixed-size lists as an array."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, width)


def flip(records, slide_id):
    """Change one byte of a slide's features."""
    info = next(info for info in Records(records).slides if info.slide_id == slide_id)
    with open(info.shard, "r+b") as file:
        file.seek(info.features_offset + 3)
        byte = file.read(1)[0]
        file.seek(info.features_offset + 3)
        file.write(bytes([byte ^ 1]))


def test_rows_are_the_predictors_own_in_the_order_of_the_records(tiny_cohort, run, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_files, "ROW_GROUP_BYTES", 3000)
    out = tmp_path / "deep" / "embeddings.parquet"
    report = embed.embed(run, tiny_cohort.records, out, regions=True, batch_size=4)
    assert report.done == IDS and report.finished and report.slides_per_second > 0
    assert [path.name for path in out.parent.iterdir()] == ["embeddings.parquet"]
    table, records, predictor = pq.read_table(out), Records(tiny_cohort.records), load.load(run)
    assert table["slide_id"].to_pylist() == [info.slide_id for info in records.slides]
    assert table["case_id"].to_pylist() == [info.case_id for info in records.slides]
    assert table["num_patches"].to_pylist() == [info.num_patches for info in records.slides]
    assert pq.read_metadata(out).num_row_groups > 1
    slides = vectors(table["embedding"], 12)
    assert np.abs(np.linalg.norm(slides, axis=1) - 1).max() > 0.1, "was normalised"
    for position, row in enumerate(table.to_pylist()):
        expected = predictor.encode_slide(records.read(position))
        assert slides[position] == pytest.approx(expected.slide, abs=1e-5)
        assert np.array(row["regions"]) == pytest.approx(expected.regions, abs=1e-5)
        assert row["region_grid"] == expected.grid.tolist() and row["num_regions"] == len(expected.grid)


def test_the_file_says_what_it_is_of(tiny_cohort, run, tmp_path):
    out = tmp_path / "test.parquet"
    options = ["--slides", str(tiny_cohort.slides), "--split", "test"]
    command = ["embed", str(tiny_cohort.records), "--checkpoint", str(run), "--out", str(out), *options]
    assert cli.main(command) == 0
    schema = pq.read_schema(out)
    assert schema.names == ["slide_id", "case_id", "embedding", "num_patches", "num_regions"]
    assert pq.read_table(out)["slide_id"].to_pylist() == IDS[18:]
    about = json.loads(schema.metadata[embedding_files.METADATA])
    assert about["records_hash"] == manifest_hash(tiny_cohort.records)
    assert about["checkpoint_hash"] == embed.checkpoint_hash(load.load(run))
    expected = {"format": 1, "encoder": "tiny", "split": "test", "embed_dim": 12, "normalised": False, "failed": []}
    assert {name: about[name] for name in expected} == expected
    assert about["checkpoint"] == str(run) and {"jax", "pathflip-jax"} <= set(about["versions"])


KILLED = """
import os, signal, sys
from pathflip_jax import cli; from pathflip_jax.inference import embed
write, written = embed.write_table, []
def write_two(path, tables):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, tables)
    written.append(path)
embed.write_table, embed.PART_SLIDES = write_two, 5
cli.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_with_the_rest(tiny_cohort, run, tmp_path, reads, capsys):
    out = tmp_path / "embeddings.parquet"
    command = ["embed", str(tiny_cohort.records), "--checkpoint", str(run), "--out", str(out), "--json"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists() and len(list(embed.partial_path(out).glob("*.parquet"))) == 2
    assert cli.main(command) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["done"], outcome["skipped"]) == (IDS[10:], IDS[:10])
    assert sorted(reads) == IDS[10:]
    whole = tmp_path / "whole.parquet"
    embed.embed(run, tiny_cohort.records, whole)
    found, expected = pq.read_table(out), pq.read_table(whole)
    assert found["slide_id"].to_pylist() == IDS
    assert vectors(found["embedding"], 12) == pytest.approx(vectors(expected["embedding"], 12), abs=1e-5)
    assert not embed.partial_path(out).exists()
    reads.clear()
    assert cli.main(command) == 0 and reads == []


def test_a_kill_after_the_last_rename_costs_nothing(tiny_cohort, run, tmp_path, reads, monkeypatch):
    out = tmp_path / "embeddings.parquet"
    monkeypatch.setattr(embed.shutil, "rmtree", lambda *_, **__: sys.exit("killed"))
    with pytest.raises(SystemExit):
        embed.embed(run, tiny_cohort.records, out)
    monkeypatch.undo()
    before = pq.read_table(out)
    reads.clear()
    assert embed.embed(run, tiny_cohort.records, out).skipped == IDS
    assert reads == [] and pq.read_table(out).equals(before) and not embed.partial_path(out).exists()


@pytest.mark.parametrize("stage", ["whole", "partial"])
def test_another_job_is_refused_by_both_hashes(tiny_cohort, run, tmp_path, stage, monkeypatch):
    out = tmp_path / "embeddings.parquet"
    if stage == "partial":
        monkeypatch.setattr(embedding_files.pq, "read_metadata", None)  # the join fails, the parts stay
        with pytest.raises(TypeError):
            embed.embed(run, tiny_cohort.records, out)
        monkeypatch.undo()
    else:
        embed.embed(run, tiny_cohort.records, out)
    other_run = make_run(tmp_path / "other", tiny_cohort, seed=1)
    hashes = [embed.checkpoint_hash(load.load(folder))[:12] for folder in (run, other_run)]
    with pytest.raises(ValueError, match=rf"another checkpoint {hashes[0]} \(.*tiny\), now {hashes[1]} \(.*other\)"):
        embed.embed(other_run, tiny_cohort.records, out)
    other = tmp_path / "records"
    other.mkdir()
    slides = Records(tiny_cohort.records)
    write_shard(other / shard_name(0), [slides.read(i) for i in range(3)], edge_um=64.0)
    hashes = [manifest_hash(folder)[:12] for folder in (tiny_cohort.records, other)]
    with pytest.raises(ValueError, match=rf"records {hashes[0]} \(.*\), now {hashes[1]}"):
        embed.embed(run, other, out)
    with pytest.raises(ValueError, match=r"--regions False, now True"):
        embed.embed(run, tiny_cohort.records, out, regions=True)
    with pytest.raises(ValueError, match=r"selection of slides .* \(all\), now .* \(val\)"):
        embed.embed(run, tiny_cohort.records, out, slides_table=tiny_cohort.slides, split="val")


def test_a_flipped_byte_costs_its_slide_until_it_is_mended(tiny_cohort, run, tmp_path, reads, capsys):
    records, out = tiny_cohort.copy_records(), tmp_path / "embeddings.parquet"
    flip(records, "S07")
    command = ["embed", str(records), "--checkpoint", str(run), "--out", str(out), "--regions"]
    assert cli.main(command) == FAILED_SLIDES
    assert "S07" in capsys.readouterr().out
    rest = [name for name in IDS if name != "S07"]
    assert pq.read_table(out)["slide_id"].to_pylist() == rest
    assert json.loads(pq.read_schema(out).metadata[embedding_files.METADATA])["failed"] == ["S07"]
    (failure,) = json.loads(embed.failures_path(out).read_text())
    assert failure["slide"] == "S07" and failure["file"].endswith("pathflip-00000.tfrecord")
    assert "S07" in failure["error"]
    before = out.read_bytes()
    assert cli.main(command) == FAILED_SLIDES and out.read_bytes() == before
    flip(records, "S07")
    reads.clear()
    assert cli.main(command) == 0 and reads == ["S07"]
    found = pq.read_table(out)
    assert found["slide_id"].to_pylist() == IDS and not embed.failures_path(out).exists()
    expected = load.load(run).encode_slide(Records(records).read(7))
    assert np.array(found["regions"][7].as_py()) == pytest.approx(expected.regions, abs=1e-5)
    assert json.loads(pq.read_schema(out).metadata[embedding_files.METADATA])["failed"] == []


def test_strict_stops_and_keeps_what_is_done(tiny_cohort, run, tmp_path, capsys):
    records, out = tiny_cohort.copy_records(), tmp_path / "embeddings.parquet"
    flip(records, "S07")
    command = ["embed", str(records), "--checkpoint", str(run), "--out", str(out)]
    assert cli.main([*command, "--strict"]) == FAILED_SLIDES
    assert not out.exists() and "--strict" in capsys.readouterr().out
    flip(records, "S07")
    assert cli.main([*command, "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert (outcome["skipped"], outcome["done"]) == (IDS[:7], IDS[7:])
    assert pq.read_table(out)["slide_id"].to_pylist() == IDS


def test_slides_of_the_table_without_a_record_are_failures(tiny_cohort, run, tmp_path):
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,split\nS03,test\nS99,test\ns01.svs,test\nS02,val\n")
    report = embed.embed(
        run, tiny_cohort.records, tmp_path / "e.parquet", slides_table=table, split="test", strict=False
    )
    assert report.done == ["S01", "S03"]
    assert any("spelt differently from the slides (s01 is slide S01)" in note for note in report.notes)
    assert [(f.slide, "not among" in f.error) for f in report.failed] == [("S99", True)]


def test_a_fold_of_a_table_chooses_the_slides(tiny_cohort, run, tmp_path, task_of_folds, capsys):
    command = ["embed", str(tiny_cohort.records), "--checkpoint", str(run), "--slides", str(task_of_folds)]
    command += ["--split", "test", "--out", str(tmp_path / "e.parquet"), "--json"]
    assert cli.main(command) == cli.WRONG_INPUT and "choose one with --fold" in capsys.readouterr().err
    assert cli.main([*command, "--fold", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == IDS[12:18]


def test_a_model_of_infinite_answers_is_no_embedding(tiny_cohort, run, tmp_path, monkeypatch):
    encode = inference.Predictor.encode_slides

    def spoil(predictor, slides, batch_size):
        for found in encode(predictor, slides, batch_size):
            yield found._replace(slide=found.slide * np.nan) if found.slide_id == "S04" else found

    monkeypatch.setattr(inference.Predictor, "encode_slides", spoil)
    report = embed.embed(run, tiny_cohort.records, tmp_path / "e.parquet")
    assert [(f.slide, "not finite" in f.error) for f in report.failed] == [("S04", True)]
    assert report.done == [name for name in IDS if name != "S04"]


def test_wrong_input_is_refused_at_the_start(tiny_cohort, run, tmp_path, reads):
    out = tmp_path / "e.parquet"
    with pytest.raises(ValueError, match=r"'tiny'.*trained on 'other'"):
        embed.embed(make_run(tmp_path / "other", tiny_cohort, encoder="other"), tiny_cohort.records, out)
    with pytest.raises(ValueError, match=r"add --slides"):
        embed.embed(run, tiny_cohort.records, out, split="test")
    with pytest.raises(ValueError, match=r"batch size 0"):
        embed.embed(run, tiny_cohort.records, out, batch_size=0)
    with pytest.raises(ValueError, match=r"is a folder"):
        embed.embed(run, tiny_cohort.records, tmp_path)
    with pytest.raises(ValueError, match=r"e\.h5: embeddings are written as Parquet; name the file e\.parquet"):
        embed.embed(run, tiny_cohort.records, tmp_path / "e.h5")
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,split\nX1,test\n")
    with pytest.raises(ValueError, match=r"none of its 1 slides \(X1\)"):
        embed.embed(run, tiny_cohort.records, out, slides_table=table)
    with pytest.raises(ValueError, match=r"no slide is in split 'val'; the splits are test"):
        embed.embed(run, tiny_cohort.records, out, slides_table=table, split="val")
    out.write_text("slide_id,embedding\n")
    with pytest.raises(ValueError, match=r"e\.parquet: not a valid file of embeddings"):
        embed.embed(run, tiny_cohort.records, out)
    assert out.read_text() == "slide_id,embedding\n" and reads == []


def test_a_damaged_file_is_named(tiny_cohort, run, tmp_path):
    out = tmp_path / "embeddings.parquet"
    embed.embed(run, tiny_cohort.records, out, slides_table=tiny_cohort.slides, split="test")
    ids, data = pq.read_metadata(out).row_group(0).column(0), bytearray(out.read_bytes())
    data[ids.data_page_offset + ids.total_compressed_size - 1] ^= 1
    out.write_bytes(data)
    with pytest.raises(ValueError, match=r"embeddings\.parquet: damaged .*embedded again"):
        embed.embed(run, tiny_cohort.records, out, slides_table=tiny_cohort.slides, split="test")


def test_slides_of_many_sizes_compile_a_few_times(tiny_cohort, run, tmp_path):
    """34 slides of 8 sizes in batches of 4: two padded sizes, and the two slides left over at the end."""
    records, rng, slides = tmp_path / "records", np.random.default_rng(0), []
    records.mkdir()
    for number in range(34):
        count = 9 + number % 8  # regions of one patch
        coords = np.stack([np.arange(count) * 128, np.zeros(count)], axis=1).astype(np.int32)
        features = rng.normal(size=(count, 16)).astype(np.float32)
        slides.append(SlideFeatures(f"N{number:02d}", "", features, coords, 64, 0.5, encoder="tiny"))
    write_shard(records / shard_name(0), slides, edge_um=64.0)
    finish_folder(records, edge_um=64.0)
    compiled = [inference._encode_slides._cache_size()]
    for name in ("first", "again"):
        assert len(embed.embed(run, records, tmp_path / name, batch_size=4).done) == 34
        compiled.append(inference._encode_slides._cache_size())
    assert np.diff(compiled).tolist() == [3, 0]


def test_records_of_another_recipe_are_refused_at_the_start(tiny_cohort, tmp_path, reads):
    """By every command that opens records, and by training on them."""
    recipe = FeatureRecipe(encoder="tiny", weights="34cd" * 16)
    run = make_run(tmp_path / "run", tiny_cohort, recipe=recipe.to_dict())
    folder = shutil.copytree(tiny_cohort.records, tmp_path / "records")
    out = tmp_path / "e.parquet"
    write_recipe(folder, replace(recipe, weights="12ab" * 16))
    message = r"records: .* trained on: they differ in weights \(12ab12ab12ab…, not 34cd34cd34cd…\)"
    with pytest.raises(ValueError, match=message):
        embed.embed(run, folder, out)
    with pytest.raises(ValueError, match=message):
        read_aligner(str(run), Records(folder), str(folder))
    assert not reads and not out.exists()
    for place in (folder, folder / shard_name(0)):  # as `ground`, `caption` and `ask` read a slide
        with pytest.raises(ValueError, match="slide S00: .* they differ in weights"):
            load.load(run).encode_slide(load.read_slide(place, "S00"))
    reads.clear()
    for known in (recipe, replace(recipe, weights="")):
        write_recipe(folder, known)
        assert embed.embed(run, folder, out).finished

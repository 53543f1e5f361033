"""AnnData files of embeddings: read by anndata itself, with the values, centres and table columns of each level."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx

from pathflip_jax import cli
from pathflip_jax.data.records.records import Records
from pathflip_jax.data.storage.atomic_files import atomic_path
from pathflip_jax.data.texts.tokenizer import TextTokenizer
from pathflip_jax.inference import anndata_file
from pathflip_jax.inference.anndata_file import embed_anndata
from pathflip_jax.inference.load import load
from pathflip_jax.model.config import PathFLIP2Config, PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.model.pathflip2 import PathFLIP2
from pathflip_jax.runs.folder import save_run

CONFIG = PathFLIPConfig(
    feature_dim=16, embed_dim=12, hidden=16, layers=1, heads=2, intermediate=16, num_queries=2, vocab_size=200,
    max_positions=128, region_layers=1, region_heads=2, text_region_heads=2, init="fan_in",
)  # fmt: skip
IDS = [f"S{number:02d}" for number in range(24)]


def make_run(folder, cohort, model, **more):
    data = {"encoder": "tiny", "cut": "grid", "edge_um": 64.0, "edge_px": None, "caption_length": 96} | more
    save_run(folder, model, {"data": data}, TextTokenizer(cohort.vocabulary))
    return folder


@pytest.fixture(scope="module")
def run(tiny_cohort, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_cohort, PathFLIP(CONFIG, nnx.Rngs(0)))


@pytest.fixture
def anndata():
    return pytest.importorskip("anndata", reason="needs anndata: pip install pathflip-jax[anndata]")


def test_slides_with_the_columns_of_their_table(anndata, tiny_cohort, run, tmp_path, capsys):
    table = tmp_path / "slides.csv"
    lines = tiny_cohort.slides.read_text().splitlines()
    rows = [f"{line},{'' if i == 3 else 40 + i},00{i},," for i, line in enumerate(lines[1:])]
    table.write_text("\n".join([f"{lines[0]},age,code,stain/batch,empty", *rows]) + "\n")
    out = tmp_path / "e.h5ad"
    command = ["embed", str(tiny_cohort.records), "--checkpoint", str(run), "--slides", str(table)]
    assert cli.main([*command, "--split", "test", "--out", str(out)]) == 0
    assert "e.h5ad: 6 observations (slide) of 6 slides; also kept in e.parquet" in capsys.readouterr().out
    found, kept = anndata.read_h5ad(out), pq.read_table(tmp_path / "e.parquet")
    assert list(found.obs_names) == list(found.obs["slide_id"]) == IDS[18:]
    assert found.X.dtype == np.float32 and np.array_equal(found.X, np.stack(kept["embedding"].to_numpy()))
    assert list(found.obs["label"]) == ["solid", "glandular"] * 3 and set(found.obs["split"]) == {"test"}
    assert found.obs["age"].tolist() == [58.0, 59.0, 60.0, 61.0, 62.0, 63.0]
    assert found.obs["code"].tolist() == [f"00{i}" for i in range(18, 24)] and "empty" not in found.obs
    assert found.obs["num_patches"].tolist() == kept["num_patches"].to_pylist() and "spatial" not in found.obsm
    facts = found.uns["pathflip"]
    assert facts["encoder"] == "tiny" and facts["checkpoint"] == str(run) and facts["level"] == "slide"
    assert len(facts["checkpoint_hash"]) == 64 and facts["edge_um"] == 64.0 and "edge_px" not in facts


def test_regions_lie_at_the_centres_of_their_squares(anndata, tiny_cohort, run, tmp_path):
    report = embed_anndata(run, tiny_cohort.records, tmp_path / "e.h5ad", level="region")
    assert report.finished and report.done == IDS
    found, predictor, records = anndata.read_h5ad(tmp_path / "e.h5ad"), load(run), Records(tiny_cohort.records)
    start = 0
    for number, slide_id in enumerate(IDS):
        slide = records.read(number)
        embedding = predictor.encode_slide(slide)
        own = found[start : start + len(embedding.regions)]
        assert set(own.obs["slide_id"]) == {slide_id} and own.obs_names[0] == f"{slide_id}:0"
        np.testing.assert_allclose(own.X, embedding.regions, atol=1e-5)
        centres = own.obsm["spatial"]
        for centre, patches in zip(centres, predictor.region_patches(slide), strict=True):
            # regions of 64 um are squares of 2 patches of 64 px at 0.5 um: their patches lie around the centre
            corners = slide.coords[patches[patches >= 0]]
            assert (np.abs(corners + 32 - centre) == 32).all()
        start += len(own)
    assert start == found.n_obs and found.obsm["spatial"].shape == (start, 2)
    assert found.obs["region_column"].dtype.kind == "i"


def test_regions_of_scanned_patches(anndata, tiny_cohort, tmp_path):
    run = make_run(tmp_path / "scan", tiny_cohort, PathFLIP(CONFIG, nnx.Rngs(0)), cut="scan")
    embed_anndata(run, tiny_cohort.records, tmp_path / "e.h5ad", level="region")
    found, first = anndata.read_h5ad(tmp_path / "e.h5ad"), Records(tiny_cohort.records).read(0)
    assert found.n_obs == 24 and "region_column" not in found.obs  # at most 30 patches a slide
    centre = (first.coords.min(0) + first.coords.max(0) + 64) / 2
    assert found.obsm["spatial"][0].tolist() == centre.tolist()


def test_patches_are_the_features_of_the_records_where_a_run_embeds_none(anndata, tiny_cohort, run, tmp_path, capsys):
    out = tmp_path / "e.h5ad"
    command = ["embed", str(tiny_cohort.records), "--checkpoint", str(run), "--level", "patch", "--out", str(out)]
    assert cli.main(command) == 0
    assert "not patches: X holds the features of tiny" in capsys.readouterr().out
    found, records = anndata.read_h5ad(out), Records(tiny_cohort.records)
    slides = [records.read(number) for number in range(24)]
    assert np.array_equal(found.X, np.concatenate([slide.features for slide in slides]).astype(np.float32))
    assert np.array_equal(found.obsm["spatial"], np.concatenate([slide.coords + 32 for slide in slides]))
    assert found.uns["pathflip"]["values"] == "features" and not (tmp_path / "e.parquet").exists()
    assert found.obs["patch_size"].unique().tolist() == [64.0] and found.obs["mpp"].unique().tolist() == [0.5]
    assert list(found.obs_names[:2]) == ["S00:0", "S00:1"] and found.obs_names.is_unique


def test_patches_of_pathflip2_are_embedded(anndata, tiny_cohort, tmp_path):
    config = PathFLIP2Config(
        feature_dim=16, embed_dim=12, hidden=16, layers=1, heads=2, intermediate=16, vocab_size=200, max_positions=128,
        token_heads=2, text_region_heads=2, top_k=4, tokens=4,
    )  # fmt: skip
    run = make_run(tmp_path / "two", tiny_cohort, PathFLIP2(config, nnx.Rngs(0)))
    table = tmp_path / "slides.csv"
    table.write_text("slide_id\nS05\nS02\n")
    embed_anndata(run, tiny_cohort.records, tmp_path / "e.h5ad", level="patch", slides_table=table)
    found, predictor = anndata.read_h5ad(tmp_path / "e.h5ad"), load(run)
    slides = [Records(tiny_cohort.records).read(number) for number in (2, 5)]
    np.testing.assert_allclose(
        found.X, np.concatenate([predictor.encode_slide(slide).regions for slide in slides]), atol=1e-5
    )
    assert np.array_equal(found.obsm["spatial"], np.concatenate([slide.coords + 32 for slide in slides]))
    assert found.uns["pathflip"]["values"] == "embeddings"
    with pytest.raises(ValueError, match="embeds slides and patches, not regions; choose level patch"):
        embed_anndata(run, tiny_cohort.records, tmp_path / "r.h5ad", level="region")


def test_another_table_needs_no_new_embeddings(anndata, tiny_cohort, run, tmp_path):
    out = tmp_path / "e.h5ad"
    assert len(embed_anndata(run, tiny_cohort.records, out).done) == 24
    assert "label" not in anndata.read_h5ad(out).obs
    report = embed_anndata(run, tiny_cohort.records, out, slides_table=tiny_cohort.slides)
    assert (report.done, report.skipped) == ([], IDS) and "label" in anndata.read_h5ad(out).obs


@pytest.mark.parametrize("level", ["slide", "patch"])
def test_a_bad_slide_is_reported_and_the_others_are_written(anndata, tiny_cohort, run, tmp_path, level):
    records = tiny_cohort.copy_records()
    info = Records(records).slides[4]
    with open(info.shard, "r+b") as file:
        file.seek(info.features_offset + 3)
        byte = file.read(1)[0]
        file.seek(info.features_offset + 3)
        file.write(bytes([byte ^ 1]))
    out = tmp_path / "e.h5ad"
    report = embed_anndata(run, records, out, level=level)
    assert [failure.slide for failure in report.failed] == ["S04"] and len(report.done) == 23
    assert "S04" not in set(anndata.read_h5ad(out).obs["slide_id"])
    (listed,) = [path for path in tmp_path.iterdir() if path.name.endswith(".failures.json")]
    assert json.loads(listed.read_text())[0]["slide"] == "S04"
    out.unlink()
    if level == "patch":
        with pytest.raises(ValueError, match="S04"):
            embed_anndata(run, records, out, level=level, strict=True)
        assert not out.exists() and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["--out", "e.parquet", "--level", "slide"], "--level is for AnnData files: name the file e.h5ad"),
        (["--out", "e.h5ad", "--level", "patch", "--regions"], "--regions contradicts --level patch"),
    ],
)
def test_levels_that_do_not_fit(tiny_cohort, run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    command = ["embed", str(tiny_cohort.records), "--checkpoint", str(run), *options]
    assert cli.main(command) == cli.WRONG_INPUT and message in capsys.readouterr().err
    assert not list(Path().iterdir())


def test_without_anndata_the_extra_is_named(tiny_cohort, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "anndata", None)
    command = ["embed", str(tiny_cohort.records), "--checkpoint", str(run), "--out", str(tmp_path / "e.h5ad")]
    assert cli.main(command) == cli.WRONG_INPUT
    assert ".h5ad files need anndata: pip install 'pathflip-jax[anndata]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "values, found",
    [
        (["1", "", "2.5e-3"], [1.0, np.nan, 0.0025]),
        (["01", "2"], ["01", "2"]),
        (["1", "x"], ["1", "x"]),
        (["-0.5", "NA"], [-0.5, np.nan]),
    ],
)
def test_numbers_in_tables(values, found):
    np.testing.assert_equal(anndata_file._numbers(values), found)


def test_a_file_of_another_library_appears_whole_or_not_at_all(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("whole")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "whole"
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "whole"

"""encoder.json of prepared and imported folders, and notes on features that contradict their encoder's publication."""

import json

import h5py
import numpy as np
import pytest
import tifffile

from data_prep import build, jobs, recipe
from data_prep.encoders import StainTexture
from data_prep.settings import ImportSettings, PrepareSettings
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.records.recipe import RECIPE, read_recipe, write_recipe
from pathflip_jax.data.records.records import Records

SMALL = {"patch_size": 64, "edge_um": 64.0, "workers": 1}


class Network(StainTexture):
    """An encoder with weights."""

    weights, transform = "12ab" * 16, {"resize": 224, "crop": 224, "filter": "bicubic", "mean": (0.5, 0.5, 0.5)}

    def recipe_facts(self):
        return {"weights": self.weights, "transform": self.transform, "pooling": "class", "precision": "bfloat16"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """No worker processes; what a process remembers of its encoder and folder is forgotten with each run."""

    def run_each(work, some, workers):
        jobs._loaded.cache_clear()
        recipe._claim.cache_clear()
        return ((job, work(job)) for job in some)

    monkeypatch.setattr(build, "run_each", run_each)
    yield
    jobs._loaded.cache_clear()


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(jobs, "load_encoder", lambda name, half, weights: Network())
    return Network


@pytest.fixture
def slides(tmp_path):
    (tmp_path / "slides").mkdir()
    for number in range(2):
        image = np.random.default_rng(number).integers(90, 200, (256, 256, 3)).astype(np.uint8)
        image[:, :, 1] //= 2
        image[192:] = 242
        options = {"photometric": "rgb", "tile": (128, 128), "metadata": None}
        path = tmp_path / f"slides/S{number}.tiff"
        tifffile.imwrite(path, image, resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **options)
    return tmp_path / "slides"


def prepare(slides, out, **settings):
    return build.prepare(slides, out, PrepareSettings(**SMALL | settings))


def test_prepare_writes_the_recipe_of_the_encoder(slides, network, tmp_path):
    assert prepare(slides, tmp_path / "out").done == ["S0", "S1"]
    assert read_recipe(tmp_path / "out") == Records(tmp_path / "out").recipe == FeatureRecipe(
        encoder="stain_texture", weights="12ab" * 16, transform=Network.transform, pooling="class",
        precision="bfloat16", feature_dim=175, patch_size=64, mpp=0.5, source="prepare",
    )  # fmt: skip


def test_the_built_in_encoder_states_its_version(slides, tmp_path):
    prepare(slides, tmp_path / "out")
    assert read_recipe(tmp_path / "out").to_dict() == {
        "encoder": "stain_texture", "encoder_version": "1", "precision": "float32", "feature_dim": 175,
        "patch_size": 64, "mpp": 0.5, "patch_um": 32.0, "source": "prepare",
    }  # fmt: skip


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
def test_other_weights_are_refused_in_a_folder_that_has_records(slides, network, tmp_path, monkeypatch, shard):
    """By a second run, which has new slides, and by a task of a job array."""
    out = tmp_path / "out"
    prepare(slides / "S0.tiff", out, slides_per_shard=1)
    before = (out / RECIPE).read_bytes()
    monkeypatch.setattr(network, "weights", "34cd" * 16)
    message = r"encoder.json: .*differ in weights \(34cd34cd34cd…, not 12ab12ab12ab…\); choose another --out"
    with pytest.raises(ValueError, match=message):
        prepare(slides, out, slides_per_shard=1, shard=shard)
    assert (out / RECIPE).read_bytes() == before and not (out / "pathflip-00001.tfrecord").exists()
    monkeypatch.setattr(network, "weights", "12ab" * 16)
    assert prepare(slides, out, slides_per_shard=1, shard=shard).done == ["S1"]


def test_a_task_of_a_job_array_that_starts_first_binds_the_others(slides, network, tmp_path):
    first = FeatureRecipe(encoder="stain_texture", weights="34cd" * 16)
    write_recipe(tmp_path / "out", first)  # it has no record yet
    with pytest.raises(ValueError, match="differ in weights"):
        prepare(slides, tmp_path / "out", shard=(0, 2))
    assert read_recipe(tmp_path / "out") == first


def test_a_folder_without_records_is_free_again(slides, network, tmp_path):
    write_recipe(tmp_path / "out", FeatureRecipe(weights="34cd" * 16))
    assert prepare(slides, tmp_path / "out").done == ["S0", "S1"]
    assert read_recipe(tmp_path / "out").weights == "12ab" * 16


def test_every_process_claims_the_folder(slides, network, tmp_path, monkeypatch):
    """As on machines of a cluster, whose weights may differ."""
    prepare(slides / "S0.tiff", tmp_path / "out")
    job = jobs.Job(
        "S1", "", slides / "S1.tiff", tmp_path / "out/x.tfrecord", tmp_path / "p", PrepareSettings(**SMALL).of_records()
    )
    assert not jobs.try_encoder(job).error
    recipe._claim.cache_clear()
    monkeypatch.setattr(network, "weights", "34cd" * 16)
    outcome = jobs.try_encoder(job)
    assert outcome.fatal and "differ in weights" in outcome.error


def test_a_folder_of_an_earlier_version_goes_on_without_a_recipe(slides, network, tmp_path):
    prepare(slides / "S0.tiff", tmp_path / "out")
    (tmp_path / "out" / RECIPE).unlink()
    assert prepare(slides, tmp_path / "out").done == ["S1"]
    assert read_recipe(tmp_path / "out") is None


def test_a_damaged_recipe_stops_the_run(slides, tmp_path):
    prepare(slides / "S0.tiff", tmp_path / "out")
    (tmp_path / "out" / RECIPE).write_text('{"version": 1, "mpp": "fine"}')
    with pytest.raises(ValueError, match="encoder.json: not the recipe of features"):
        prepare(slides, tmp_path / "out")


def write(path, *, encoder="uni_v1", width=1024, size=256, mpp=0.5, places=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.stack(np.divmod(np.arange(12), 4), 1) * size
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(len(path.stem)).normal(size=(12, width)).astype(np.float32)
        file["features"].attrs["encoder"] = encoder
        file["coords"] = grid
        file["coords"].attrs["patch_size_level0"] = size
        if mpp:
            file["coords"].attrs["level0_magnification"] = 10 / mpp


def import_features(folder, out, **settings):
    return build.import_features(folder, out, ImportSettings(**settings))


def test_import_writes_what_the_files_say(tmp_path):
    write(tmp_path / "in/A.h5")
    write(tmp_path / "in/B.h5", size=512, mpp=0.25)
    import_features(tmp_path / "in", tmp_path / "out")
    expected = {"encoder": "uni_v1", "feature_dim": 1024, "patch_um": 128.0, "source": "import", "version": 1}
    assert json.loads((tmp_path / "out" / RECIPE).read_text()) == expected


def test_import_writes_no_more_than_the_files_say(tmp_path):
    write(tmp_path / "in/A.h5", encoder="", mpp=0, width=8)
    import_features(tmp_path / "in", tmp_path / "out")
    assert read_recipe(tmp_path / "out") == FeatureRecipe(feature_dim=8, source="import")


def test_spellings_of_one_encoder_are_one_cohort(tmp_path):
    for number, name in enumerate(("UNI2-h", "uni_v2", "MahmoodLab/UNI2-h", "uni2")):
        write(tmp_path / f"in/S{number}.h5", encoder=name, width=1536)
    write(tmp_path / "in/other.h5", encoder="uni_v1", width=1536)
    report = import_features(tmp_path / "in", tmp_path / "out")
    assert report.done == ["S0", "S1", "S2", "S3"] and [failure.slide for failure in report.failed] == ["other"]
    assert "encoder 'uni_v1', 4 of 5 slides have 'uni_v2'" in report.failed[0].error
    assert {info.encoder for info in Records(tmp_path / "out").slides} == {"uni_v2"}
    assert not any("uni_v2" in note for note in report.notes)


def test_records_made_earlier_keep_their_spelling_and_take_others(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr("data_prep.shards.encoder_name", lambda named, file: named)
        write(tmp_path / "in/A.h5", encoder="UNI2-h", width=1536)
        import_features(tmp_path / "in", tmp_path / "out")
    write(tmp_path / "in/B.h5", encoder="uni_v2", width=1536)
    assert import_features(tmp_path / "in", tmp_path / "out").done == ["B"]
    assert [info.encoder for info in Records(tmp_path / "out").slides] == ["UNI2-h", "UNI2-h"]


@pytest.mark.parametrize(
    ("folder", "named", "expected"),
    [
        ("features_uni_v2", "", "uni_v2"),
        ("features_virchow2", "uni_v1", "uni_v1"),
        ("features_mine", "", ""),
        ("uni_v2", "", ""),
        ("features_mine", "hf:mine", "hf:mine"),
    ],
)
def test_the_folder_names_an_encoder_that_the_files_do_not(tmp_path, folder, named, expected):
    assert recipe.encoder_name(named, tmp_path / folder / "A.h5") == expected


def test_the_name_of_tridents_folder_comes_into_the_records(tmp_path):
    write(tmp_path / "in/features_uni_v2/A.h5", encoder="", width=1536)
    import_features(tmp_path / "in", tmp_path / "out")
    assert Records(tmp_path / "out").encoder == read_recipe(tmp_path / "out").encoder == "uni_v2"


@pytest.mark.parametrize(
    ("encoder", "width", "meaning"),
    [
        ("virchow2", 1280, "the class token alone, without the mean"),
        ("kaiko-midnight", 1536, "the class token alone, without the mean"),
        ("h0-mini", 1536, "the class token with the mean"),
        ("conch_v1", 768, "tokens before the encoder's pooling or projection"),
        ("uni_v1", 1536, "another encoder, or another version of it"),
        ("uni_v2", 1536, ""),
        ("my_own", 77, ""),
    ],
)
def test_a_width_that_contradicts_the_publication_is_one_note(tmp_path, encoder, width, meaning):
    for name in "AB":
        write(tmp_path / f"in/{name}.h5", encoder=encoder, width=width, size=224 if "0" in encoder else 256)
    notes = [note for note in import_features(tmp_path / "in", tmp_path / "out").notes if " wide, its" in note]
    assert len(notes) == bool(meaning)
    if meaning:
        assert f"are {width} wide, its published recipe gives" in notes[0] and notes[0].endswith(": 2 slides (A, B)")
        assert f"perhaps {meaning}" in notes[0]


@pytest.mark.parametrize(
    ("size", "mpp", "odd"), [(256, 0.5, ""), (512, 0.25, ""), (256, 0.25, "64 um"), (224, 0.5, "112 um"), (64, 0, "")]
)
def test_patches_that_contradict_the_publication_are_one_note(tmp_path, size, mpp, odd):
    write(tmp_path / "in/A.h5", size=size, mpp=mpp)
    report = import_features(tmp_path / "in", tmp_path / "out")
    notes = [note for note in report.notes if "uni_v1 expects" in note]
    assert len(notes) == bool(odd) and report.done == ["A"]
    if odd:
        assert f"patches are {odd} wide, uni_v1 expects 128 um (256 px at 0.5 um per px)" in notes[0]

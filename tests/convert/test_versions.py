"""Runs of other versions: missing settings, unknown settings, and the commit of this code."""

import dataclasses
import subprocess

import pytest

from pathflip_jax.convert import versions
from pathflip_jax.llm.config import DecoderConfig, LoRAConfig
from pathflip_jax.llm.shape import Shape
from pathflip_jax.model import versions as model_versions
from pathflip_jax.model.config import CONFIGS, PathFLIPConfig
from pathflip_jax.settings import kinds


def test_the_commit_is_that_of_this_code_and_not_of_the_clone_it_is_installed_in(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def revision(place):
        path = tmp_path / place / "pathflip_jax/convert/versions.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        monkeypatch.setattr(versions, "__file__", str(path))
        return versions.git_revision()

    assert revision("") == "unknown"  # no clone at all
    git("init", "--quiet")
    assert revision("") == "unknown"  # a clone that does not hold it
    git("add", ".")
    git("commit", "--quiet", "--message", "all")
    head = git("rev-parse", "HEAD")
    assert revision("") == head
    assert revision(".venv/lib/site-packages") == "unknown"
    (tmp_path / "pathflip_jax/convert/versions.py").write_text("# changed")
    assert revision("") == f"{head}+"


@pytest.fixture
def added(monkeypatch):
    """A setting of the model that versions before did without, doing what 0.1 does."""
    monkeypatch.setitem(model_versions.LEGACY_VALUES, "model.dropout", 0.1)


def test_the_table_names_settings_that_there_are():
    known = {key for kind in kinds.KINDS for key in kinds.fields(kind)}
    fields = {f"model.{field.name}" for kind in CONFIGS.values() for field in dataclasses.fields(kind)}
    assert not model_versions.LEGACY_VALUES.keys() - known - fields


def test_what_a_later_version_wrote_is_named():
    config = {"data": {"records": "r", "colour": 1}, "train": {"steps": 1, "pace": 2}, "flow": {}, "assumed": ["a"]}
    assert versions.unknown_settings(config) == ["data.colour", "train.pace", "flow"]
    assert versions.unknown_settings(config, versions.READ) == ["data.colour"]
    assert "version 9.0 wrote it); upgrade pathflip-jax to 9.0 or later" in versions.refusal("a", ["x"], "9.0")
    assert "does not say which version wrote it" in versions.refusal("a", ["x"], None)
    assert versions.version_of(versions.signed(config)) == versions.this_version()


def test_a_model_of_an_earlier_version_does_what_it_did(added):
    values = PathFLIPConfig(dropout=0.3).to_dict()
    del values["dropout"]
    assert PathFLIPConfig.from_dict(values).dropout == 0.1
    assert versions.drop_legacy_values("model", PathFLIPConfig().to_dict()) == versions.drop_legacy_values(
        "model", values
    )
    assert "dropout" in versions.drop_legacy_values("model", PathFLIPConfig(dropout=0.3).to_dict())


def test_a_run_of_an_earlier_version_has_what_it_did(monkeypatch):
    monkeypatch.setitem(model_versions.LEGACY_VALUES, "data.regions", 7)
    assert versions.completed({"data": {}, "train": {}})["data"]["regions"] == 7
    assert versions.completed({"data": {"regions": 3}, "train": {}})["data"]["regions"] == 3
    assert versions.completed({"data": {}}) == {"data": {}}  # not trained here


def test_the_shape_of_a_language_model_of_another_version(monkeypatch):
    decoder = DecoderConfig(
        family="qwen3", vocab_size=30, width=8, layers=1, heads=2, kv_heads=2, head_dim=4, intermediate=8,
        max_positions=64, rope_theta=1e4, norm_eps=1e-6, tied=True,
    )  # fmt: skip
    values = Shape(PathFLIPConfig(), decoder, LoRAConfig(rank=2), "float32").to_dict()
    monkeypatch.setitem(model_versions.LEGACY_VALUES, "lm.query_norm", True)
    earlier = {name: value for name, value in values["decoder"].items() if name != "query_norm"}
    assert Shape.from_dict(values | {"decoder": earlier}).decoder.query_norm
    later = values | {"decoder": values["decoder"] | {"gate": 1}, "lora": values["lora"] | {"dora": True}, "voice": 1}
    with pytest.raises(model_versions.UnknownSettings) as error:
        Shape.from_dict(later)
    assert error.value.names == ("voice", "decoder.gate", "lora.dora")

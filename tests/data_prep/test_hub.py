"""Weights from the hub: the local cache first, and every way in which they cannot be had."""

import pytest
from huggingface_hub import errors

from data_prep import hub
from pathflip_jax.vision.recipes import RECIPES

UNI, HIBOU = RECIPES["uni_v1"], RECIPES["hibou_b"]


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(hub.huggingface_hub, "try_to_load_from_cache", lambda repository, name: None)


def answers(monkeypatch, *found):
    """The hub's answers to one download after another."""
    asked, left = [], list(found)

    def download(repository, name):
        asked.append((repository, name))
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", download)
    return asked


def test_cached_weights_are_used_without_a_connection(monkeypatch):
    asked = answers(monkeypatch)
    cache = {(UNI.repository, "pytorch_model.bin"): "/cache/uni.bin"}
    monkeypatch.setattr(hub.huggingface_hub, "try_to_load_from_cache", lambda *key: cache.get(key))
    assert str(hub.cached(UNI)) == str(hub.from_hub(UNI)) == "/cache/uni.bin"
    assert hub.cached(HIBOU) is None and not asked


def test_weights_are_downloaded_under_the_names_in_their_order(monkeypatch):
    plip = RECIPES["plip"]
    asked = answers(monkeypatch, errors.EntryNotFoundError("404"), "/cache/plip.bin")
    assert str(hub.from_hub(plip)) == "/cache/plip.bin"
    assert asked == [(plip.repository, name) for name in plip.files]


def gated():
    return errors.GatedRepoError.__new__(errors.GatedRepoError)  # its constructor needs an answer of the server


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (gated, "is gated, and this account or machine has no access"),
        (lambda: errors.LocalEntryNotFoundError("no connection\nmore"), r"cannot be reached \(no connection\)"),
        (lambda: OSError("name not resolved"), "cannot be reached"),
        (lambda: errors.EntryNotFoundError("404"), "has no pytorch_model.bin"),
    ],
)
def test_weights_that_cannot_be_had_are_told_with_the_cure(monkeypatch, answer, reason):
    answers(monkeypatch, answer())
    with pytest.raises(FileNotFoundError, match=f"(?s)uni_v1: no weights here, and MahmoodLab/UNI {reason}") as caught:
        hub.from_hub(UNI)
    for part in ("https://huggingface.co/MahmoodLab/UNI", "hf auth login", "hf download MahmoodLab/UNI", "--weights"):
        assert part in str(caught.value)

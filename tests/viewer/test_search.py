"""Search by text: embeddings of the run alone are taken, and one bad slide does not end the background's work."""

import time

import numpy as np
import pytest

from pathflip_jax.inference.embed import embed
from pathflip_jax.viewer import grounder, search
from pathflip_jax.viewer.grounder import Grounder
from pathflip_jax.viewer.search import Search, read_slide_embeddings
from pathflip_jax.viewer.slides import SlideSource, list_slides


def test_a_file_of_embeddings_is_taken_for_its_own_run_alone(run_folder, tiny_cohort, predictor, tmp_path, monkeypatch):
    file = tmp_path / "embeddings.parquet"
    embed(run_folder, tiny_cohort.records, file, slides_table=tiny_cohort.slides, split="val", batch_size=1)
    slides = list_slides(None, records=tiny_cohort.records)
    found = read_slide_embeddings(file, predictor, slides)
    assert list(found) == list(range(12, 18))
    for number, embedding in found.items():
        np.testing.assert_allclose(embedding, predictor.encode_slide(slides[number].features()).slide, atol=1e-5)
    monkeypatch.setattr(search, "checkpoint_hash", lambda predictor: "of another")
    with pytest.raises(
        ValueError, match=r"embeddings of another run \(.*run\), expected those of .*pathflip embed RECORDS"
    ):
        read_slide_embeddings(file, predictor, slides)


def test_what_has_no_embedding_is_embedded_in_the_background(tiny_cohort, predictor, monkeypatch, capsys):
    monkeypatch.setattr(grounder, "WARM_WORDS", 0)

    def broken():
        raise ValueError("its shard is gone")

    slides = [*list_slides(None, records=tiny_cohort.records)[:3], SlideSource("B1", None, broken)]
    slides.append(SlideSource("picture alone", None, None))
    given = np.ones(16, np.float32)
    searched = Search(slides, {1: given})
    assert searched.progress() == {"ready": 1, "all": 5, "busy": False}
    searched.start(Grounder(predictor))
    deadline = time.monotonic() + 60
    while searched.progress()["busy"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    searched.stop()
    assert searched.progress() == {"ready": 3, "all": 5, "busy": False}
    assert "slide B1 is left out of the search: its shard is gone" in capsys.readouterr().err
    similarities = searched.similarities(given)
    assert similarities[1] == 1.0 and list(similarities)[0] == 1

"""Slides without features in the viewer: encoded one after the other, and those that arrive later."""

import time

import httpx2
import jax
import pytest
from starlette.testclient import TestClient

from pathflip_jax.inference.sources import SlideSource, find_sources
from pathflip_jax.viewer import intake
from pathflip_jax.viewer.intake import Intake, Waiting
from pathflip_jax.viewer.server import make_app
from pathflip_jax.viewer.session import Session

HOME = "http://127.0.0.1:8000"


@pytest.fixture
def waiting(tmp_path, write_slide, monkeypatch):
    """Sources of three slides without features, in a folder of their own."""
    monkeypatch.setattr(intake, "LOOK_SECONDS", 0.05)
    folder = tmp_path / "waiting"
    folder.mkdir()
    for name in ("A", "B", "bad"):
        write_slide(folder / f"{name}.tiff")
    return find_sources(folder).slides


def until(holds, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_slides_wait_in_order_and_the_opened_one_is_next(encoder, waiting):
    found = Intake(waiting, encoder)
    found.start()
    until(lambda: encoder.begun == ["A"])
    until(lambda: found.progress(0) == {"state": "encoding", "done": 3, "of": 12})
    assert found.progress(1) == {"state": "waiting", "ahead": 1} and found.progress(2)["ahead"] == 2
    with pytest.raises(Waiting) as raised:
        found.require(2)
    assert raised.value.progress["state"] == "waiting"
    encoder.free.set()
    until(lambda: encoder.begun == ["A", "bad", "B"] and waiting[1].features is not None)
    found.require(0)
    with pytest.raises(ValueError, match=r"^bad\.tiff: no tissue$"):  # no folder of this machine
        found.require(2)
    assert found.progress(0) is None and found.progress(2)["state"] == "failed"
    found.stop()


def test_slides_that_arrive_later_are_taken_once_they_are_whole(encoder, waiting, write_slide, tmp_path):
    encoder.free.set()
    told = []
    found = Intake(waiting, encoder, tmp_path / "waiting", encoded=told.append)
    found.start()
    new = tmp_path / "waiting" / "new.tiff"
    write_slide(tmp_path / "whole.tiff")
    content = (tmp_path / "whole.tiff").read_bytes()
    for size in range(1000, 21000, 1000):  # it is being copied
        new.write_bytes(content[:size])
        time.sleep(0.02)
    new.write_bytes(content)
    until(lambda: len(waiting) == 4 and waiting[3].features is not None)
    assert waiting[3].slide_id == "new" and waiting[3].image == new and 3 in told
    found.stop()


def test_a_fault_of_the_machine_ends_one_slide_only(encoder, waiting, capsys):
    encoder.free.set()
    works = encoder.encode

    def encode(sources, on_progress):
        if sources[0].slide_id == "A":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        yield from works(sources, on_progress)

    encoder.encode = encode
    found = Intake(waiting, encoder)
    found.start()
    until(lambda: waiting[1].features is not None)
    assert found.progress(0) == {"state": "failed", "error": "RESOURCE_EXHAUSTED: out of memory"}
    assert "slide A is not encoded: RESOURCE_EXHAUSTED" in capsys.readouterr().err
    found.stop()


def test_without_the_encoder_the_reason_is_given(waiting):
    found = Intake(waiting, None, refusal="its weights are not at hand")
    found.start()
    assert found.progress(0) is None
    with pytest.raises(ValueError, match="slide A: found no features, and its weights are not at hand"):
        found.require(0)
    found.stop()


def test_a_folder_that_vanishes_is_told_once(encoder, waiting, tmp_path, capsys, monkeypatch):
    found = Intake(waiting, encoder, tmp_path / "waiting")
    monkeypatch.setattr(intake, "find_slides", lambda folder: (_ for _ in ()).throw(OSError("stale file handle")))
    found.start()
    time.sleep(0.4)
    found.stop()
    assert capsys.readouterr().err.count("no new slides can be seen: stale file handle") == 1


def test_questions_wait_their_turn_over_http(session, encoder, waiting):
    number = len(session.slides)
    session.slides.append(waiting[0])
    session.intake = Intake(session.slides, encoder, encoded=session.search.add)
    with TestClient(make_app(session), base_url=HOME) as client:
        until(lambda: client.get("/slides.json").json()["slides"][number]["encoding"]["state"] == "encoding")
        answer = client.get(f"/slides/{number}/patches.json")
        assert answer.status_code == 202 and answer.json()["encoding"] == {"state": "encoding", "done": 3, "of": 12}
        assert client.post(f"/slides/{number}/layer", json={"text": "fat"}).status_code == 202
        assert client.get("/slides/0/patches.json").status_code == 200  # the others go on
        encoder.free.set()
        until(lambda: client.get(f"/slides/{number}/patches.json").status_code == httpx2.codes.OK)
        listed = client.get("/slides.json").json()["slides"][number]
        assert listed == {"id": "A", "image": True, "features": True, "encoding": None}
        until(lambda: number in session.search.similarities(session.grounder.embed_text("fat")))


def test_a_session_without_intake_shows_no_encoding(session):
    assert isinstance(session, Session) and {row["encoding"] for row in session.table()["slides"]} == {None}
    assert all(isinstance(slide, SlideSource) for slide in session.slides)

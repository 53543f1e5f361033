"""Reports and answers: each slide is embedded once, and the model sees the previous turns."""

from types import SimpleNamespace

import numpy as np
import pytest
from starlette.testclient import TestClient

from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.viewer.server import make_app
from pathflip_jax.viewer.speaker import Speaker


class Assistant:
    """Writes down what it is asked."""

    def __init__(self):
        self.embedded = []

    def embed_slides(self, slides):
        self.embedded += [slide.slide_id for slide in slides]
        return [np.full((2, 4), len(slide.features), np.float32) for slide in slides]

    def prompt(self, asked, rows, before):
        return SimpleNamespace(asked=asked, rows=rows, before=before)

    def answer(self, prompts, sampling):
        return [f"{p.asked} after {[tuple(turn) for turn in p.before]} on {p.rows[0, 0]:.0f}" for p in prompts]

    def caption(self, slides, sampling):
        return [f"report of {rows[0, 0]:.0f} in {sampling.max_new_tokens}" for rows in slides]


@pytest.fixture
def client(session):
    session.speaker = Speaker(Assistant(), Sampling(max_new_tokens=7))
    with TestClient(make_app(session), base_url="http://localhost") as client:
        yield client


def test_reports_and_answers(client, session):
    patches = [len(session.slides[i].features().features) for i in range(2)]
    assert client.post("/slides/0/report", json={}).json() == {"text": f"report of {patches[0]} in 7"}
    said = [["Is there fat?", "Yes."]]
    found = client.post("/slides/0/answer", json={"question": "Where?", "before": said}).json()["text"]
    assert found == f"Where? after [('Is there fat?', 'Yes.')] on {patches[0]}"
    client.post("/slides/1/answer", json={"question": "Where?"})
    assert session.speaker.assistant.embedded == ["S00", "S01"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"question": " "}, "expected a text"),
        ({"question": "x" * 2001}, "2001 characters"),
        ({"question": "x", "before": [["a", "b"]] * 21}, "21 questions"),
        ({"question": "x", "before": [["a"]]}, "questions with their answers"),
        ({"question": "x", "before": 3}, "questions with their answers"),
    ],
)
def test_what_cannot_be_asked_is_named(client, body, message):
    response = client.post("/slides/0/answer", json=body)
    assert response.status_code == 422 and message in response.json()["error"]

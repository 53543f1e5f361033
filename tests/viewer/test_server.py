"""The viewer over HTTP: what it shows is the model's own, nothing but slides leaves it, faults stay where they are."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import httpx2
import numpy as np
import pytest
import uvicorn
from starlette.testclient import TestClient

from pathflip_jax.viewer.grounder import Grounder
from pathflip_jax.viewer.page_files import page_files
from pathflip_jax.viewer.pictures import Pictures
from pathflip_jax.viewer.search import Search
from pathflip_jax.viewer.server import LONGEST_BODY, listen, make_app
from pathflip_jax.viewer.session import Session
from pathflip_jax.viewer.slides import list_slides

HOME = "http://127.0.0.1:8000"


@pytest.fixture
def client(session):
    with TestClient(make_app(session), base_url=HOME, raise_server_exceptions=False) as client:
        yield client


def page_data(client) -> dict:
    script = client.get("/slides.js").text
    return json.loads(script.removeprefix("globalThis.PATHFLIP = ").rstrip(";\n"))


def wait_for_search(client) -> None:
    deadline = time.monotonic() + 60
    while client.get("/search").json()["busy"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_page_and_all_it_loads_are_there(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    for name in page_files():
        if name != "index.html":
            assert client.get(f"/page/{name}").status_code == 200
            assert f'"page/{name}"' in page.text or name.startswith("LICENSE")
    data = page_data(client)
    assert [slide["id"] for slide in data["slides"]] == [f"S{i:02d}" for i in range(24)]
    assert (data["encoder"], data["live"], data["grows"], data["language"]) == ("tiny", True, False, False)
    assert "research use only" in data["notice"]
    assert [slide["image"] for slide in data["slides"]] == [i < 6 for i in range(24)]


def test_scores_are_those_of_the_predictor(client, predictor, session):
    text, negative = "necrosis", "fat"
    slide = session.slides[2].features()
    expected = predictor.ground(slide, text, negative=[negative], method="region")
    found = client.post("/slides/2/layer", json={"text": text, "negative": [negative]}).json()
    np.testing.assert_allclose(found["scores"], expected.patch_scores[0], atol=1e-4)
    patches = client.get("/slides/2/patches.json").json()
    assert np.array_equal(np.reshape(patches["coords"], (-1, 2)), expected.coords)
    assert (patches["patch_size"], patches["mpp"], patches["warnings"]) == (64, 0.5, [])
    assert (found["text"], found["negative"]) == (text, [negative])


def test_areas_lie_where_the_scores_are_high(client):
    asked = {"text": "necrosis", "threshold": 60}
    layer = client.post("/slides/1/layer", json=asked).json()
    low, high = layer["low"], layer["high"]
    areas = client.post("/slides/1/areas", json=asked).json()["areas"]
    assert areas and all(area["properties"]["objectType"] == "annotation" for area in areas)
    for area in areas:
        assert area["properties"]["measurements"]["peak"] >= low + 0.6 * (high - low) - 1e-6
        assert area["properties"]["classification"]["name"] == "necrosis"
    nothing = client.post("/slides/1/areas", json=asked | {"threshold": 100}).json()["areas"]
    assert len(nothing) <= len(areas)


def test_search_ranks_slides_by_their_cosine_with_the_text(client, predictor, session):
    wait_for_search(client)
    found = client.post("/find", json={"text": "glands"}).json()
    text = predictor.encode_text("glands")[0]
    slides = np.stack([predictor.encode_slide(slide.features()).slide for slide in session.slides])
    cosines = slides @ text / np.linalg.norm(slides, axis=1) / np.linalg.norm(text)
    assert [number for number, _ in found["slides"]] == np.argsort(-cosines).tolist()
    np.testing.assert_allclose([cosine for _, cosine in found["slides"]], np.sort(cosines)[::-1], atol=1e-4)
    assert (found["ready"], found["busy"]) == (24, False)


TRAVERSALS = [
    "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "....//....//etc/passwd",
    "..%5c..%5cetc%5cpasswd", "%252e%252e%252fetc%252fpasswd", "/etc/passwd", "..;/etc/passwd", "..%00/etc/passwd",
    "__init__.py", "../server.py", "%2e%2e%2fserver.py",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
@pytest.mark.parametrize("start", ["", "page/", "slides/", "slides/0/", "slides/0/tiles/", "slides/0/tiles/0/"])
def test_no_path_is_made_of_what_a_client_sends(client, start, path):
    for url in (f"/{start}{path}", f"/{start}{path}.jpg"):
        response = client.get(url)
        assert response.status_code in (404, 405), url
        assert "root:" not in response.text and "import" not in response.text


@pytest.mark.parametrize("name", ["S00", "S00.tiff", "-1", "1e3", "0x1", " 1", "１", "99999999999", quote("../0")])
def test_a_slide_is_named_by_its_number_alone(client, name):
    for what in ("slide.json", "patches.json", "thumbnail.jpg", "tiles/0/0_0.jpg", "label.jpg", "macro.jpg"):
        assert client.get(f"/slides/{name}/{what}").status_code == 404


@pytest.mark.parametrize(
    "what", ["label.jpg", "macro.jpg", "associated/label", "properties.json", "slide.tiff", "0_0.jpg"]
)
def test_nothing_else_of_a_slide_is_served(client, what):
    assert client.get(f"/slides/0/{what}").status_code == 404


def test_a_slide_says_its_size_and_nothing_of_the_scanner(client):
    image = client.get("/slides/0/slide.json").json()["image"]
    assert image.keys() == {"width", "height", "mpp", "bounds", "shown", "first", "last", "tile", "overlap"}
    assert client.get("/slides/0/tiles/9/1_1.jpg").headers["content-type"] == "image/jpeg"
    assert client.get("/slides/0/tiles/99/0_0.jpg").status_code == 404
    assert "no tile 9, 9" in client.get("/slides/0/tiles/9/9_9.jpg").json()["error"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/slides/0/layer", {"text": "  "}, "expected a text"),
        ("/slides/0/layer", {"text": ["x"]}, "expected a text"),
        ("/slides/0/layer", {"text": "x" * 3000}, "3000 characters"),
        ("/slides/0/layer", {"text": "x", "negative": "y"}, "expected a list"),
        ("/slides/0/layer", {"text": "x", "negative": ["y"] * 9}, "9 negative texts"),
        ("/slides/0/layer", {"text": "x", "number": 3}, "expected a JSON object"),
        ("/slides/0/areas", {"text": "x", "threshold": 1e9}, "threshold"),
        ("/slides/0/areas", {"text": "x", "threshold": "high"}, "threshold"),
        ("/slides/0/layer", [1], "expected a JSON object"),
        ("/find", {"text": "x" * LONGEST_BODY}, "more than"),
        ("/slides/0/report", {}, "--language RUN"),
        ("/slides/0/answer", {"question": "Why?"}, "--language RUN"),
    ],
)
def test_what_cannot_be_asked_is_named(client, path, body, message):
    response = client.post(path, json=body)
    assert response.status_code == 422 and message in response.json()["error"]


def test_only_json_is_taken_as_a_question(client):
    """A form of another site can send text/plain to this machine, but no JSON by its type."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = client.post("/find", content='{"text": "fat"}', headers={"content-type": kind})
        assert response.status_code == 422 and "application/json" in response.json()["error"]
    nested = "[" * 100_000
    response = client.post("/find", content=nested[:60_000], headers={"content-type": "application/json"})
    assert response.status_code == 422


def test_one_broken_and_one_deleted_slide_leave_the_rest(client, slides_dir):
    for number in range(3):
        assert client.get(f"/slides/{number}/tiles/9/0_0.jpg").status_code == 200
    (slides_dir / "S00.tiff").write_bytes(b"II*\0 not a slide any more")
    (slides_dir / "S01.tiff").unlink()
    broken, gone = (client.get(f"/slides/{number}/tiles/9/0_0.jpg") for number in range(2))
    assert broken.status_code == 422 and broken.json()["error"].startswith("S00.tiff: OpenSlide cannot")
    assert gone.status_code == 410 and "S01.tiff: the slide file no longer exists; restore it" in gone.json()["error"]
    for response in (broken, gone):
        assert str(slides_dir) not in response.text
    for number in (0, 1):  # their patches are still there to be drawn
        facts = client.get(f"/slides/{number}/slide.json").json()
        assert (
            facts["image"] is None
            and "maps are drawn on a blank slide at the coordinates of its patches" in facts["warnings"][0]
        )
        assert client.post(f"/slides/{number}/layer", json={"text": "fat"}).status_code == 200
    assert client.get("/slides/2/tiles/9/1_0.jpg").status_code == 200
    assert client.get("/slides/7/slide.json").json()["image"] is None
    assert client.get("/slides/7/tiles/0/0_0.jpg").status_code == 404


def test_features_of_another_slide_or_scale_are_told(slides_dir, tiny_cohort, predictor, write_slide):
    write_slide(slides_dir / "S03.tiff", size=(120, 140))
    slides = list_slides(slides_dir, records=tiny_cohort.records, only=["S03"])
    session = Session(slides, Pictures(readers=1), Grounder(predictor, "region"), Search(slides))
    (warning,) = session.patches(0)["warnings"]
    assert warning.startswith(
        "the slide file: 140 x 120 pixels, but the features of slide S03 come from a slide of 384 x 320 pixels"
    )
    session.pictures.close()


def test_features_of_another_encoder_are_told_and_tiles_go_on(client, predictor, monkeypatch):
    monkeypatch.setattr(predictor, "encoder", "conch")
    for path in ("patches.json", "layer"):
        ask = client.get if path.endswith("json") else lambda url: client.post(url, json={"text": "fat"})
        response = ask(f"/slides/4/{path}")
        assert response.status_code == 422 and "features come from 'tiny'" in response.json()["error"]
        assert "extract them again" in response.json()["error"]
    assert client.get("/slides/4/tiles/9/0_0.jpg").status_code == 200


def test_a_port_in_use_is_told_with_the_cure():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"127\.0\.0\.1, port {port}: .*choose another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(OSError, match="choose another --port"):
        listen("192.0.2.1", 0)  # an address that no machine has


@pytest.fixture
def address(session):
    """A real server on a free port."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(session), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


def test_twenty_clients_at_once_see_no_error(address):
    texts = ("necrosis", "fat", "glands", "mucin")

    def visit(visitor: int) -> list[int]:
        seen = []
        with httpx2.Client(base_url=address, timeout=60) as client:
            for number in range(6):
                seen.append(client.get("/"))
                seen.append(client.get(f"/slides/{number}/slide.json"))
                seen += [client.get(f"/slides/{number}/tiles/9/{c}_{r}.jpg") for c in range(2) for r in range(2)]
                seen.append(client.post(f"/slides/{number}/layer", json={"text": texts[visitor % 4]}))
                seen.append(client.post(f"/slides/{number}/areas", json={"text": texts[visitor % 4], "threshold": 40}))
        return [response.status_code for response in seen]

    with ThreadPoolExecutor(20) as pool:
        codes = [code for visit_codes in pool.map(visit, range(20)) for code in visit_codes]
    assert len(codes) == 20 * 6 * 8 and set(codes) == {200}


def test_garbage_on_the_wire_leaves_the_server_up(address):
    host, port = address.removeprefix("http://").split(":")
    for garbage in (
        b"\x00\xff" * 500,
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"POST / HTTP/1.1\r\n",
    ):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(garbage)
            raw.settimeout(1)
            try:
                assert b"root:" not in raw.recv(4096)
            except TimeoutError:
                pass
    digits = "9" * 5000
    assert httpx2.get(f"{address}/slides/{digits}/slide.json").status_code in (404, 500)
    assert httpx2.get(f"{address}/slides/0/slide.json").status_code == 200

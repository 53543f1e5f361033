"""The page in a real browser: headless Chromium opens it, searches, zooms, grounds, asks and downloads.

Needs Chromium (Debian: `apt-get install chromium`, or PATHFLIP_CHROMIUM names one) and Playwright; without them the
tests are skipped and say so. PATHFLIP_SCREENSHOTS names a folder for screenshots.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx2
import numpy as np
import pytest
import uvicorn

from pathflip_jax import cli
from pathflip_jax.llm.sampling import Sampling
from pathflip_jax.viewer.grounder import Grounder
from pathflip_jax.viewer.intake import Intake
from pathflip_jax.viewer.pictures import Pictures
from pathflip_jax.viewer.proxy import read_proxy
from pathflip_jax.viewer.search import Search
from pathflip_jax.viewer.server import listen, make_app, make_server
from pathflip_jax.viewer.session import Session
from pathflip_jax.viewer.slides import list_slides
from pathflip_jax.viewer.speaker import Speaker

CHROMIUM = os.environ.get("PATHFLIP_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TEXT, OTHER = "Necrosis is extensive.", "Fat is seen at the edge."
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (requirements/slow-*)")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: `apt-get install chromium`, or name one by PATHFLIP_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        # As root, as in a container, Chromium has no sandbox; it opens nothing here but the page under test.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser):
    """A page whose errors, and whose requests to anywhere else, fail the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 850}, accept_downloads=True)
    tab = context.new_page()
    tab.set_default_timeout(60_000)
    tab.faults = []
    tab.on("pageerror", lambda error: tab.faults.append(str(error)))
    tab.on("console", lambda said: said.type == "error" and tab.faults.append(said.text))
    tab.on("request", lambda asked: tab.faults.append(asked.url) if not asked.url.startswith(LOCAL) else None)
    yield tab
    context.close()
    assert tab.faults == []


LOCAL = ("http://127.0.0.1:", "file:///", "data:", "blob:", "about:")


class Assistant:
    """A language model that is quick."""

    def embed_slides(self, slides):
        return [np.zeros((2, 4), np.float32) for _ in slides]

    def prompt(self, asked, rows, before):
        return f"{asked} ({len(before)} before)"

    def answer(self, prompts, sampling):
        return [f"Answer to {prompt}" for prompt in prompts]

    def caption(self, slides, sampling):
        return ["A report."]


@pytest.fixture
def address(session):
    session.speaker = Speaker(Assistant(), Sampling(max_new_tokens=7))
    vectors = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    session.search = Search(session.slides, dict(enumerate(vectors)))  # nothing is left to embed
    with served(session) as address:
        yield address


@contextmanager
def served(session):
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(session), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    listener.close()


def photograph(tab, name):
    if folder := os.environ.get("PATHFLIP_SCREENSHOTS"):
        tab.screenshot(path=Path(folder) / f"{name}.png")


def check_accessibility(tab):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = axe.Axe().run(tab, options={"preload": False}).response["violations"]  # it would ask for the styles again
    assert [(rule["id"], [node["html"][:120] for node in rule["nodes"]]) for rule in found] == []


def wait_for(tab, expression, seconds=90):
    """Wait until an expression of the page is true. Playwright's own would evaluate text, which the page forbids."""
    deadline = time.monotonic() + seconds
    while not tab.evaluate(f"Promise.resolve({expression}).then(Boolean)"):
        assert time.monotonic() < deadline, expression
        time.sleep(0.03)


def ready(tab):
    """The slide is open, encoded and drawn."""
    wait_for(tab, "state.patches && stage.viewer.world.getItemAt(0)?.getFullyLoaded()")


def show(tab, text, negative=""):
    count = tab.locator("#layers li").count()
    tab.fill("#negative", negative)
    tab.fill("#add-text", text)
    tab.press("#add-text", "Enter")
    wait_for(tab, f"state.layers.length === {count + 1} && state.layers.every((layer) => layer.path)")


def test_the_live_page(tab, address, session, tmp_path, slides_dir):
    tab.goto(address)
    ready(tab)
    assert tab.locator("#slide-name").inner_text() == "S00"
    assert "research use only" in tab.locator("#notice").inner_text()
    assert "tiny" in tab.locator("#model").inner_text()
    assert tab.locator("#scale-label").inner_text().endswith("µm")

    wait_for(tab, "fetch('search').then((r) => r.json()).then(({ busy }) => !busy)")
    tab.fill("#find-text", TEXT)
    tab.press("#find-text", "Enter")
    wait_for(tab, "state.similarity.size === 24")
    ranked = [number for number, _ in session.find(TEXT)["slides"]]
    assert tab.evaluate("state.listed") == ranked
    photograph(tab, "search")

    tab.fill("#filter", "S02")
    tab.click("#slide-list button")
    ready(tab)
    show(tab, TEXT)
    layer = session.grounder.layer(session.slides[2], TEXT)
    painted = np.array(tab.evaluate("[...state.layers[0].raster].map((v) => (Number.isNaN(v) ? null : v))"), float)
    drawn = painted.reshape(layer.surface.values[0].shape)  # the browser smooths as surface.py does
    np.testing.assert_allclose(drawn, layer.surface.values[0], atol=2e-4)

    best = int(np.argmax(layer.grounding.patch_scores[0]))
    x, y = layer.grounding.coords[best] + 32
    place = tab.evaluate(f"(() => {{ const v = stage.view(); return [v.x + {x} * v.scale, v.y + {y} * v.scale]; }})()")
    box = tab.locator("#stage").bounding_box()
    tab.mouse.move(box["x"] + place[0], box["y"] + place[1])
    said = tab.locator("#hover").inner_text()
    score = re.fullmatch(rf"{re.escape(TEXT)}: (-?[\d.]+), above \d+% of patches", said.strip())
    assert float(score[1]) == pytest.approx(layer.grounding.patch_scores[0, best], abs=1e-3)
    alpha = "stage.canvas.getContext('2d').getImageData({}, {}, 1, 1).data[3]"
    assert tab.evaluate(alpha.format(*map(int, place))) > 100, "no heat on the hottest patch"

    zoom = tab.evaluate("stage.viewer.viewport.getZoom()")
    tab.mouse.wheel(0, -600)
    wait_for(tab, f"stage.viewer.viewport.getZoom(true) > {zoom} * 1.1")
    tab.keyboard.press("0")
    show(tab, OTHER, negative=TEXT)
    assert tab.locator("#layers .quiet").filter(has_text=f"minus {TEXT}").count() == 1
    photograph(tab, "layers")
    check_accessibility(tab)

    tab.locator("#layers input[type=range]").first.fill("40")
    wait_for(tab, "state.layers[0].threshold === 40 && document.querySelector('#download').disabled === false")
    tab.wait_for_timeout(400)
    with tab.expect_download() as download:
        tab.click("#download")
    download.value.save_as(tmp_path / "areas.geojson")
    features = json.loads((tmp_path / "areas.geojson").read_text())["features"]
    first = [feature for feature in features if feature["properties"]["classification"]["name"] == TEXT]
    expected = session.areas(2, TEXT, [], 40)["areas"]
    assert [feature["geometry"] for feature in first] == [feature["geometry"] for feature in expected]
    assert download.value.suggested_filename == "S02.geojson"

    tab.click("#report")
    tab.fill("#question", "Is there fat?")
    tab.press("#question", "Enter")
    wait_for(tab, "document.querySelector('#talk').innerText.includes('Answer to Is there fat? (0 before)')")
    assert "A report." in tab.locator("#talk").inner_text()


def test_the_page_by_keyboard(tab, address):
    tab.goto(address)
    ready(tab)
    tab.keyboard.press("/")
    tab.keyboard.type(TEXT)
    tab.keyboard.press("Enter")
    wait_for(tab, "state.layers[0]?.path")
    tab.keyboard.press("Escape")
    tab.keyboard.press("h")
    assert not tab.is_checked("#show-maps")
    tab.keyboard.press("h")
    tab.keyboard.press("c")
    assert TEXT in tab.locator("#busy").inner_text() or "No patch" in tab.locator("#busy").inner_text()
    zoom = tab.evaluate("stage.viewer.viewport.getZoom()")
    tab.keyboard.press("+")
    assert tab.evaluate("stage.viewer.viewport.getZoom()") > zoom
    tab.keyboard.press("n")
    tab.keyboard.press("j")
    wait_for(tab, "state.number === 1 && state.layers[0].path")
    tab.keyboard.press("k")
    wait_for(tab, "state.number === 0 && state.layers[0].path")
    tab.keyboard.press("?")
    assert tab.locator("#help").is_visible()
    check_accessibility(tab)
    tab.keyboard.press("Escape")
    assert not tab.locator("#help").is_visible()


def test_a_slide_without_a_file_is_drawn_on_its_patches(tab, address):
    tab.goto(f"{address}#S10")
    ready(tab)
    assert tab.locator("#slide-name").inner_text() == "S10"
    assert "maps are drawn on a blank slide at the coordinates of its patches" in tab.locator("#messages").inner_text()
    show(tab, TEXT)
    middle = "stage.canvas.getContext('2d').getImageData({}, {}, 1, 1).data[3]"
    x, y = tab.evaluate(
        "(() => { const v = stage.view(); const c = state.patches.coords;"
        " return [v.x + (c[0] + 32) * v.scale, v.y + (c[1] + 32) * v.scale]; })()"
    )
    assert tab.evaluate(middle.format(int(x), int(y))) > 0
    photograph(tab, "coordinates")


def test_a_slide_that_is_deleted_while_it_is_shown(tab, address, slides_dir):
    tab.goto(address)
    ready(tab)
    (slides_dir / "S00.tiff").unlink()
    (slides_dir / "S01.tiff").write_bytes(b"II*\0 broken")
    tab.evaluate("open(0)")
    wait_for(tab, "document.querySelector('#messages').innerText.includes('S00.tiff: the slide file no longer exists')")
    tab.evaluate("open(1)")
    wait_for(tab, "document.querySelector('#messages').innerText.includes('S01.tiff: OpenSlide cannot open it')")
    photograph(tab, "broken")
    tab.evaluate("open(2)")
    ready(tab)
    assert tab.locator("#slide-name").inner_text() == "S02"
    show(tab, TEXT)
    tab.faults = [fault for fault in tab.faults if "410" not in fault and "422" not in fault]  # Chromium logs them


def test_the_written_page_opens_by_a_double_click(tab, run_folder, tiny_cohort, slides_dir, tmp_path):
    out = tmp_path / "a page"
    sources = ["--records", str(tiny_cohort.records), "--slides-dir", str(slides_dir), "--texts", TEXT, OTHER]
    assert cli.main(["report", str(run_folder), *sources, "--slide-ids", "S01", "S04", "S09", "--out", str(out)]) == 0
    tab.goto((out / "index.html").as_uri())
    ready(tab)
    wait_for(tab, "state.layers.length === 2 && state.layers.every((layer) => layer.path)")
    assert tab.locator("#slide-name").inner_text() == "S01"
    assert not tab.locator("#add").is_visible()
    check_accessibility(tab)
    tab.locator("#layers input[type=range]").first.fill("30")
    with tab.expect_download() as download:
        tab.click("#download")
    assert download.value.suggested_filename == "S01.geojson"
    tab.fill("#find-text", OTHER)
    tab.press("#find-text", "Enter")
    wait_for(tab, "state.similarity.size === 3")
    tab.keyboard.press("Escape")
    tab.keyboard.press("g")
    photograph(tab, "written")


ODD = "S 100%#1?ä&<b>"


@pytest.fixture
def odd_address(slides_dir, predictor):
    """A viewer of two slides, one of which has a name that links must spell otherwise."""
    (slides_dir / "S01.tiff").rename(slides_dir / f"{ODD}.tiff")
    slides = list_slides(slides_dir)
    slides = [slide for slide in slides if slide.slide_id in ("S00", ODD)]
    session = Session(slides, Pictures(readers=1), Grounder(predictor, "region"), Search(slides))
    with listen("127.0.0.1", 0) as listener:
        server = make_server(make_app(session, proxy=read_proxy(frames=["self"])))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


def test_a_slide_of_any_name_has_a_link(tab, odd_address):
    def opened(name):
        wait_for(tab, f"document.querySelector('#slide-name').innerText === {json.dumps(name)}")
        return tab.evaluate("location.hash")

    tab.goto(odd_address)
    opened(min(ODD, "S00"))
    tab.goto(f"{odd_address}#{quote(ODD, safe='')}")
    assert opened(ODD) == "#" + quote(ODD, safe="")
    tab.evaluate("location.hash = '#S00'")  # a link on a page that is open already
    assert opened("S00") == "#S00"
    tab.evaluate(f"location.hash = {json.dumps('#' + ODD)}")  # as somebody types it
    opened(ODD)
    tab.goto("about:blank")
    tab.goto(f"{odd_address}#100%")
    wait_for(tab, "document.querySelector('#messages').innerText.includes('No slide is named “100%”')")
    tab.goto("about:blank")  # it asks for nothing more when the server ends


def test_a_slide_that_arrives_is_encoded_while_its_questions_wait(tab, session, encoder, write_slide, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    session.slides.clear()
    session.intake = Intake(session.slides, encoder, folder, encoded=session.search.add)
    with served(session) as address:
        tab.goto(address)
        wait_for(tab, "document.getElementById('busy').textContent.includes('No slide is in the folder yet')")
        write_slide(folder / "S1.tiff")
        wait_for(tab, "document.getElementById('busy').textContent.includes('3 of 12 patches')")
        tab.fill("#add-text", TEXT)
        tab.press("#add-text", "Enter")
        photograph(tab, "encoding")
        check_accessibility(tab)
        encoder.free.set()
        wait_for(tab, "state.layers.length && state.layers.every((layer) => layer.path)")
        tab.goto("about:blank")  # it asks for nothing more when the server ends
    assert encoder.begun == ["S1"]


def test_the_command_serves_until_it_is_interrupted(run_folder, tiny_cohort, slides_dir, tmp_path):
    """With a token, which it prints; nothing but one line is said, and ctrl-C is no error."""
    token = "a-token-of-this-test"
    sources = ["--records", tiny_cohort.records, "--slides", slides_dir, "--checkpoint", run_folder]
    command = [sys.executable, "-m", "pathflip_jax.cli", "serve", *sources, "--method", "region", "--port", "0"]
    command += ["--token", token]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = re.fullmatch(
                r"24 slides at (http://127\.0\.0\.1:\d+/)\?token=(.*) \(press Ctrl-C to stop\)\n",
                server.stdout.readline(),
            )
            assert address and address[2] == token
            assert httpx2.get(address[1]).status_code == 401
            with httpx2.Client(base_url=address[1], follow_redirects=True, timeout=60) as client:
                assert "<title>PathFLIP viewer</title>" in client.get(f"/?token={token}").text
                assert client.post("/slides/3/layer", json={"text": "necrosis"}).status_code == 200
                assert client.get("/slides/3/tiles/9/0_0.jpg").status_code == 200
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0, server.stderr.read()

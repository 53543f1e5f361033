"""Access to the viewer: this machine alone, or holders of its token."""

import json
import re
import shutil
import sys

import pytest
from starlette.testclient import TestClient

from pathflip_jax import cli
from pathflip_jax.data.readers.feature_recipe import FeatureRecipe
from pathflip_jax.data.records.recipe import write_recipe
from pathflip_jax.viewer.access import choose_token, is_local
from pathflip_jax.viewer.server import listen, make_app

TOKEN = "a-token-of-this-viewer"
PATHS = ["/", "/slides.js", "/page/app.js", "/slides/0/slide.json", "/slides/0/thumbnail.jpg", "/search", "/nothing"]


@pytest.fixture
def open_client(session):
    def make(token=TOKEN, local=False, base_url="http://viewer.lab:8000"):
        return TestClient(make_app(session, token, local), base_url=base_url)

    return make


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_answered(open_client, path):
    client = open_client()
    wrong = ["", "?token=", "?token=a-token-of-this-viewe", f"?token={TOKEN}x", "?token=%ff%fe", "?token=ä"]
    for query in wrong:
        response = client.get(path + query)
        assert response.status_code == 401 and "requires its token" in response.text
    for headers in ({"authorization": "Bearer no"}, {"authorization": f"Basic {TOKEN}"}, {"cookie": "pathflip=x; ;=;"}):
        assert client.get(path, headers=headers).status_code == 401
    assert client.post("/find", json={"text": "fat"}).status_code == 401


def test_the_token_opens_by_address_cookie_and_header(open_client):
    client = open_client()
    entered = client.get(f"/?token={TOKEN}", follow_redirects=False)
    assert entered.status_code == 303 and entered.headers["location"] == "./", "it would stay in the address bar"
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie
    assert client.get("/slides/0/slide.json").status_code == 200  # by the cookie
    stranger = open_client()
    assert stranger.get("/slides.js").status_code == 401
    assert stranger.get("/slides.js", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_tokens_are_compared_in_constant_time(open_client, monkeypatch):
    from pathflip_jax.viewer import access

    compared = []
    monkeypatch.setattr(access.secrets, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    open_client().get("/", headers={"authorization": "Bearer guess"})
    assert compared == [(b"guess", TOKEN.encode())]


def test_a_local_viewer_answers_to_local_names_only(open_client):
    """A page elsewhere that points its own name at 127.0.0.1 (DNS rebinding) gets nothing."""
    for name, status in (("127.0.0.1", 200), ("localhost", 200), ("[::1]", 200), ("evil.example", 421)):
        client, host = open_client(token="", local=True), {"host": f"{name}:8000"}
        assert client.get("/", headers=host).status_code == status
        assert client.get("/slides/0/slide.json", headers=host).status_code == status


def test_every_answer_has_the_safety_headers(open_client):
    client = open_client(token="", local=True, base_url="http://localhost")
    for path in PATHS:
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert "default-src 'self'" in headers["content-security-policy"]


def test_other_addresses_get_a_token():
    assert [is_local(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_local(host) for host in ("0.0.0.0", "::", "10.0.0.3", "lab", "localhost.evil")] == [False] * 5
    assert choose_token("127.0.0.1", None) == ""
    first, second = choose_token("0.0.0.0", None), choose_token("0.0.0.0", None)
    assert first != second and len(first) >= 32
    assert choose_token("0.0.0.0", TOKEN) == TOKEN
    with pytest.raises(ValueError, match="--token has 5 characters: expected 16"):
        choose_token("127.0.0.1", "short")


def test_serve_says_at_once_what_is_wrong(tmp_path, capsys):
    run = ["serve", "--checkpoint", str(tmp_path / "run"), "--slides", str(tmp_path)]
    with listen("127.0.0.1", 0) as taken:
        assert cli.main([*run, f"--port={taken.getsockname()[1]}"]) == 2
    assert re.search(r"port \d+: cannot listen on this address .*choose another --port", capsys.readouterr().err)
    assert cli.main([*run[:3], "--port=0"]) == 2
    assert "nothing to show" in capsys.readouterr().err
    assert cli.main([*run, "--port=0"]) == 2
    assert "no file that OpenSlide can open" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*run, "--port=70000"])
    assert "--port: 70000: expected a whole number of at least 0 and at most 65535" in capsys.readouterr().err


def test_serve_refuses_records_of_another_recipe(run_folder, tiny_cohort, tmp_path, capsys):
    run, records = shutil.copytree(run_folder, tmp_path / "run"), shutil.copytree(tiny_cohort.records, tmp_path / "r")
    config = json.loads((run / "config.json").read_text())
    config["data"]["recipe"] = {"weights": "34cd" * 16}
    (run / "config.json").write_text(json.dumps(config))
    write_recipe(records, FeatureRecipe(weights="12ab" * 16))
    assert cli.main(["serve", "--checkpoint", str(run), "--records", str(records), "--port=0"]) == 2
    assert f"{records}: features are not made as those that {run} was trained on" in capsys.readouterr().err
    command = ["report", str(run), "--records", str(records), "--texts", "fat", "--out", str(tmp_path / "page")]
    assert cli.main(command) == 2 and not (tmp_path / "page").exists()
    assert "they differ in weights (12ab12ab12ab…, not 34cd34cd34cd…)" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_its_packages_the_viewer_names_the_extra(monkeypatch, capsys, missing):
    for name in [name for name in sys.modules if name.startswith(("pathflip_jax.viewer", missing))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert cli.main(["serve", "--slides", "slides", "--checkpoint", "run"]) == 2
    assert f"the viewer needs {missing}: pip install pathflip-jax[viewer]" in capsys.readouterr().err

"""The viewer behind a reverse proxy: under a path and a name of the proxy's, and nothing looser than without one."""

import asyncio
import contextlib
import re
import threading
from urllib.parse import urljoin

import httpx2
import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from pathflip_jax import cli
from pathflip_jax.viewer.access import Access, choose_token
from pathflip_jax.viewer.proxy import DIRECT, Proxy, read_proxy
from pathflip_jax.viewer.search import Search
from pathflip_jax.viewer.server import listen, make_app, make_server

TOKEN = "a-token-of-this-viewer"
PUBLIC = "hub.example.org"
PREFIX = "/user/me@lab/proxy/8000"


@contextlib.contextmanager
def serving(server: uvicorn.Server):
    """A server that runs on a free port; its address."""
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def reverse_proxy(target: str, strip: bool) -> uvicorn.Server:
    """A small one: Host is passed on, as jupyter-server-proxy does; the prefix is passed on or taken off."""

    client = httpx2.AsyncClient(base_url=target)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        async with client:
            yield

    async def forward(request):
        path = request.url.path.removeprefix(PREFIX) if strip else request.url.path
        headers = {**request.headers, "x-forwarded-host": request.headers["host"], "x-forwarded-proto": "https"}
        body, query = await request.body(), request.query_params
        answer = await client.request(request.method, path, params=query, headers=headers, content=body)
        own = ("content-encoding", "content-length")  # of the answer as it came: here it is decoded
        kept = {name: value for name, value in answer.headers.items() if name not in own}
        return Response(answer.content, answer.status_code, kept)

    app = Starlette(routes=[Route(f"{PREFIX}{{path:path}}", forward, methods=["GET", "POST"])], lifespan=lifespan)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning"))


@pytest.fixture
def embedded(session):
    """The session with nothing left to embed."""
    session.search = Search(session.slides, {0: np.ones(16, np.float32)})
    return session


@pytest.mark.parametrize("strip", [True, False])
def test_all_of_the_page_works_through_a_proxy(embedded, strip):
    proxy = read_proxy([PUBLIC], PREFIX)
    headers = {"host": PUBLIC}
    with serving(make_server(make_app(embedded, "", True, proxy))) as viewer:
        with serving(reverse_proxy(viewer, strip)) as outside, httpx2.Client(headers=headers, timeout=60) as client:
            home = f"{outside}{PREFIX}/"
            page = client.get(home)
            assert page.status_code == 200 and "<title>PathFLIP viewer</title>" in page.text
            links = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
            assert len(links) > 8 and all(client.get(urljoin(home, link)).status_code == 200 for link in links)
            for path in ("slides/0/slide.json", "slides/0/tiles/9/1_1.jpg", "slides/0/thumbnail.jpg", "search"):
                assert client.get(home + path).status_code == 200, path
            for path, body in (("slides/0/layer", {"text": "fat"}), ("find", {"text": "fat"})):
                assert client.post(home + path, json=body).status_code == 200, path
            assert client.get(home + "nothing").status_code == client.get(outside + "/slides.js").status_code == 404
            assert client.get(home, headers={"host": "evil.example"}).status_code == 421
            if not strip:
                bare = client.get(f"{outside}{PREFIX}?a=b")
                assert urljoin(home[:-1], bare.headers["location"]).startswith(home), "links of the page need the slash"


def test_a_token_enters_through_a_proxy_by_any_name(embedded):
    proxy = read_proxy([], PREFIX, trusted=[])
    with serving(make_server(make_app(embedded, TOKEN, True, proxy))) as viewer:
        with serving(reverse_proxy(viewer, True)) as outside, httpx2.Client(headers={"host": PUBLIC}) as client:
            home = f"{outside}{PREFIX}/"
            assert client.get(home).status_code == client.get(f"{home}?token=wrong").status_code == 421
            entered = client.get(f"{home}?token={TOKEN}")
            assert entered.status_code == 303 and urljoin(home, entered.headers["location"]) == home
            cookie = entered.headers["set-cookie"]
            assert "; Path=/user;" in cookie and "Secure" in cookie and "HttpOnly" in cookie and "=lax" in cookie
            (name,) = re.findall(r"(pathflip-\w+)=", cookie)
            assert client.get(home, headers={"cookie": f"{name}={TOKEN}"}).status_code == 200


def ask(proxy: Proxy, path="/", token="", peer="127.0.0.1", **headers):
    """Status, headers and body of an answer by `Access`, before an application that says which path it was asked."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    sent = []

    async def send(message):
        sent.append(message)

    path, _, query = path.partition("?")
    sides = ({"host": "localhost"} | headers).items()
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in sides]
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": raw}
    scope["client"] = (peer, 1)
    asyncio.run(Access(app, choose_token("127.0.0.1", token or None), True, proxy)(scope, None, send))
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]).decode()


@pytest.mark.parametrize(
    ("host", "named", "anonymous", "with_token"),
    [
        ("localhost:8000", 200, 200, 200),
        ("hub.example.org", 200, 421, 200),
        ("HUB.example.org.:443", 200, 421, 200),
        ("evil.example", 421, 421, 200),
        ("hub.example.org.evil.example", 421, 421, 200),
        ("", 421, 421, 200),
    ],
)
def test_a_name_must_be_given_unless_the_token_is(host, named, anonymous, with_token):
    assert ask(read_proxy([PUBLIC]), host=host)[0] == named
    status, _, said = ask(DIRECT, host=host)
    assert status == anonymous and (status == 200 or ("--public-name" in said and "--token" in said))
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert ask(DIRECT, host=host, token=TOKEN, **bearer)[0] == with_token
    assert ask(DIRECT, host=host, token=TOKEN, authorization="Bearer no")[0] in (401, 421)


def test_a_forwarded_name_can_only_forbid():
    """A page elsewhere whose name points here can write any header but Host."""
    trusting = read_proxy([PUBLIC], trusted=[])
    assert ask(trusting, host="evil.example", x_forwarded_host="localhost")[0] == 421
    assert ask(trusting, host="localhost", x_forwarded_host="evil.example")[0] == 421
    assert ask(trusting, host="localhost", x_forwarded_host=f"{PUBLIC}:443, localhost")[0] == 200
    for proxy, peer in ((read_proxy([PUBLIC]), "127.0.0.1"), (trusting, "10.0.0.7")):  # nobody's word is taken
        assert ask(proxy, peer=peer, x_forwarded_host="evil.example")[0] == 200


@pytest.mark.parametrize(
    ("proxy", "headers", "expected"),
    [
        (DIRECT, {"x_forwarded_proto": "https"}, {"Path=/", "SameSite=lax"}),
        (read_proxy(trusted=[]), {"x_forwarded_proto": "https"}, {"Path=/", "SameSite=lax", "Secure"}),
        (read_proxy(root_path="/a/b/", trusted=[]), {"x_forwarded_prefix": "/c"}, {"Path=/a/b", "SameSite=lax"}),
        (read_proxy(trusted=[]), {"x_forwarded_prefix": "/c/d/"}, {"Path=/c/d", "SameSite=lax"}),
        (read_proxy(trusted=[]), {"x_forwarded_prefix": "/c; Domain=org"}, {"Path=/", "SameSite=lax"}),
        (read_proxy(trusted=["10.0.0.0/8"]), {"x_forwarded_proto": "https"}, {"Path=/", "SameSite=lax"}),
        (read_proxy(frames=["https://lab.org"]), {}, {"Path=/", "SameSite=lax"}),
        (
            read_proxy(frames=["https://lab.org"], trusted=["127.0.0.1"]),
            {"x_forwarded_proto": "https"},
            {"Path=/", "SameSite=none", "Secure"},
        ),
        (
            read_proxy(frames=["self"], trusted=["127.0.0.1"]),
            {"x_forwarded_proto": "https"},
            {"Path=/", "SameSite=lax", "Secure"},
        ),
    ],
)
def test_how_far_the_cookie_goes(proxy, headers, expected):
    status, found, _ = ask(proxy, f"/?token={TOKEN}", token=TOKEN, **headers)
    assert status == 303
    assert set(found["set-cookie"].split("; ")[1:]) == expected | {"HttpOnly"}


@pytest.mark.parametrize(
    ("prefix", "path", "inner"),
    [
        ("", "/slides/0/slide.json", "/slides/0/slide.json"),
        ("/p/q", "/p/q/slides/0/slide.json", "/slides/0/slide.json"),
        ("/p/q", "/slides/0/slide.json", "/slides/0/slide.json"),
        ("/p/q/", "/p/q/", "/"),
        ("/p/q", "/p/qq/", "/p/qq/"),
        ("/me%40lab", "/me@lab/find", "/find"),
        ("/slides", "/slides/0/slide.json", "/slides/0/slide.json"),  # taken off by the proxy
        ("/slides", "/slides/slides/0/slide.json", "/slides/0/slide.json"),
        ("/page", "/page/app.js", "/page/app.js"),
    ],
)
def test_the_prefix_is_taken_off_once(prefix, path, inner):
    assert ask(read_proxy(root_path=prefix), path)[2] == inner


def test_the_prefix_alone_gets_its_slash():
    status, headers, _ = ask(read_proxy(root_path="/p/q"), "/p/q")
    assert (status, headers["location"]) == (303, "./q/")
    status, headers, _ = ask(read_proxy(root_path="/p/q"), f"/p/q?a=1&token={TOKEN}", token=TOKEN)
    assert (status, headers["location"]) == (303, "./q/?a=1")


def test_frames_are_refused_but_those_of_named_pages():
    def ancestors(proxy):
        policy = ask(proxy)[1]["content-security-policy"]
        return re.search(r"frame-ancestors ([^;]*);", policy)[1]

    assert ancestors(DIRECT) == "'none'"
    assert ancestors(read_proxy(frames=["self", "https://*.lab.org:8443"])) == "'self' https://*.lab.org:8443"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--public-name", "https://hub.example.org"], "--public-name https://hub.example.org: expected a host name"),
        (["--public-name", "*"], "--public-name"),
        (["--public-name", ""], "--public-name"),
        (["--root-path", "user/me"], "--root-path user/me: expected the path"),
        (["--root-path", "/a/../b"], "--root-path"),
        (["--root-path", "/a b"], "--root-path"),
        (["--proxy-headers", "10.0.0.1/8"], "--proxy-headers 10.0.0.1/8: .*host bits"),
        (["--frame-ancestors", "*"], "--frame-ancestors .: expected self, or an origin"),
        (["--frame-ancestors", "https://a.org; script-src *"], "--frame-ancestors"),
    ],
)
def test_options_that_cannot_be_meant_are_named(options, message, capsys):
    assert cli.main(["serve", "--checkpoint", "run", "--records", "records", *options]) == cli.WRONG_INPUT
    assert re.search(message, capsys.readouterr().err)


def test_names_are_read_as_browsers_send_them():
    assert read_proxy(["Bücher.Example:443", "[::1]:80"]).names == {"xn--bcher-kva.example", "::1"}

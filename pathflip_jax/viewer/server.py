"""HTTP server of the viewer: the page, tiles, and model queries.

Requests name slides by number, tiles by three numbers, and files of the page by names that are looked up in a table: no
path is built from client input. A problem with one slide is reported as JSON with status 4xx, and the viewer keeps
running.
"""

import contextlib
import json
import socket
import sys
from collections.abc import Callable
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pathflip_jax.data.storage.json_values import parse_json
from pathflip_jax.viewer.access import Access, is_local
from pathflip_jax.viewer.intake import Waiting
from pathflip_jax.viewer.page_files import page_files
from pathflip_jax.viewer.pictures import READERS
from pathflip_jax.viewer.proxy import DIRECT, Proxy
from pathflip_jax.viewer.session import Session

LONGEST_BODY = 2**16  # maximum size of a request body, in bytes
NOT_STORED = {"cache-control": "no-store"}
CONCURRENT_REQUESTS = 8  # requests that read features or query the model; further ones wait
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".svg": "image/svg+xml",
}


def make_app(session: Session, token: str = "", local: bool = True, proxy: Proxy = DIRECT) -> Starlette:
    """Viewer as an ASGI application; if `local`, it accepts only the host names of this machine and of `proxy`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        session.search.start(session.grounder)
        if session.intake is not None:
            session.intake.start()
        yield
        if session.intake is not None:
            await anyio.to_thread.run_sync(session.intake.stop)
        await anyio.to_thread.run_sync(session.search.stop)
        session.pictures.close()

    return Starlette(
        routes=_Endpoints(session).routes(),
        middleware=[
            Middleware(Access, token=token, local=local, proxy=proxy),
            Middleware(GZipMiddleware, minimum_size=2048),
        ],
        lifespan=lifespan,
    )


class _Endpoints:
    """Endpoints that call a session in threads, a few at a time."""

    def __init__(self, session: Session) -> None:
        self.session, self.files = session, page_files()
        self.tile_limit, self.work_limit = anyio.CapacityLimiter(READERS), anyio.CapacityLimiter(CONCURRENT_REQUESTS)

    def routes(self) -> list[Route]:
        session, slide = self.session, "/slides/{number:int}"
        tile = f"{slide}/tiles/{{level:int}}/{{column:int}}_{{row:int}}.jpg"
        return [
            Route("/", self.index),
            Route("/index.html", self.index),
            Route("/page/{name}", self.page_file),
            Route("/slides.js", self.slides),
            Route(f"{slide}/thumbnail.jpg", self.picture(session.pictures.thumbnail)),
            Route(tile, self.picture(session.pictures.tile)),
            Route(f"{slide}/slide.json", self.answered(session.slide)),
            Route(f"{slide}/patches.json", self.answered(session.patches)),
            Route(f"{slide}/layer", self.answered(self.layer), methods=["POST"]),
            Route(f"{slide}/areas", self.answered(self.areas), methods=["POST"]),
            Route(f"{slide}/report", self.answered(self.report), methods=["POST"]),
            Route(f"{slide}/answer", self.answered(self.answer), methods=["POST"]),
            Route("/slides.json", self.answered(session.table)),
            Route("/search", self.answered(lambda **_: session.search.progress())),
            Route("/find", self.answered(self.find), methods=["POST"]),
        ]

    async def index(self, request: Request) -> Response:
        return _file("index.html", self.files["index.html"])

    async def page_file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.files:
            return _error(404, f"the page has no file {name!r:.80}")
        return _file(name, self.files[name])

    async def slides(self, request: Request) -> Response:
        script = f"globalThis.PATHFLIP = {json.dumps(self.session.page())};\n"
        return Response(script, media_type=MEDIA_TYPES[".js"], headers=NOT_STORED)

    def picture(self, read: Callable[..., bytes]) -> Callable:
        """Endpoint of an image that `read` reads from a slide file."""

        async def answer(request: Request) -> Response:
            path = self.session.slides[request.path_params["number"]].image
            if path is None:
                return _error(404, "this slide has no slide file")
            numbers = [request.path_params[name] for name in ("level", "column", "row") if name in request.path_params]
            data = await anyio.to_thread.run_sync(read, path, *numbers, limiter=self.tile_limit)
            return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=300"})

        return _guard(self.session, answer)

    def answered(self, work: Callable[..., Any]) -> Callable:
        """Endpoint of a call that returns JSON: its arguments are the slide and the request's body."""

        async def answer(request: Request) -> Response:
            body = await _body(request) if request.method == "POST" else {}
            number = [request.path_params["number"]] if "number" in request.path_params else []
            found = await anyio.to_thread.run_sync(lambda: work(*number, **body), limiter=self.work_limit)
            return JSONResponse(found, headers=NOT_STORED)

        return _guard(self.session, answer)

    def layer(self, number: int, text: str = "", negative: list[str] = (), **_) -> dict:
        return self.session.layer(number, _text(text), _texts(negative))

    def areas(self, number: int, text: str = "", negative: list[str] = (), threshold: float = 50, **_) -> dict:
        return self.session.areas(number, _text(text), _texts(negative), _percent(threshold))

    def find(self, text: str = "", **_) -> dict:
        return self.session.find(_text(text))

    def report(self, number: int, **_) -> dict:
        return self.session.report(number)

    def answer(self, number: int, question: str = "", before: list = (), **_) -> dict:
        return self.session.answer(number, _text(question), _turns(before))


def _guard(session: Session, answer: Callable) -> Callable:
    """Wrap an endpoint: errors as JSON, and 404 for a slide that is not in the table."""

    async def guarded(request: Request) -> Response:
        number = request.path_params.get("number", -1)
        if number >= len(session.slides):
            return _error(
                404, f"no slide number {number}; this viewer has {len(session.slides)} slides, counted from 0"
            )
        try:
            return await answer(request)
        except Waiting as error:
            return JSONResponse({"encoding": error.progress}, 202, headers=NOT_STORED)
        except FileNotFoundError as error:
            return _error(410, str(error))
        except IndexError as error:
            return _error(404, str(error))
        except (ValueError, TypeError, OSError) as error:
            return _error(422, str(error))
        except MemoryError as error:
            return _error(503, f"{error}; open a smaller slide, or run the viewer on a machine with more memory")

    return guarded


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers=NOT_STORED)


def _file(name: str, data: bytes) -> Response:
    kind = MEDIA_TYPES.get(name[name.rfind(".") :], "application/octet-stream")
    return Response(data, media_type=kind, headers={"cache-control": "no-cache"})


async def _body(request: Request) -> dict[str, Any]:
    """JSON object of a request. The content type must be JSON too, which a form on another site cannot send."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ValueError("expected a body of type application/json")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > LONGEST_BODY:
            raise ValueError(f"the request has more than {LONGEST_BODY} bytes; send a shorter text")
    found = parse_json(data.decode("utf-8")) if data else {}
    if not isinstance(found, dict) or "number" in found:
        raise ValueError("expected a JSON object")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text, found {value!r:.80}")
    return value


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"expected a list of texts, found {values!r:.80}")
    return [_text(value) for value in values]


def _turns(values: Any) -> list[tuple[str, str]]:
    if not isinstance(values, list | tuple) or any(not isinstance(turn, list) or len(turn) != 2 for turn in values):
        raise ValueError("expected a list of questions with their answers")
    return [(_text(asked), str(answered)) for asked, answered in values]


def _percent(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise ValueError(f"threshold {value!r:.80}: expected a number from 0 to 100")
    return float(value)


def listen(host: str, port: int) -> socket.socket:
    """Open a socket listening on an address. Raises OSError if it is in use or does not belong to this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(256)
    except OSError as error:
        found.close()
        raise OSError(
            f"{host}, port {port}: cannot listen on this address ({error.strerror}); choose another --port (0: any "
            "free port) or --host, or stop the program that uses it"
        ) from None
    return found


def make_server(app: Starlette) -> uvicorn.Server:
    """Server of the viewer; X-Forwarded headers are left to `Access`, which knows the trusted proxies."""
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3, proxy_headers=False)
    )


def run(session: Session, listener: socket.socket, token: str, proxy: Proxy = DIRECT) -> None:
    """Run the server until ctrl-C or SIGTERM."""
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    query = f"?token={token}" if token else ""
    print(f"{len(session.slides)} slides at http://{name}:{port}/{query} (press Ctrl-C to stop)", flush=True)
    for public in sorted(proxy.names):
        print(f"through the proxy: {public}{proxy.prefix}/{query}", flush=True)
    if proxy.names and not token:
        warning = "everyone whom the proxy admits can see the slides; make the proxy authenticate users, or add --token"
        print(f"pathflip: {warning}", file=sys.stderr, flush=True)
    app = make_app(session, token, is_local(host), proxy)
    with contextlib.suppress(KeyboardInterrupt):
        make_server(app).run(sockets=[listener])

"""Access control of the viewer: this machine, or whoever holds its token.

Slides are patients' data. A viewer on the loopback address answers to the names of that address, to those that it was
given, and to who has its token: a web page elsewhere that points a name of its own at this machine (DNS rebinding) has
neither. On any other address it wants a token.
"""

import hashlib
import ipaddress
import secrets
from urllib.parse import parse_qsl, quote, urlencode

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pathflip_jax.viewer.proxy import DIRECT, Proxy

SHORTEST_TOKEN = 16
WANTS_TOKEN = "This viewer needs its token: open the address that `pathflip serve` printed, which ends in ?token=...\n"
# The name is not repeated: whoever sent it chose it.
WRONG_NAME = (
    "This viewer does not answer to the name in this address. If it is meant to, start it with that name (pathflip "
    "serve --public-name NAME), or with a token (--token) and open the address that it prints, with this name in it.\n"
)
NOBODY = ("'none'",)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def safety_headers(frames: tuple[str, ...]) -> dict[str, str]:
    """The headers of every answer; `frames` are whose pages may show the viewer within them."""
    # OpenSeadragon sets styles of elements inline; scripts come from files alone.
    policy = (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        f"frame-ancestors {' '.join(frames or NOBODY)}; base-uri 'none'; form-action 'none'"
    )
    return {"content-security-policy": policy} | HEADERS


def is_local(host: str) -> bool:
    """Whether an address to listen at is this machine's own, which nobody else can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def choose_token(host: str, given: str | None) -> str:
    """The token that the viewer wants: the given one, a new one for an address that others reach, else none.

    Raises ValueError for one that is short enough to guess.
    """
    if given is None:
        return "" if is_local(host) else secrets.token_urlsafe(24)
    if len(given) < SHORTEST_TOKEN or not given.isascii():
        raise ValueError(
            f"--token has {len(given)} characters: expected {SHORTEST_TOKEN} or more, all ASCII, that nobody can guess"
        )
    return given


class Access:
    """ASGI middleware that lets through who may ask, and puts the safety headers on what goes out."""

    def __init__(self, app: ASGIApp, token: str, local: bool, proxy: Proxy = DIRECT) -> None:
        self.app, self.token, self.local, self.proxy = app, token, local, proxy
        self.headers = [(name.encode(), value.encode()) for name, value in safety_headers(proxy.frames).items()]
        self.cookie = "pathflip-" + hashlib.sha256(token.encode()).hexdigest()[:12]  # one for each viewer of a machine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", []), *self.headers]}
            await send(message)

        inner = self.proxy.inner_path(scope)
        answer = self._refusal(scope) or (_redirect(scope, "/") if inner is None else self.app)
        await answer(scope | {"path": inner or scope["path"]}, receive, send_safely)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        asked = dict(query).get("token", "")
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer if kind.lower() == "bearer" else cookie_parser(headers.get("cookie", "")).get(self.cookie, "")
        entered = scope["method"] == "GET" and self._is_token(asked)
        holds = entered or self._is_token(given)
        if self.local and not holds and self.proxy.refused_name(scope) is not None:
            return PlainTextResponse(WRONG_NAME, 421)
        if self.token and not holds:
            return PlainTextResponse(WANTS_TOKEN, 401, {"www-authenticate": "Bearer"})
        if not entered:
            return None
        # The token leaves the address bar, and history, for a cookie that scripts cannot read.
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        slash = "/" if self.proxy.inner_path(scope) is None else ""
        response = _redirect(scope, slash + (f"?{rest}" if rest else ""))
        response.set_cookie(self.cookie, self.token, httponly=True, **self.proxy.cookie(scope))
        return response

    def _is_token(self, given: str) -> bool:
        return bool(self.token and given) and secrets.compare_digest(given.encode(), self.token.encode())


def _redirect(scope: Scope, end: str) -> Response:
    """The same address with another end, relative: what stands before it is a proxy's affair."""
    return RedirectResponse("./" + quote(scope["path"].rpartition("/")[2]) + end, 303)

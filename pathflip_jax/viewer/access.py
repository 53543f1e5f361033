"""Who may ask the viewer: this machine, or who holds its token.

Slides are patients' data. A viewer on the loopback address answers to the names of that address only, so that a web
page elsewhere cannot reach it by a name of its own (DNS rebinding); on any other address it wants a token.
"""

import hashlib
import ipaddress
import secrets
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
SHORTEST_TOKEN = 16
WANTS_TOKEN = "This viewer wants its token: open the address that it printed when it started (?token= is its end).\n"
HEADERS = {
    # OpenSeadragon sets styles of elements inline; scripts come from files alone.
    "content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


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
            f"--token of {len(given)} characters: expected {SHORTEST_TOKEN} or more of ASCII, not to guess"
        )
    return given


class Access:
    """ASGI middleware that lets through who may ask, and puts the safety headers on what goes out."""

    def __init__(self, app: ASGIApp, token: str, local: bool) -> None:
        self.app, self.token, self.local = app, token, local
        self.cookie = "pathflip-" + hashlib.sha256(token.encode()).hexdigest()[:12]  # one for each viewer of a machine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message.get("headers", []), *own]}
            await send(message)

        await (self._refusal(scope) or self.app)(scope, receive, send_safely)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self.local and _name(headers.get("host", "")) not in LOCAL_NAMES:
            return PlainTextResponse("This viewer answers to the names of its own machine only.\n", 421)
        if not self.token:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        asked = dict(query).get("token")
        if asked is not None and scope["method"] == "GET" and self._is_token(asked):
            # The token leaves the address bar, and history, for a cookie that scripts cannot read.
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            response = RedirectResponse("./" + (f"?{rest}" if rest else ""), 303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
            return response
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        given = bearer if kind.lower() == "bearer" else cookie_parser(headers.get("cookie", "")).get(self.cookie, "")
        return None if self._is_token(given) else PlainTextResponse(WANTS_TOKEN, 401, {"www-authenticate": "Bearer"})

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()

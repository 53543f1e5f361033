"""Access control of the viewer: requests from this machine, or with the viewer's token.

Slides are patient data. A viewer on the loopback address accepts requests for the host names of that address and for
configured host names, and requests with its token. A foreign web page that resolves its own host name to this machine
(DNS rebinding) has neither. On any other address a token is required.
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
TOKEN_REQUIRED = (
    "This viewer requires its token: open the address that `pathflip serve` printed, which ends in ?token=...\n"
)
# The name is not echoed: the client controls it.
UNKNOWN_HOST = (
    "This viewer is not configured for the host name in this address. To use that name, start the viewer with it "
    "(pathflip serve --public-name NAME), or with a token (--token) and open the address that it prints, with that "
    "name in it.\n"
)
NO_SITES = ("'none'",)
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


def safety_headers(frames: tuple[str, ...]) -> dict[str, str]:
    """Security headers of every response; `frames` are the sites that may embed the viewer."""
    # OpenSeadragon sets inline styles; scripts come only from files.
    policy = (
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        f"frame-ancestors {' '.join(frames or NO_SITES)}; base-uri 'none'; form-action 'none'"
    )
    return {"content-security-policy": policy} | HEADERS


def is_local(host: str) -> bool:
    """Whether a listening address is a loopback address, unreachable from other machines."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def choose_token(host: str, given: str | None) -> str:
    """Token that requests need: the given one, a new one for an address that others can reach, else none.

    Raises ValueError for a token short enough to guess.
    """
    if given is None:
        return "" if is_local(host) else secrets.token_urlsafe(24)
    if len(given) < SHORTEST_TOKEN or not given.isascii():
        raise ValueError(
            f"--token has {len(given)} characters: expected {SHORTEST_TOKEN} or more ASCII characters, hard to guess"
        )
    return given


class Access:
    """ASGI middleware that admits authorised requests, and adds the security headers to responses."""

    def __init__(self, app: ASGIApp, token: str, local: bool, proxy: Proxy = DIRECT) -> None:
        self.app, self.token, self.local, self.proxy = app, token, local, proxy
        self.headers = [(name.encode(), value.encode()) for name, value in safety_headers(proxy.frames).items()]
        self.cookie = (
            "pathflip-" + hashlib.sha256(token.encode()).hexdigest()[:12]
        )  # one name for each viewer on a machine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or refuse it."""
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
            return PlainTextResponse(UNKNOWN_HOST, 421)
        if self.token and not holds:
            return PlainTextResponse(TOKEN_REQUIRED, 401, {"www-authenticate": "Bearer"})
        if not entered:
            return None
        # Moves the token from the address bar and history to a cookie that scripts cannot read.
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        slash = "/" if self.proxy.inner_path(scope) is None else ""
        response = _redirect(scope, slash + (f"?{rest}" if rest else ""))
        response.set_cookie(self.cookie, self.token, httponly=True, **self.proxy.cookie(scope))
        return response

    def _is_token(self, given: str) -> bool:
        return bool(self.token and given) and secrets.compare_digest(given.encode(), self.token.encode())


def _redirect(scope: Scope, end: str) -> Response:
    """Redirect to the same address with another last segment; relative, because a proxy may add a prefix."""
    return RedirectResponse("./" + quote(scope["path"].rpartition("/")[2]) + end, 303)

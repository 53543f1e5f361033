"""Access to a viewer through a proxy: its public names, its path, and the sites that may embed it.

A proxy terminates TLS and authenticates users. The viewer still refuses host names that are not configured, because a
foreign page may resolve its own host name to this machine (DNS rebinding).
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.types import Scope

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# First segments of the viewer's paths: a path without its prefix begins with one of them.
VIEWER_PATHS = frozenset({"", "index.html", "page", "slides.js", "slides", "search", "find"})
_ORIGIN = re.compile(r"https?://(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:\d{1,5})?", re.IGNORECASE)
_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,=:@%-]+)+")
_PLAIN = re.compile(r"[A-Za-z0-9._~-]+")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Proxy:
    """Proxy settings of a viewer, as validated by `read_proxy`."""

    names: frozenset[str] = frozenset()
    prefix: str = ""
    trusted: tuple[Network, ...] = ()
    frames: tuple[str, ...] = ()

    def refused_name(self, scope: Scope) -> str | None:
        """Host name of the request that is not configured for this viewer; None if all are.

        The Host header is checked even if a proxy forwards another, because a browser can forge the forwarded header.
        """
        headers = Headers(scope=scope)
        names = [headers.get("host", "")]
        if self.trusts(scope):
            names += [name for value in headers.getlist("x-forwarded-host") for name in value.split(",")]
        known = LOCAL_NAMES | self.names
        return next((name for name in map(host_name, names) if name not in known), None)

    def trusts(self, scope: Scope) -> bool:
        """Whether the request came from a trusted proxy."""
        try:
            peer = ipaddress.ip_address((scope.get("client") or ("",))[0])
        except ValueError:
            return False
        peer = getattr(peer, "ipv4_mapped", None) or peer
        return any(peer in network for network in self.trusted)

    def is_https(self, scope: Scope) -> bool:
        """Whether the browser uses TLS, to the viewer or to the proxy."""
        forwarded = Headers(scope=scope).get("x-forwarded-proto", "") if self.trusts(scope) else ""
        return "https" in (scope.get("scheme"), forwarded.partition(",")[0].strip().lower())

    def prefix_of(self, scope: Scope) -> str:
        """Path prefix under which the browser sees the viewer, "" for the root."""
        forwarded = Headers(scope=scope).get("x-forwarded-prefix", "").rstrip("/") if self.trusts(scope) else ""
        return self.prefix or (forwarded if _is_path(forwarded) else "")

    def inner_path(self, scope: Scope) -> str | None:
        """Path of a request without the prefix, which some proxies keep and others strip.

        None for the prefix alone, without the trailing slash that the page's relative links need.
        """
        path, prefix = scope["path"], unquote(self.prefix_of(scope))
        rest = path.removeprefix(prefix)
        if not prefix or rest == path:
            return path
        if not rest:
            return None
        return rest if rest.startswith("/") and rest.split("/")[1] in VIEWER_PATHS else path

    def cookie(self, scope: Scope) -> dict[str, str | bool]:
        """Scope of this viewer's cookie, without other applications behind the same proxy and unencrypted connections.

        Browsers send a cookie from a page embedded in another site only with SameSite=None, and then only over TLS.
        """
        plain = []
        for part in self.prefix_of(scope).split("/")[1:]:
            if not _PLAIN.fullmatch(part):  # browsers may encode it differently: the parent path suffices
                break
            plain.append(part)
        https = self.is_https(scope)
        framed = https and any(frame != "'self'" for frame in self.frames)
        return {"path": "/" + "/".join(plain), "secure": https, "samesite": "none" if framed else "lax"}


DIRECT = Proxy()


def read_proxy(
    names: Sequence[str] = (), root_path: str = "", trusted: Sequence[str] | None = None, frames: Sequence[str] = ()
) -> Proxy:
    """Validate the proxy options of `pathflip serve`. Raises ValueError for an implausible one.

    `trusted` are addresses or networks of proxies whose X-Forwarded headers are trusted; empty: those of this machine.
    """
    networks = ["127.0.0.0/8", "::1/128"] if trusted is not None and not trusted else trusted or ()
    return Proxy(
        frozenset(map(_public_name, names)),
        _prefix(root_path),
        tuple(map(_network, networks)),
        tuple(map(_frame, frames)),
    )


def host_name(host: str) -> str:
    """Host name in a Host header, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _public_name(name: str) -> str:
    try:
        found = host_name(name).encode("idna").decode()  # as browsers send it
    except UnicodeError:
        found = ""
    if not re.fullmatch(r"[a-z0-9._:-]+", found) or "/" in name or "*" in name:
        raise ValueError(f"--public-name {name}: expected a host name only, such as hub.example.org")
    return found


def _prefix(path: str) -> str:
    found = path.rstrip("/")
    if found and not _is_path(found):
        raise ValueError(f"--root-path {path}: expected the path of the viewer's address, such as /user/me/proxy/8000")
    return found


def _is_path(path: str) -> bool:
    return bool(_PATH.fullmatch(path)) and not {".", ".."} & set(unquote(path).split("/"))


def _network(address: str) -> Network:
    try:
        return ipaddress.ip_network(address)
    except ValueError as error:
        raise ValueError(
            f"--proxy-headers {address}: {error}; expected addresses or networks of proxies, such as 10.0.0.0/8"
        ) from None


def _frame(origin: str) -> str:
    if origin == "self":
        return "'self'"
    if not _ORIGIN.fullmatch(origin):
        raise ValueError(f"--frame-ancestors {origin}: expected self, or an origin such as https://hub.example.org")
    return origin

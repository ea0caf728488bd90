"""The URLs of this server: which programs are told, and which callers.

A `Host` header is whatever its sender writes, and for public URLs that is anybody. A program trusts ERA_BASE_URL, and
may send its owner's key there. So a name from a request gets to programs only if it can't lead elsewhere: loopback,
names below `localhost` (RFC 6761), the configured name, the very address that was called.

In a cluster it is the host that was called who knows that. So it says so to the session's home (hop.py).
"""

from __future__ import annotations

import re
from ipaddress import IPv6Address, ip_address

from starlette.requests import Request

from era.settings import Settings

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.IGNORECASE)


def base_url(request: Request, settings: Settings) -> str:
    """The URL for the programs of one run: the setting `public_url`, or else the one that the caller used, if that is
    certain to be this server's, or else the address served. For a call that another host passes on, that host's."""
    if (hop := request.scope["state"].get("hop")) is not None:
        return hop.base_url or served_url(request, settings)
    host = request.headers.get("host", "")
    is_site = "site" in request.scope["state"]  # a name of a session's, not of the API's
    if not settings.public_url and not is_site and _is_verified(host, request, settings):
        return f"{request.scope['scheme']}://{host.lower()}"
    return served_url(request, settings)


def served_url(request: Request, settings: Settings) -> str:
    """The URL for programs that serve many callers: the setting `public_url`, or else the address served, by this host
    of a cluster. Nothing of what the request says is in it."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    address, port = _served(request, settings)
    name = settings.host if not _is_any(settings.host) else address
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def called_url(request: Request, settings: Settings) -> str:
    """The URL for the answer to an authenticated caller: the setting `public_url`, or else the one that it used."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    host = request.headers.get("host")
    return f"{request.scope['scheme']}://{host}" if host else served_url(request, settings)


def served_port(request: Request, settings: Settings) -> int:
    """The port at which the request has arrived, at the host that was called."""
    if (hop := request.scope["state"].get("hop")) is not None and hop.port is not None:
        return int(hop.port)
    return _served(request, settings)[1]


def _is_verified(host: str, request: Request, settings: Settings) -> bool:
    """Whether this `Host` can only mean this server."""
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match[1].strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    if name == settings.host.lower():
        return not _is_any(name)
    try:
        return ip_address(name).is_loopback or name == _served(request, settings)[0]
    except ValueError:
        return False


def _served(request: Request, settings: Settings) -> tuple[str, int]:
    """The address and port at which the request has arrived."""
    address, port = request.scope.get("server") or (settings.host, settings.port)
    try:
        parsed = ip_address(address)
    except ValueError:
        return address, port
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return str(mapped or parsed), port


def _is_any(host: str) -> bool:
    """Whether a server listens on all addresses with this setting."""
    try:
        return ip_address(host).is_unspecified
    except ValueError:
        return False

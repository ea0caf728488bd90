"""Routes of the web pages: the dashboard at `/`, `/docs`, their assets, and the guide at `/docs/guide`.

They are files, read when they are first asked for and kept in memory: those of era/web as they are written, and those
of era/web/dashboard as the build makes them of the sources in web/. A checkout in which nothing was built yet serves a
page that says how. The guide, which scripts/guide.py makes of the pages in docs/, is larger and seldom read, so it
stays on disk.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from era.api.context import UseContext
from era.errors import NotFound

router = APIRouter(include_in_schema=False)

_WEB = Path(__file__).resolve().parent.parent / "web"
_DASHBOARD = _WEB / "dashboard"
_GUIDE = _WEB / "guide"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".bcmap": "application/octet-stream",
    ".pfb": "application/octet-stream",
    ".ttf": "font/ttf",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
# The pages load scripts and styles from this server only, connect to nothing else and can't be framed. Inline are only
# those that the dashboard's page was built with, each named by its digest. So even if text from a session were taken
# for HTML by mistake, it could do nothing.
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
# The dashboard shows pictures that it has fetched with its key, and sites of sessions, in frames that are sandboxed.
_DASHBOARD_POLICY = _POLICY | {"img-src": "'self' blob: data:", "frame-src": "'self' http://*.localhost:*"}
# The guide's styles have its icons in them.
_GUIDE_POLICY = _POLICY | {"img-src": "'self' data:"}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_ASK_EACH_TIME = "no-cache"  # browsers keep it, but ask each time; thanks to the ETag the answer is a short 304
_FOR_GOOD = "public, max-age=31536000, immutable"
_HASHED = re.compile(r".+-[0-9A-Z]{8}\.(m?js|css)")
"""Names that the dashboard's build gives: with a digest of the content."""
_INLINE = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)
"""What the dashboard's page has in itself. A browser takes the digest of just what is between the tags."""
_IN_GUIDE = re.compile(r"(?:[\w-]+/)*[\w-]+(?:\.[\w-]+)*", re.ASCII)
"""Paths within the guide: no segment begins with a dot."""


@dataclass(frozen=True, slots=True)
class _File:
    name: str
    content: bytes
    headers: dict[str, str]


@cache
def _names(directory: Path) -> frozenset[str]:
    """The names of the files in a directory; none if there is no such directory."""
    return frozenset(path.name for path in directory.iterdir()) if directory.is_dir() else frozenset()


def _file(directory: Path, name: str, public_host: str | None = None) -> _File | None:
    """A file of the pages in a directory; None if there is none. Sessions have their sites below `public_host`, too."""
    return _kept(directory, name, public_host) if name in _names(directory) else None


@cache
def _kept(directory: Path, name: str, public_host: str | None) -> _File | None:
    policy = dict(_DASHBOARD_POLICY if directory == _DASHBOARD else _POLICY)
    if directory == _DASHBOARD and public_host:
        policy["frame-src"] += f" https://*.{public_host}"
    if directory == _DASHBOARD and name == "index.html":
        for kind, text in _INLINE.findall((directory / name).read_bytes()):
            digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
            policy[f"{kind.decode()}-src"] += f" 'sha256-{digest}'"
    return _read(directory / name, policy)


def _read(path: Path, policy: dict[str, str]) -> _File | None:
    """A file with the headers that it is served with; None if there is none, or none of a kind that pages have."""
    media_type = _TYPES.get(path.suffix)
    if media_type is None or not path.is_file():
        return None
    content = path.read_bytes()
    headers = {
        **_HEADERS,
        "Content-Security-Policy": "; ".join(f"{name} {source}" for name, source in policy.items()),
        "Content-Type": media_type,
        "Cache-Control": _FOR_GOOD if _HASHED.fullmatch(path.name) else _ASK_EACH_TIME,
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    }
    return _File(path.name, content, headers)


def _answer(request: Request, file: _File | None) -> Response:
    """A file of the pages, or 304 where the browser has it. Raises NotFound."""
    if file is None:
        raise NotFound("There is nothing at this path.", hint="See /docs for the paths there are.")
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.headers["ETag"] in known or "*" in known:
        return Response(status_code=304, headers=file.headers)
    return Response(file.content, headers=file.headers)


@router.api_route("/", methods=["GET", "HEAD"])
async def dashboard(request: Request, context: UseContext) -> Response:
    """The dashboard, or how to build it."""
    built = _file(_DASHBOARD, "index.html", context.settings.public_host)
    return _answer(request, built or _file(_WEB, "unbuilt.html"))


@router.api_route("/docs", methods=["GET", "HEAD"])
async def reference(request: Request) -> Response:
    """How to begin, and the API reference, drawn in the browser from /openapi.json."""
    return _answer(request, _file(_WEB, "docs.html"))


@router.api_route("/docs/guide", methods=["GET", "HEAD"])
async def guide() -> Response:
    """To the guide's first page, from whose path the links of its pages are relative."""
    return Response(status_code=307, headers={"Location": "/docs/guide/index.html", **_HEADERS})


@router.api_route("/docs/guide/{path:path}", methods=["GET", "HEAD"])
async def guide_file(path: str, request: Request) -> Response:
    """A page of the guide, or what belongs to it."""
    file = await asyncio.to_thread(_read, _GUIDE / path, _GUIDE_POLICY) if _IN_GUIDE.fullmatch(path) else None
    if file is None and not (_GUIDE / "index.html").exists():
        raise NotFound("The guide isn't built.", hint="`make setup` builds it; its pages are in docs/ as well.")
    return _answer(request, file)


@router.api_route("/assets/{name}", methods=["GET", "HEAD"])
async def asset(name: str, request: Request) -> Response:
    """Scripts, styles and icons. The pages themselves are served under their own paths only."""
    page = name.endswith(".html")
    return _answer(request, None if page else _file(_DASHBOARD, name) or _file(_WEB, name))

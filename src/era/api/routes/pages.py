"""Routes of the web pages: the dashboard at `/`, `/docs`, their assets, and the guide at `/docs/guide`.

They are files: those of era/web as they are written, those of era/web/dashboard as the build makes them of the sources
in web/, and those of era/web/guide as scripts/guide.py makes them of the pages in docs/. A checkout in which nothing
was built yet serves a page that says how.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request, Response

from era.api.routing.context import Context, UseContext
from era.errors import NotFound

router = APIRouter(include_in_schema=False)

_WEB = Path(__file__).resolve().parents[2] / "web"
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
"""What a page has in itself. A browser takes the digest of just what is between the tags."""
_PATH = re.compile(r"(?:[\w-]+/)*[\w-]+(?:\.[\w-]+)*", re.ASCII)
"""Paths within a directory of pages: no segment begins with a dot."""


def _read(path: Path, policy: dict[str, str]) -> tuple[bytes, dict[str, str]] | None:
    """A file and the headers that it is served with; None if there is none, or none of a kind that pages have."""
    media_type = _TYPES.get(path.suffix)
    if media_type is None or not path.is_file():
        return None
    content = path.read_bytes()
    policy = dict(policy)
    for kind, text in _INLINE.findall(content) if path.suffix == ".html" else ():
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        policy[f"{kind.decode()}-src"] += f" 'sha256-{digest}'"
    return content, {
        **_HEADERS,
        "Content-Security-Policy": "; ".join(f"{name} {source}" for name, source in policy.items()),
        "Content-Type": media_type,
        "Cache-Control": _FOR_GOOD if _HASHED.fullmatch(path.name) else _ASK_EACH_TIME,
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    }


async def _answer(request: Request, *places: tuple[Path, dict[str, str]]) -> Response:
    """The first of these files that is there, or 304 where the browser has it. Raises NotFound."""
    for path, policy in places:
        if (file := await asyncio.to_thread(_read, path, policy)) is not None:
            content, headers = file
            known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
            if headers["ETag"] in known or "*" in known:
                return Response(status_code=304, headers=headers)
            return Response(content, headers=headers)
    raise NotFound("There is nothing at this path.", hint="See /docs for the paths there are.")


def _of_dashboard(name: str, context: Context) -> tuple[Path, dict[str, str]]:
    """A file of the dashboard. Sessions have their sites below the server's public host, too."""
    host = context.settings.public_host
    frames = _DASHBOARD_POLICY["frame-src"] + (f" https://*.{host}" if host else "")
    return _DASHBOARD / name, _DASHBOARD_POLICY | {"frame-src": frames}


@router.api_route("/", methods=["GET", "HEAD"])
async def dashboard(request: Request, context: UseContext) -> Response:
    """The dashboard, or how to build it."""
    return await _answer(request, _of_dashboard("index.html", context), (_WEB / "unbuilt.html", _POLICY))


@router.api_route("/docs", methods=["GET", "HEAD"])
async def reference(request: Request) -> Response:
    """How to begin, and the API reference, drawn in the browser from /openapi.json."""
    return await _answer(request, (_WEB / "docs.html", _POLICY))


@router.api_route("/docs/guide", methods=["GET", "HEAD"])
async def guide() -> Response:
    """To the guide's first page, from whose path the links of its pages are relative."""
    return Response(status_code=307, headers={"Location": "/docs/guide/index.html", **_HEADERS})


@router.api_route("/docs/guide/{path:path}", methods=["GET", "HEAD"])
async def guide_file(path: str, request: Request) -> Response:
    """A page of the guide, or what belongs to it."""
    if not (_GUIDE / "index.html").exists():
        raise NotFound("The guide isn't built.", hint="`make setup` builds it; its pages are in docs/ as well.")
    return await _answer(request, *([(_GUIDE / path, _GUIDE_POLICY)] if _PATH.fullmatch(path) else []))


@router.api_route("/assets/{name}", methods=["GET", "HEAD"])
async def asset(name: str, request: Request, context: UseContext) -> Response:
    """Scripts, styles and icons. The pages themselves are served under their own paths only."""
    if name.endswith(".html") or not _PATH.fullmatch(name):
        return await _answer(request)
    return await _answer(request, _of_dashboard(name, context), (_WEB / name, _POLICY))

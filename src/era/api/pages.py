"""Routes of the web pages: `/`, `/docs` and their assets. They are files of era/web, read once and kept in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from era.errors import NotFound

router = APIRouter(include_in_schema=False)

_WEB = Path(__file__).resolve().parent.parent / "web"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# The pages load scripts and styles from this server only, run no inline ones, connect to nothing else and can't be
# framed. So even if text from a session were taken for HTML by mistake, it could do nothing.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # browsers keep them, but ask each time; thanks to the ETag the answer is a short 304
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


@cache
def _files() -> dict[str, _File]:
    """Every file of the pages by its name."""
    files = {}
    for path in _WEB.iterdir():
        if media_type := _TYPES.get(path.suffix):
            content = path.read_bytes()
            files[path.name] = _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return files


def _answer(request: Request, name: str) -> Response:
    """A file of the pages, or 304 where the browser has it. Raises NotFound."""
    file = _files().get(name)
    if file is None:
        raise NotFound("There is nothing at this path.", hint="See /docs for the paths there are.")
    headers = {**_HEADERS, "ETag": file.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if file.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


@router.api_route("/", methods=["GET", "HEAD"])
async def home(request: Request) -> Response:
    """The start page: what ERA is, the server's status, and a box to try it."""
    return _answer(request, "index.html")


@router.api_route("/docs", methods=["GET", "HEAD"])
async def reference(request: Request) -> Response:
    """The API reference, drawn in the browser from /openapi.json."""
    return _answer(request, "docs.html")


@router.api_route("/assets/{name}", methods=["GET", "HEAD"])
async def asset(name: str, request: Request) -> Response:
    """Scripts, styles and icons. The pages themselves are served under their own paths only."""
    return _answer(request, "" if name.endswith(".html") else name)

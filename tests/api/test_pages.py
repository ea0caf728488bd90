"""The web pages: how they are served, and what the docs page does in a browser. The dashboard has its own tests."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.browser import Browser
from tests.conftest import MakeServer, Server
from tests.soaking import soak_the_rest
from tests.table import table

WEB = Path(__file__).resolve().parent.parent.parent / "src" / "era" / "web"
PAGES = sorted(path for path in WEB.iterdir() if path.is_file())
ASSETS = [path.name for path in PAGES if path.suffix != ".html"]
DASHBOARD = WEB / "dashboard"
BUILT = sorted(path.name for path in DASHBOARD.iterdir()) if DASHBOARD.exists() else []
# One of each kind of what pdf.js has beside it does for all of its kind.
BUILT = [name for name in BUILT if not name.endswith((".bcmap", ".pfb", ".ttf"))] + [
    name for name in ("GBK-EUC-H.bcmap", "FoxitSymbol.pfb", "LiberationSans-Regular.ttf") if name in BUILT
]
PATHS = ["/", "/docs", *(f"/assets/{name}" for name in [*ASSETS, *BUILT] if not name.endswith(".html"))]


@table("path", PATHS)
def test_served_with_strict_headers(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    # Inline are only the styles and the script that the dashboard's page was built with.
    inline = dict.fromkeys(("script", "style"), "")
    for kind, text in re.findall(r"<(script|style)>(.*?)</\1>", answer.text if path == "/" else "", re.DOTALL):
        inline[kind] += f" 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert {kind: policy[f"{kind}-src"] for kind in inline} == {kind: f"'self'{part}" for kind, part in inline.items()}
    assert all(inline.values()) is bool(BUILT and path == "/")
    of_the_dashboard = BUILT and (path == "/" or path.removeprefix("/assets/") in BUILT)
    assert policy["img-src"] == ("'self' blob: data:" if of_the_dashboard else "'self'")
    hashed = re.search(r"-[0-9A-Z]{8}\.(m?js|css)$", path)
    assert answer.headers["Cache-Control"] == ("public, max-age=31536000, immutable" if hashed else "no-cache")
    again = client.get(path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = client.head(path)
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(answer.content)))


def test_pages_have_their_content_types(client: httpx.Client) -> None:
    types = {path: client.get(path).headers["Content-Type"].partition(";")[0] for path in PATHS}
    assert types["/"] == types["/docs"] == "text/html"
    endings = {".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript", ".svg": "image/svg+xml"}
    endings |= {".bcmap": "application/octet-stream", ".pfb": "application/octet-stream", ".ttf": "font/ttf"}
    assert all(types[path] == endings[Path(path).suffix] for path in PATHS[2:])


@table("name", ["nothing.css", "index.html", "..%2f..%2fapp.py", "%2e%2e", "__init__.py", ""])
def test_other_files_are_not_served(client: httpx.Client, name: str) -> None:
    answer = client.get(f"/assets/{name}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_foreign_host_names_are_refused_for_pages_too(client: httpx.Client) -> None:
    assert client.get("/", headers={"Host": "rebound.example"}).status_code == 403
    assert client.get("/docs", headers={"Host": "localhost:1"}).status_code == 200


@table("path", PAGES)
def test_nothing_comes_from_elsewhere(path: Path) -> None:
    text = path.read_text()
    addresses = set(re.findall(r"(?:https?:)?//[\w.:-]+\.[\w.:-]+", text))
    # An example, the namespace of SVG, and an address in a program that shows that it can't be reached.
    assert addresses <= {"http://127.0.0.1:8787", "http://www.w3.org", "https://192.0.2.1"}
    assert not re.search(r"\son\w+=|<style|\sstyle=|javascript:", text)
    assert path.suffix != ".css" or not re.search(r"@import|url\(", text)
    for script in re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL):
        assert script == ""


@pytest.fixture
def quiet(browser: Browser) -> Iterator[Browser]:
    """The browser, which must not log an error during the test; it leaves the server's pages afterwards."""
    browser.complaints.clear()
    yield browser
    complaints = list(browser.complaints)
    browser.open("about:blank")
    assert complaints == []


def test_reference_lists_every_call(server: Server, quiet: Browser) -> None:
    with server.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    calls = {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}
    quiet.open(f"{server.url}/docs")
    quiet.wait("document.querySelector('.call')")
    shown = quiet.look("[...document.querySelectorAll('.call')].map((call) => [call.dataset.call, call.innerText])")
    assert {name for name, _ in shown} == calls
    assert all(server.url in text and "curl" in text for _, text in shown)
    fields = quiet.look("document.querySelector('#post-api-sessions').innerText")
    assert all(word in fields for word in ("default_timeout", "30", "persistent", "required", "409"))


def test_reference_can_be_filtered(server: Server, quiet: Browser) -> None:
    quiet.open(f"{server.url}/docs")
    quiet.wait("document.querySelector('.call')")
    visible = (
        "[...document.querySelectorAll('.call')].filter((call) => call.offsetParent).map((call) => call.dataset.call)"
    )
    type_it = "(text) => { const box = document.querySelector('#filter'); box.value = text; "
    type_it += "box.dispatchEvent(new Event('input')) }"
    everything = quiet.look(visible)
    quiet.look(f"({type_it})('post execute')")
    assert quiet.look(visible) == ["POST /api/execute"]
    quiet.look(f"({type_it})('no such thing')")
    assert quiet.look("document.querySelector('#no-match').offsetParent !== null")
    quiet.look(f"({type_it})('')")
    assert quiet.look(visible) == everything


def test_the_docs_page_shows_this_server(server: Server, quiet: Browser) -> None:
    quiet.open(f"{server.url}/docs")
    quiet.wait("document.querySelector('#pill').dataset.state === 'ok'")
    quiet.wait(
        f"document.body.innerText.includes('{server.url}/api/sessions')"
    )  # once it knows whether a key is required
    assert "bubblewrap" in quiet.look("document.body.innerText")
    quiet.wait("document.querySelectorAll('.copy').length >= 4")
    for width in (360, 768, 1600):
        quiet.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        assert quiet.look("document.documentElement.scrollWidth") <= width, quiet.look(
            f"[...document.querySelectorAll('*')].filter((e) => e.getBoundingClientRect().right > {width})"
            ".map((e) => e.outerHTML.slice(0, 100))"
        )


PROGRAMS = {
    "python": "print(6 * 7)\nraise SystemExit(3)",
    "node": "console.log(6 * 7); console.error('<b>bold</b>'); process.exit(3)",
    "typescript": "const answer: number = 6 * 7; console.log(answer); process.exit(3)",
    "deno": "const answer: number = 6 * 7; console.log(answer); Deno.exit(3)",
    "go": 'package main\n\nimport "os"\n\nfunc main() {\n\tos.Stdout.WriteString("42")\n\tos.Exit(3)\n}',
}


@pytest.mark.parametrize("language", soak_the_rest(PROGRAMS, ["node"]))
def test_the_page_runs_programs(server: Server, quiet: Browser, language: str) -> None:
    quiet.open(f"{server.url}/docs")
    quiet.wait("document.querySelector('#code').value")
    quiet.wait(f"document.querySelector('input[value={language}]')")
    quiet.look(f"document.querySelector('input[value={language}]').click()")
    quiet.look(f"document.querySelector('#code').value = {json.dumps(PROGRAMS[language])}")
    quiet.look("document.querySelector('#run').click()")
    quiet.wait("document.querySelector('.stream.stdout')")
    assert quiet.look("document.querySelector('.stream.stdout pre').innerText").strip() == "42"
    verdict = quiet.look("document.querySelector('#verdict').innerText")
    assert "failed" in verdict
    assert "3" in verdict
    if language == "node":  # what a program prints is never markup
        assert quiet.look("document.querySelector('.stream.stderr pre').innerHTML").strip() == "&lt;b&gt;bold&lt;/b&gt;"


def test_the_page_asks_for_the_api_key(own_server: MakeServer, browser: Browser) -> None:
    server = own_server(api_key="open sesame")
    browser.open(f"{server.url}/docs")
    browser.wait("!document.querySelector('#key-row').hidden")
    assert "Bearer $ERA_API_KEY" in browser.look("document.querySelector('#quickstart').innerText")
    browser.look("document.querySelector('#run').click()")
    browser.wait("document.querySelector('#verdict').innerText.includes('401')")
    browser.look("document.querySelector('#key').value = 'open sesame'; document.querySelector('#run').click()")
    browser.wait("document.querySelector('.stream.stdout')")
    browser.open("about:blank")

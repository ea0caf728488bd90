"""The documentation's site at /docs/guide: whole, offline, and with nothing that its policy forbids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import httpx
import pytest

from tests.browser import Browser, browser
from tests.conftest import Server
from tests.table import table

__all__ = ["browser"]  # a fixture

ROOT = Path(__file__).resolve().parent.parent.parent
GUIDE = ROOT / "src" / "era" / "web" / "guide"
TOP = ("CHANGELOG.md", "SECURITY.md")  # the README is where a checkout begins


class Page(HTMLParser):
    """What a page leads to, what it loads, and what it has inline."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.navigation: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if name := given.get("id"):
            self.anchors.add(name)
        if tag == "a" and (link := given.get("href")):
            self.links.append(link)
            if "md-nav__link" in (given.get("class") or ""):
                self.navigation.append(link)
        self.loads += [value for name in ("src", "srcset") if (value := given.get(name))]
        if tag == "link" and given.get("rel") not in ("next", "prev", "canonical"):
            self.loads.append(given.get("href") or "")
        if tag == "style" or (tag == "script" and "src" not in given and given.get("type") != "application/json"):
            self.inline.append(tag)
        self.inline += [name for name in given if name == "style" or name.startswith("on")]


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    """The site's pages by name, as setup has built them."""
    assert (GUIDE / "index.html").exists(), "the guide isn't built: `scripts/setup` does that"
    return {path.name: Page(path.read_text()) for path in GUIDE.glob("*.html")}


def test_every_document_is_a_page_that_the_first_leads_to(pages: dict[str, Page]) -> None:
    documents = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")}
    assert set(pages) == documents | {f"{Path(name).stem.lower()}.html" for name in TOP}
    found = {Path(urldefrag(link).url).as_posix() for link in pages["index.html"].navigation}
    assert set(pages) - found == set(), "add the page to mkdocs.yml"


def test_links_of_the_site_lead_somewhere(pages: dict[str, Page]) -> None:
    broken = []
    for name, page in pages.items():
        for link in page.links:
            path, anchor = urldefrag(link)
            target = path or name
            if "://" in target or target.startswith("/"):
                continue
            at = Path(target).as_posix()
            if at not in pages or (anchor and unquote(anchor) not in pages[at].anchors):
                broken.append(f"{name}: {link}")
    assert broken == []


def test_nothing_comes_from_elsewhere_and_nothing_is_inline(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        assert page.inline == [], name
        for load in page.loads:
            assert "://" not in load, f"{name} loads {load}"
            assert (GUIDE / load).is_file(), f"{name} loads {load}"


@pytest.fixture(scope="module")
def site(shared_server: Server) -> Iterator[httpx.Client]:
    with shared_server.client() as client:
        yield client


def test_it_is_served_with_a_strict_policy(site: httpx.Client) -> None:
    first = site.get("/docs/guide")
    assert (first.status_code, first.headers["Location"]) == (307, "/docs/guide/index.html")
    for path in ("index.html", "search.json", "assets/guide.css", "assets/logo.svg"):
        answer = site.get(f"/docs/guide/{path}")
        assert (answer.status_code, answer.content) == (200, (GUIDE / path).read_bytes())
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy.pop("img-src") == "'self' data:"
        assert set(policy.values()) == {"'none'", "'self'"}
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        again = site.get(f"/docs/guide/{path}", headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")


@table("path", ["none.html", "../docs.html", "%2e%2e/docs.html", "assets", "..%2fdocs.html", "a//b", "%00"])
def test_nothing_else_is_served(site: httpx.Client, path: str) -> None:
    assert site.get(f"/docs/guide/{path}").status_code == 404


def test_it_is_searched_in_a_browser_without_a_complaint(browser: Browser, shared_server: Server) -> None:
    browser.open(urljoin(shared_server.url, "/docs/guide/index.html"))
    browser.wait(
        "document.querySelector('[data-md-component=search]') || document.querySelector('label[for=__search]')"
    )
    browser.look("document.querySelector('button.md-search__button, label[for=__search]').click()")
    dialog = "[...document.querySelectorAll('body > div')].map(div => div.shadowRoot).find(Boolean)"
    browser.wait(f"{dialog}?.querySelector('input')")
    browser.look(
        f"""(() => {{ const input = {dialog}.querySelector('input'); input.focus(); input.value = 'idempotency';
        input.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"""
    )
    browser.wait(f"/runs\\.html/.test({dialog}.innerHTML)")
    assert browser.complaints == []
    assert re.search("idempot", browser.look(f"{dialog}.textContent"), re.IGNORECASE)

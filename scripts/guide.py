#!/usr/bin/env python3
"""guide.py: build the documentation as a site into src/era/web/guide, which a server shows at /docs/guide.

The pages are those in docs/, without docs/decisions, and two at the top of the repository. What differs in the site is
made in a copy: links lead from page to page, and examples between `<!-- tabs -->` and `<!-- /tabs -->`, each below its
name in bold, become tabs. What the generator makes is changed where the server's policy forbids it, as scripts and
styles within pages are, and what the site doesn't need is left out.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WEB = ROOT / "src" / "era" / "web"
TARGET = WEB / "guide"
TOP = ("CHANGELOG.md", "SECURITY.md")
SERVER = "http://127.0.0.1:8787"
TABS = re.compile(r"^<!-- tabs -->\n(.*?)^<!-- /tabs -->\n", re.MULTILINE | re.DOTALL)
TAB = re.compile(r"^\*\*([^*\n]+)\*\*\n", re.MULTILINE)
INLINE = re.compile(r"<script>(.*?)</script>", re.DOTALL)
OPTION = re.compile(r"<code>(--[\w-]+)</code>")
STYLE = re.compile(r"""(\w+)\.appendChild\(\w+\("style",\{\},(\w+)\.toString\(\)\)\)""")
"""How the generator's script makes a `<style>`, in the shadow of the search dialog."""
UNWANTED = re.compile(
    r"404\.html|sitemap.*|assets/images/.*|assets/javascripts/(workers/)?lunr/.*|.*\.map|.*/classic/.*"
)


def main() -> None:
    tools = ROOT / ".tools"  # on the same file system, so that the whole site appears at once
    tools.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tools, prefix="guide-") as folder:
        work = Path(folder)
        stage(work)
        site = work / "site"
        done = subprocess.run(
            [sys.executable, "-m", "zensical", "build"], cwd=work, capture_output=True, text=True, check=False
        )
        if done.returncode or not (site / "index.html").exists():
            sys.exit(f"guide.py: the site could not be built:\n{done.stdout}{done.stderr}")
        finish(site)
        if TARGET.exists():
            shutil.rmtree(TARGET)
        site.rename(TARGET)


def stage(work: Path) -> None:
    """Copy what the site is made of, as the generator wants it."""
    pages = work / "docs"
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("decisions"))
    shutil.copy(ROOT / "mkdocs.yml", work)
    shutil.copy(WEB / "icon.svg", pages / "assets" / "logo.svg")
    for name in TOP:
        shutil.copy(ROOT / name, pages / name.lower())
    for page in pages.glob("*.md"):
        page.write_text(prepared(page.read_text()))


def prepared(text: str) -> str:
    """A page's text, with links that lead within the site and tabs as the generator writes them."""
    for name in TOP:
        text = re.sub(rf"\]\((?:\.\./)?{name}(#[^)]*)?\)", rf"]({name.lower()}\1)", text)
    text = re.sub(r"\]\(\.\./README\.md(?:#[^)]*)?\)", "](index.md)", text)
    text = text.replace("](docs/", "](")
    return TABS.sub(lambda found: tabs(found[1]), text)


def tabs(text: str) -> str:
    """Blocks below names in bold as tabs."""
    _, *parts = TAB.split(text)
    made = []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        inside = "\n".join(f"    {line}" if line else "" for line in content.strip("\n").split("\n"))
        made.append(f'=== "{name}"\n\n{inside}\n')
    return "\n".join(made) + "\n"


def finish(site: Path) -> None:
    """Make files of the pages' scripts and a sheet of the style that a script makes; name what is an option; leave out
    what isn't needed."""
    scripts = site / "assets" / "javascripts"

    def move(found: re.Match[str]) -> str:
        name = f"inline-{hashlib.sha256(found[1].encode()).hexdigest()[:8]}.js"
        (scripts / name).write_text(found[1])
        return f'<script src="assets/javascripts/{name}"></script>'

    for path in [path for path in site.rglob("*") if path.is_file()]:
        if UNWANTED.fullmatch(path.relative_to(site).as_posix()):
            path.unlink()
        elif path.suffix == ".html":
            page = INLINE.sub(move, path.read_text())
            page = OPTION.sub(r'<code class="option">\1</code>', page)
            path.write_text(page.replace(f'href="{SERVER}', 'href="'))
    (bundle,) = scripts.glob("bundle.*.js")
    sheet = r"\1.adoptedStyleSheets=[(s=>(s.replaceSync(\2.toString()),s))(new CSSStyleSheet)]"
    text, changed = STYLE.subn(sheet, bundle.read_text())
    if not changed:
        sys.exit(f"guide.py: {bundle.name} makes its styles in a way that guide.py doesn't know")
    bundle.write_text(text)


if __name__ == "__main__":
    main()

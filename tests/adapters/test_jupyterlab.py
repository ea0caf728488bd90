"""A notebook in a real JupyterLab, in a real browser: its cells run in a context of a session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from era import Era
from tests.browser import Browser
from tests.browser import browser as browser
from tests.conftest import Server, eventually
from tests.documents import ROOT

LAB = ROOT / ".tools" / "jupyterlab"
SHARE = LAB / "share" / "jupyter"
TOKEN = "of-this-test-only"
SHIFT = 8
"""A modifier, as the DevTools protocol has it."""

pytestmark = pytest.mark.soak


def _server_url(directory: Path, log: Path) -> str:
    """Where a Jupyter server listens, by the file that it writes once it does, though not in one step."""

    def written() -> str:
        return next((text for path in directory.glob("jpserver-*.json") if (text := path.read_text())), "")

    assert eventually(lambda: written().endswith("}"), seconds=120), log.read_text()
    return str(json.loads(written())["url"])


@pytest.fixture
def lab(server: Server, tmp_path: Path) -> Iterator[str]:
    """The address of a JupyterLab that has the kernel, installed as users do it."""
    if not SHARE.exists():
        pytest.skip("needs JupyterLab, which scripts/setup --soak installs where it can")
    paths = {
        "PYTHONPATH": LAB,
        "HOME": tmp_path,
        "JUPYTER_CONFIG_PATH": LAB / "etc" / "jupyter",
        "JUPYTER_RUNTIME_DIR": tmp_path / "runtime",
        "JUPYTERLAB_DIR": SHARE / "lab",
    }
    environment = os.environ | {name: str(path) for name, path in paths.items()} | {"ERA_URL": server.url}
    environment["JUPYTER_PATH"] = f"{tmp_path}/share/jupyter:{SHARE}"
    install = ["-m", "era.adapters.jupyter", "install", "--session", "desk", "--prefix", str(tmp_path)]
    subprocess.run([sys.executable, *install], env=environment, check=True, stdout=subprocess.DEVNULL, timeout=60)
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    options = ["--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1", f"--IdentityProvider.token={TOKEN}"]
    options += [f"--ServerApp.root_dir={notebooks}", "--LabApp.news_url=None"]
    command = [sys.executable, "-m", "jupyterlab", *options]
    with (tmp_path / "log").open("wb") as log:
        jupyter = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        yield f"{_server_url(paths['JUPYTER_RUNTIME_DIR'], tmp_path / 'log')}lab?token={TOKEN}"
    finally:
        jupyter.terminate()
        try:
            jupyter.wait(60)
        except subprocess.TimeoutExpired:
            jupyter.kill()
            jupyter.wait()
        with Era(server.url) as era:
            era.sessions.delete("desk", purge=True)


class Notebook:
    """A new notebook in the browser, whose cells are typed."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.browser = browser
        browser.call("Page.navigate", url=address)
        cards = "[...document.querySelectorAll('.jp-LauncherCard[data-category=Notebook]')]"
        card = f"{cards}.find(e => e.title == 'ERA (desk)')"
        browser.wait(card)
        browser.look(f"{card}.click()")
        browser.wait("document.querySelector('.jp-Notebook .jp-CodeCell .cm-content')")
        self.until_idle()

    def until_idle(self) -> None:
        self.browser.wait("document.body.innerText.includes('ERA (desk) | Idle')")

    def run(self, code: str) -> None:
        """Type into the last cell, and press Shift and Enter."""
        self.browser.look("document.querySelector('.jp-Notebook .jp-Cell.jp-mod-active .cm-content').focus()")
        self.browser.call("Input.insertText", text=code)
        self.press("Enter", 13, modifiers=SHIFT)

    def press(self, key: str, number: int, *, modifiers: int = 0) -> None:
        given = {"key": key, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        for kind in ("rawKeyDown", "keyUp"):
            self.browser.call("Input.dispatchKeyEvent", type=kind, **given)

    def shows(self, text: str) -> None:
        """Wait until a cell has shown a text that has this in it."""
        shown = "[...document.querySelectorAll('.jp-OutputArea-output')].map(e => e.textContent)"
        self.browser.wait(f"{shown}.some(text => text.includes({text!r}))")


def test_cells_share_variables_and_files_queue_and_are_interrupted(server: Server, lab: str, browser: Browser) -> None:
    notebook = Notebook(browser, lab)
    notebook.run("n = 6; open('kept', 'w').write('here')")
    notebook.shows("4")
    notebook.until_idle()
    notebook.run("import time; time.sleep(0.5); m = n")
    notebook.run("print(m * 100)")  # while the one before goes on
    notebook.shows("600")
    notebook.run("print('on', flush=True); time.sleep(300)")
    notebook.shows("on")
    notebook.press("Escape", 27)
    for _ in range(2):
        notebook.press("i", 73)
    notebook.shows("KeyboardInterrupt")
    notebook.until_idle()  # What comes before a failed cell's reply is given up with it.
    notebook.run("m + 1")
    notebook.shows("7")
    with Era(server.url) as era:
        session = era.sessions.get("desk")
        assert session.files.text("kept") == "here"
        (context,) = session.contexts()
        assert session.context(context.name).run("print(n)").stdout == "6\n"

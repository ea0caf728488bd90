"""The prefix of Python in a sandbox: nothing of the machine's in it, and no way from it into the supervisor."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from era.drivers import prefix
from era.languages.python import PREFIX
from tests.drivers.sandboxes import Options, Sandboxes, Weakness

IMPORTABLE = """
import os, pkgutil, site, sys
library = os.path.dirname(os.__file__)
places = [path for path in [*site.getsitepackages(), *sys.path[1:]]
          if path != '/era/lib' and os.path.dirname(path) != library and path != library]
print(*sorted({name for _, name, _ in pkgutil.iter_modules(places)} - {'pip'}))
"""
"""Prints the modules that are neither the standard library's, nor ERA's, nor pip."""

RUNS_AT_START = "import os; os.getpid() == 1 and open('/tmp/by-pid-1', 'w')\n"


def uncovered(options: Options) -> Options:
    """The same without what covers the machine's site directories."""
    for covered in prefix.machine_site_directories():
        at = options.index(covered)
        assert options[at - 2] == "--ro-bind"
        del options[at - 2 : at + 1]
    return options


def test_only_the_session_decides_what_can_be_imported(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    assert sandboxes.run(sandbox, IMPORTABLE).stdout == "\n"
    cold = sandboxes.run(sandbox, IMPORTABLE, env={"PYTHONHASHSEED": "0"})
    assert cold.stdout == "\n", cold.stderr


@pytest.mark.skipif(
    not any(name.suffix != ".pth" for each in prefix.machine_site_directories() for name in Path(each).iterdir()),
    reason="this machine's Python has no packages that could be found",
)
@pytest.mark.parametrize("weak_sandboxes", [Weakness(options=uncovered)], indirect=True)
def test_uncovered_the_machines_packages_would_be_found(weak_sandboxes: Sandboxes) -> None:
    assert len(weak_sandboxes.run(weak_sandboxes.make(), IMPORTABLE).stdout.split()) > 1


def test_the_supervisor_never_acts_upon_what_a_session_has_installed(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    install = f"import site; open(site.getsitepackages()[0] + '/hook.pth', 'w').write({RUNS_AT_START!r})"
    look = "import os; print(os.path.exists('/tmp/by-pid-1'))"
    for code in (install, "pass", look):
        stdout = sandboxes.run(sandbox, code).stdout
    assert stdout == "False\n"


def test_what_is_there_before_the_supervisor_starts_would_run_in_it(sandboxes: Sandboxes) -> None:
    made = prefix.Layer.__init__

    def make_with_hook(self: prefix.Layer, directory: Path, uid: int | None) -> None:
        made(self, directory, uid)
        hook = directory / prefix.SITE.removeprefix(f"{PREFIX}/") / "hook.pth"
        hook.write_text(RUNS_AT_START)

    # A supervisor that is forked from a template has started before there was a session.
    with patch.object(prefix.Layer, "__init__", make_with_hook), patch.object(sandboxes.driver, "templates", None):
        sandbox = sandboxes.make()
    assert sandboxes.run(sandbox, "import os; print(os.path.exists('/tmp/by-pid-1'))").stdout == "True\n"


def test_whether_it_is_used_is_seen_from_outside(tmp_path: Path) -> None:
    """Or what was installed would not be kept. Before time has passed on the clock of files, nothing is relied on."""
    layer = prefix.Layer(tmp_path / "early", None)
    with patch("time.time_ns", lambda: max(layer._made)):
        layer.begin()
    assert layer.is_used()
    for name in ("", *prefix.LAYER_DIRECTORIES, "lib"):
        layer = prefix.Layer(tmp_path / f"layer-{name.replace('/', '-')}", None)
        old = layer._made
        with patch("time.time_ns", lambda old=old: max(old) + prefix._TICK_NS + 1):
            layer.begin()
        assert not layer.is_used()
        path = tmp_path / f"layer-{name.replace('/', '-')}" / name
        while os.stat(path).st_ctime_ns in old:
            (path / "installed").touch()
            (path / "installed").unlink()
        assert layer.is_used()

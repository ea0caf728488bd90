"""The prefix: the virtual environment from which Python starts in a sandbox, and the session's packages in it.

Theory of operation
===================

*A prefix, not a variable.* What an interpreter can import has to be the same however it was started: forked for a run,
by a program's `python3`, with an empty environment, with `-I`. So it is said in files that Python itself looks for.

*Layout.* PREFIX is read-only and the same for all sandboxes: `pyvenv.cfg`, `commands/` with the interpreter's names,
pip and npm, and links `bin`, `lib` and so on into LAYER. LAYER is the session's own directory: what its programs
install lies there, and is kept with the session's files (core/trees/tree_objects.py).

*Nothing of the machine's.* The site directories of the base interpreter, such as dist-packages on Debian, are covered
by a directory with one `.pth` file, which names LAYER's site directory, the package set and pip. So the base
interpreter itself (`/usr/bin/python3`, which is what an empty PATH finds) imports the same as the prefix's.

*PID 1.* Python acts upon `.pth` files of a site directory when it starts, and the supervisor is started from the prefix
as well. LAYER is empty at that moment: what a session has in it is put there afterwards. Where PID 1 is a fork of a
template, which has no package set, it looks for that itself (guest/startup.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from era.languages.node import NODE
from era.languages.python import COMMANDS, INTERPRETER, PIP, PREFIX, base_executable

PYTHON_PACKAGES = "/opt/env"
"""The Python packages of a package set."""

LAYER = f"{PREFIX}/layer"
"""What programs of the session have installed."""

_SITE = f"lib/python3.{sys.version_info.minor}/site-packages"
SITE = f"{PREFIX}/{_SITE}"
PACKAGES_SITE = f"{PYTHON_PACKAGES}/{_SITE}"
"""Where modules of a package set lie. A template has an empty directory there, so that Python puts it into `sys.path`,
and a fork in a sandbox without packages takes it out again (guest/startup.py)."""

LAYER_DIRECTORIES = ("bin", "etc", "include", "share", _SITE)
"""What LAYER always has, or installing into it would fail."""

PROGRAMS = (f"{PREFIX}/bin", COMMANDS)
"""Directories for PATH."""

_TICK_NS = 50_000_000
"""Longer than the tick of any clock of file times."""

_NAMES = ("python", "python3", f"python3.{sys.version_info.minor}")
_PIP_NAMES = ("pip", "pip3", f"pip3.{sys.version_info.minor}")
_NPM_SCRIPT = f"""#!/bin/sh
export NPM_CONFIG_PREFIX="${{NPM_CONFIG_PREFIX-{PREFIX}}}"
export NPM_CONFIG_UPDATE_NOTIFIER="${{NPM_CONFIG_UPDATE_NOTIFIER-false}}"
case "${{0##*/}} $* " in
    npx* | *" -g "* | *" --global "* | *" --location=global "* | *" link "*) ;;
    *)
        at=$PWD
        while [ -n "$at" ] && [ ! -e "$at/package.json" ] && [ ! -d "$at/node_modules" ]; do at=${{at%/*}}; done
        [ -n "$at" ] || set -- --prefix "$PWD" "$@"
        ;;
esac
exec {NODE}/bin/node {NODE}/lib/node_modules/npm/bin/$(basename "$0")-cli.js "$@"
"""
"""npm's own commands are copies in Node's wheel, which don't find what they belong to. They would also install globally
where Node is, and take `/` for the project where a setup's packages are in /node_modules and none is below."""

_PIP_SCRIPT = f"""#!{INTERPRETER}
import sys
from pip._internal.cli.main import main
sys.exit(main())
"""


def write(directory: Path) -> None:
    """Write what sandboxes mount: `prefix` and `site` below `directory`. Raises OSError."""
    base = base_executable()
    prefix, site = directory / "prefix", directory / "site"
    commands = prefix / Path(COMMANDS).name
    for path in (directory, prefix, commands, prefix / "layer", site):
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
    version = ".".join(map(str, sys.version_info[:3]))
    _write(prefix / "pyvenv.cfg", f"home = {base.parent}\ninclude-system-site-packages = true\nversion = {version}\n")
    _write(site / "era.pth", f"{SITE}\n{PACKAGES_SITE}\n{PIP}\n")
    for name in _NAMES:
        _link(commands / name, base)
    for name in _PIP_NAMES:
        _write(commands / name, _PIP_SCRIPT, mode=0o755)
    _write(prefix / "pip.conf", "[global]\ndisable-pip-version-check = true\n")
    for name in ("npm", "npx"):
        _write(commands / name, _NPM_SCRIPT, mode=0o755)
    for name in dict.fromkeys(path.partition("/")[0] for path in LAYER_DIRECTORIES):
        _link(prefix / name, Path("layer") / name)


class Layer:
    """The directory that one sandbox has as LAYER."""

    def __init__(self, directory: Path, uid: int | None) -> None:
        """Make it, owned by `uid` if that isn't this process's own. Raises OSError."""
        self._directories = [os.fspath(directory)]
        for name in LAYER_DIRECTORIES:
            parts = name.split("/")
            self._directories += [f"{directory}/{'/'.join(parts[:count])}" for count in range(1, len(parts) + 1)]
        for path in self._directories:
            os.mkdir(path)
            if uid is not None:
                os.chown(path, uid, uid)
        self._made = self._changed()
        self._reliable: bool | None = None
        """Whether every change shows; None before the first run."""

    def is_used(self) -> bool:
        """Whether it may hold more than it was made with. What is put into it changes the time of a directory."""
        return not self._reliable or self._changed() != self._made

    def begin(self) -> None:
        """Called before each run, and before processes. A change within the same tick of the clock as the making would
        not show."""
        if self._reliable is None:
            self._reliable = time.time_ns() > max(self._made) + _TICK_NS

    def _changed(self) -> list[int]:
        """When each directory was last changed; 0 for one that is gone."""
        changed = []
        for path in self._directories:
            try:
                changed.append(os.stat(path, follow_symlinks=False).st_ctime_ns)
            except OSError:
                changed.append(0)
        return changed


@cache
def machine_site_directories() -> tuple[str, ...]:
    """The site directories of the base interpreter that exist, which belong to the machine."""
    code = "import os, site; print(*filter(os.path.isdir, site.getsitepackages()), sep='\\n')"
    found = subprocess.run([base_executable(), "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    return tuple(found.stdout.splitlines())


def _write(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Write a file, in one step for whoever reads it meanwhile: another driver's sandboxes may."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.rename(path)


def _link(path: Path, target: Path) -> None:
    """Make a link, in one step."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.rename(path)

"""Python: the interpreter that the service's own virtual environment is based on, so it is known to be new enough.

Programs run it from a prefix of their session's, a virtual environment (drivers/prefix.py). So what they can import
depends on the session, and not on what the machine has installed.
"""

from __future__ import annotations

import importlib.util
import platform
import sys
import sysconfig
from pathlib import Path

from era.languages import ipython
from era.languages.base import GUEST, Definition, Kernel, Missing, Runtime

PREFIX = "/opt/session"
"""sys.prefix of programs."""

COMMANDS = f"{PREFIX}/commands"
"""The directory of the interpreter's names, and of pip and npm."""

INTERPRETER = f"{COMMANDS}/python3"
"""sys.executable of programs."""

PIP = "/opt/pip"
"""Where programs import pip from, until they install another one."""


def base_executable() -> Path:
    """The interpreter that this one's virtual environment is based on."""
    executable = Path(sysconfig.get_config_var("BINDIR") or "") / f"python3.{sys.version_info.minor}"
    if not executable.is_file():
        executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    return executable


def installation_directory() -> Path | None:
    """The directory of that interpreter's installation; None where it is in /usr, which sandboxes have anyway."""
    return None if base_executable().is_relative_to("/usr") else Path(sys.base_prefix)


def _find() -> Runtime:
    base = installation_directory()
    return Runtime(
        version=platform.python_version(),
        # Unbuffered, so that what was printed before a kill is not lost: forked runs see to that in another way.
        cold=(INTERPRETER, "-u"),
        forks=True,
        mounts={**({} if base is None else {str(base): base}), **_pip(), **_ipython()},
        kernel=_kernel(),
    )


def _kernel() -> Kernel | None:
    """The interpreter of contexts; None where the service was installed without IPython."""
    try:
        ipython.packages()
    except Missing:
        return None
    return Kernel(
        (INTERPRETER, "-u", f"{GUEST}/python_kernel.py", ipython.PACKAGES),
        {"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    )


def _ipython() -> dict[str, Path]:
    """IPython, by its place inside; nothing where it hasn't been staged yet."""
    try:
        place = ipython.packages().ready_place()
    except Missing:
        return {}
    return {} if place is None else {ipython.MOUNT: place}


def _pip() -> dict[str, Path]:
    """pip and its metadata, by their paths inside; nothing where the service was installed without it."""
    spec = importlib.util.find_spec("pip")
    if spec is None or not spec.submodule_search_locations:
        return {}
    package = Path(spec.submodule_search_locations[0]).resolve()
    return {f"{PIP}/{path.name}": path for path in (package, *package.parent.glob("pip-*.dist-info"))}


LANGUAGE = Definition(
    name="python",
    title="Python",
    aliases=("py",),
    endings=(".py",),
    entry="main.py",
    hello='print("up")',
    find=_find,
    packages="pip",
    environment={"MPLBACKEND": "module://era_matplotlib"},  # guest/lib, which PYTHONPATH names
    at_start=("PYTHON",),
)

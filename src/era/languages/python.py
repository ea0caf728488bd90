"""Python: the interpreter that the service's own virtual environment is based on, so it is known to be new enough."""

from __future__ import annotations

import platform
import sys
import sysconfig
from pathlib import Path

from era.languages.base import Definition, Runtime


def _find() -> Runtime:
    base = Path(sys.base_prefix)
    executable = Path(sysconfig.get_config_var("BINDIR") or base / "bin") / f"python3.{sys.version_info.minor}"
    if not executable.exists():
        executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    return Runtime(
        version=platform.python_version(),
        # Unbuffered, so that what was printed before a kill is not lost: forked runs see to that in another way.
        cold=(str(executable), "-u"),
        forks=True,
        mounts={} if executable.is_relative_to("/usr") else {str(base): base},
    )


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

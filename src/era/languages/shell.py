"""Shell: bash where the machine has it, else its POSIX shell."""

from __future__ import annotations

import subprocess
from pathlib import Path

from era.languages.base import Definition, Missing, Runtime


def _find() -> Runtime:
    for shell in ("/bin/bash", "/bin/sh"):
        if Path(shell).exists():
            words = (shell, "-c", "echo ${BASH_VERSION:-POSIX}")
            version = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
            return Runtime(version=version.partition("(")[0], cold=(shell,))
    raise Missing("There is no /bin/bash and no /bin/sh.", "On the server: install bash.")


LANGUAGE = Definition(
    name="shell",
    title="Shell",
    aliases=("sh", "bash"),
    endings=(".sh", ".bash"),
    entry="main.sh",
    hello="echo up",
    find=_find,
)

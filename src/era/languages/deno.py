"""Deno, from the wheel that pip installs with the service.

Its permissions repeat the sandbox's bounds, so that a program which asks for more gets Deno's own error, with the name
of what it wanted. Children of a program are bounded by the sandbox alone. Packages that it fetches from npm lie in the
sandbox's cache, which no other session ever sees.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from era.languages.base import CACHE, GUEST, Definition, Missing, Runtime, wheel
from era.languages.node import V8_RESERVES

_DENO = "/opt/deno/deno"
_PLACES = "/workspace,/tmp,/dev/shm"
_LOOPBACK = "localhost,127.0.0.1,[::1],0.0.0.0,[::]"


def _find() -> Runtime:
    package, version = wheel("deno", "deno")
    candidates = (Path(sysconfig.get_path("scripts")) / "deno", package.parent.parent.parent.parent / "bin/deno")
    binary = next((path.resolve() for path in candidates if path.is_file()), None)
    if binary is None:
        raise Missing("The package deno has no program.", "On the server: pip install --force-reinstall deno")
    run: tuple[str, ...] = (
        _DENO,
        "run",
        "--quiet",
        "--no-prompt",
        "--allow-env",
        "--allow-sys",
        "--allow-run",
        "--allow-ffi",
    )
    run = (*run, f"--allow-write={_PLACES}", "--allow-read")
    return Runtime(
        version=version,
        cold=run,
        warm=(*run, "--preload", f"{GUEST}/deno_wait.js"),
        mounts={_DENO: binary},
        programs="/opt/deno",
    )


LANGUAGE = Definition(
    name="deno",
    title="Deno",
    entry="main.ts",
    hello='console.log("up")',
    find=_find,
    environment={"DENO_DIR": f"{CACHE}/deno", "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"},
    at_start=("DENO_",),
    online=("--allow-net", "--allow-import"),
    offline=(f"--allow-net={_LOOPBACK}",),
    reserves=V8_RESERVES,
    caches=True,
)

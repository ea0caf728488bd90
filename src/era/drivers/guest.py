"""What a sandbox holds whatever makes it: interpreters, how each language starts, the supervisor's configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from era import languages
from era.core.models import Language
from era.core.ports import Limits
from era.languages.base import CACHE
from era.languages.base import GUEST as GUEST

GUEST_SOURCE = Path(__file__).resolve().parent.parent / "guest"

LIBRARY = f"{GUEST}/lib"
"""What programs may import without having installed it: the clients of the storage."""

WORKSPACE = "/workspace"
ENVIRONMENT = "/opt/env"
"""Installed packages, where a session has some: Python's as those of a user, whose base this is."""

NODE_MODULES = "/node_modules"
"""Installed packages of Node, which looks for them here from wherever a program is."""
GO_MODULES = "/opt/env-go"
"""Installed modules of Go; guest/go_run.sh looks for them here."""

SCRATCH = ("/tmp", "/dev/shm")  # noqa: S108  paths inside the sandbox, on tmpfs of its own
SYSTEM = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
"""What the root has besides /usr: directories, or links into /usr, or nothing."""

PYTHON = languages.runtime("python").cold[0]
"""The interpreter of the supervisor."""

MOUNTS: dict[str, Path] = {
    inside: source for found in languages.runtimes().values() for inside, source in found.mounts.items()
}
"""What sandboxes have of the machine besides /usr, by where they have it."""

_PROGRAMS = dict.fromkeys(found.programs for found in languages.runtimes().values() if found.programs)
PATH = ":".join([*_PROGRAMS, "/usr/local/bin", "/usr/bin", "/bin"])

GUEST_LISTENERS: dict[str, int] = {"storage": 18129}
"""Where the guest listeners of a sandbox are (ports.Sandbox): ports below those that the kernel gives out by itself."""

NAMESERVER = "192.0.2.53"
"""The nameserver that programs have. The address is of a range for documents (RFC 5737), so it's nobody's;
network/dns.py answers there."""

OWN_PORTS = frozenset(GUEST_LISTENERS.values())
"""Where a sandbox has sockets of the host's. Nobody from outside is let in there."""

_AT_START = (
    *("LD_", "MALLOC_", "GLIBC_"),
    *(start for definition in languages.DEFINITIONS.values() for start in definition.at_start),
)


def program_environment(language: Language) -> dict[str, str]:
    """What the environment of every program in a language starts from."""
    return {
        "PATH": PATH,
        "HOME": "/tmp",  # noqa: S108
        "LANG": "C.UTF-8",
        # Bytecode caches would be listed, counted and kept as if they were files of the session.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": LIBRARY,
        **languages.DEFINITIONS[language].environment,
    }


def scratch(config: str) -> tuple[str, ...]:
    """The directories on tmpfs that a sandbox with this supervisor's configuration has."""
    cache = json.loads(config)["cache"]
    return (*SCRATCH, cache) if cache else SCRATCH


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
    return name.startswith(_AT_START) or name in {"LANG", "LC_ALL", "TZ"}


def supervisor_config(
    language: Language,
    control: int,
    bounds: dict[str, int],
    limits: Limits,
    *,
    guest_listeners: bool = True,
    certificates: Mapping[str, str] | None = None,
    supervised: bool = False,
) -> str:
    """The supervisor's configuration as JSON; see guest/supervisor.py for the meaning of each field. `bounds` are
    `rlimits`; `guest_listeners` says whether it is to hand over GUEST_LISTENERS and a broker, `certificates` and
    `supervised` what the first run most likely has as such in `Program`."""
    definition, runtime = languages.DEFINITIONS[language], languages.runtime(language)
    return json.dumps(
        {
            "control": control,
            "guest_listeners": list(GUEST_LISTENERS.values()) if guest_listeners else [],
            "certificates": dict(certificates or {}),
            "supervised": supervised,
            "language": language,
            "entry": definition.entry,
            "fork": runtime.forks,
            "warm": runtime.warm,
            "cold": runtime.cold,
            "online": definition.online,
            "offline": definition.offline,
            "environment": dict(definition.environment),
            "cache": CACHE if definition.caches else None,
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
    # A rule on a file may not speak of directories, so what is a file is granted by its directory.
    mounts = [inside if source.is_dir() else str(Path(inside).parent) for inside, source in MOUNTS.items()]
    return {
        "list": ["/"],
        "read": [
            *("/usr", *(f"/{name}" for name in SYSTEM), "/etc", GUEST, ENVIRONMENT, NODE_MODULES, GO_MODULES, *mounts),
        ],
        "change": ["/proc"],
        "device": ["/dev"],
        "all": [WORKSPACE, *SCRATCH, CACHE],
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
        bounds["RLIMIT_DATA"] = limits.memory_bytes + languages.DEFINITIONS[language].reserves
    return bounds

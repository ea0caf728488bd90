"""The inside of a sandbox, whichever driver makes it: paths, variables, limits, the supervisor's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from era import languages
from era.core.models import JsonObject, Language
from era.core.program import Limits
from era.drivers import prefix
from era.drivers.prefix import PYTHON_PACKAGES
from era.languages.base import CACHE
from era.languages.base import GUEST as GUEST
from era.languages.python import INTERPRETER as INTERPRETER
from era.languages.python import PREFIX, base_executable

GUEST_SOURCE = Path(__file__).resolve().parent.parent / "guest"

LIBRARY = f"{GUEST}/lib"
"""Modules that programs can import without installing them, such as the clients of the storage."""

WORKSPACE = "/workspace"
UID = 1000
"""The user and group of programs, outside gVisor."""
NODE_MODULES = "/node_modules"
"""Installed packages of Node, which finds them here from any directory."""

GO_MODULES = "/opt/env-go"
"""Installed modules of Go; guest/go_run.py looks for them here."""

SCRATCH = ("/tmp", "/dev/shm")  # noqa: S108  paths inside the sandbox, on tmpfs of its own
SYSTEM = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
"""Entries of the host's root that sandboxes have besides /usr: directories, links into /usr, or missing."""

ETC = ("ssl/certs", "alternatives", "ld.so.cache", "localtime", "mime.types", "fonts")
"""What sandboxes have of the host's /etc, where it is there."""

OWN_ETC = ("services", "protocols")
"""What they have of era/guest/etc as links in /etc, since many hosts lack it."""

PYTHON = str(base_executable())
"""The base interpreter, on the host and in sandboxes. The supervisor and programs start it as INTERPRETER."""

MOUNTS: dict[str, Path] = {
    inside: source for runtime in languages.runtimes().values() for inside, source in runtime.mounts.items()
}
"""Files and directories of the host that sandboxes have besides /usr, by their paths inside."""

PREPARED = tuple(preparation.mount for preparation in languages.preparations().values())
"""Where sandboxes have what languages have prepared on this machine; empty until that is done."""

_PROGRAMS = dict.fromkeys(runtime.programs for runtime in languages.runtimes().values() if runtime.programs)
PATH = ":".join(
    [
        *(*prefix.PROGRAMS, *_PROGRAMS, "/usr/local/bin", "/usr/bin", "/bin"),
        *(f"{PYTHON_PACKAGES}/bin", f"{NODE_MODULES}/.bin"),
    ]
)

GUEST_LISTENERS: dict[str, int] = {"storage": 18129}
"""The ports of a sandbox's guest listeners (ports.Sandbox): below those that the kernel gives out by itself."""

NAMESERVER = "192.0.2.53"
"""The name server of programs. The address is in a range for documentation (RFC 5737), so it belongs to nobody; the
supervisor of connects (network/) answers there."""

OWN_PORTS = frozenset(GUEST_LISTENERS.values())
"""Ports on which the host listens inside. Nobody from outside may connect to them."""

_READ_AT_START = (
    *("LD_", "MALLOC_", "GLIBC_"),
    *(start for definition in languages.DEFINITIONS.values() for start in definition.at_start),
)


def program_environment(language: Language) -> dict[str, str]:
    """The variables that every program in a language has, unless its run sets them otherwise."""
    return {
        "PATH": PATH,
        "HOME": "/tmp",  # noqa: S108
        "LANG": "C.UTF-8",
        # Bytecode caches would be listed, counted and kept as if they were files of the session.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": LIBRARY,
        **languages.DEFINITIONS[language].environment,
    }


def scratch(config: JsonObject) -> tuple[str, ...]:
    """The directories on tmpfs of a sandbox that has this configuration (see `supervisor_config`)."""
    cache = config["cache"]
    return (*SCRATCH, cache) if cache else SCRATCH


def with_library(environment: dict[str, str]) -> dict[str, str]:
    """Add LIBRARY to a PYTHONPATH of the user's own, after it. Changes `environment` and returns it."""
    path = environment.get("PYTHONPATH")
    if path is not None and path != LIBRARY:
        environment["PYTHONPATH"] = f"{path}:{LIBRARY}" if path else LIBRARY
    return environment


def restarts_interpreter(name: str) -> bool:
    """Whether an interpreter reads a variable of this name only when its process starts. A run that has one can't use a
    spare."""
    return name.startswith(_READ_AT_START) or name in {"LANG", "LC_ALL", "TZ"}


def supervisor_config(
    language: Language,
    control: int,
    bounds: dict[str, int],
    limits: Limits,
    *,
    guest_listeners: bool = True,
    certificates: Mapping[str, str] | None = None,
    supervised: bool = False,
) -> JsonObject:
    """The supervisor's configuration, which it gets as JSON; see guest/supervisor.py for the meaning of each field.
    `control` is the descriptor of its socket, `bounds` are `rlimits`. `guest_listeners` says whether it hands over
    GUEST_LISTENERS and a broker. `certificates` and `supervised` are what the first run most likely has in `Program`: a
    spare is made for those."""
    definition, runtime = languages.DEFINITIONS[language], languages.runtime(language)
    return {
        "control": control,
        "guest_listeners": list(GUEST_LISTENERS.values()) if guest_listeners else [],
        "certificates": dict(certificates or {}),
        "supervised": supervised,
        "language": language,
        "entry": definition.entry,
        "fork": runtime.forks,
        "warm": runtime.warm,
        "cold": runtime.cold,
        "starter": runtime.starter,
        "online": definition.online,
        "offline": definition.offline,
        "environment": dict(definition.environment),
        "cache": CACHE if definition.caches else None,
        "rlimits": bounds,
        "scratch": SCRATCH,
        "scratch_entries": limits.files,
        "guest": GUEST,
        "clients": LIBRARY,
        "site": prefix.SITE,
        "packages": prefix.PACKAGES_SITE,
        "layer": prefix.LAYER,
        "layer_directories": prefix.LAYER_DIRECTORIES,
        "landlock": landlock_grants(),
    }


def process_supervisor_config(limits: Limits, *, cgroup: bool, gvisor: bool = False) -> JsonObject:
    """The same for the process supervisor; see guest/process_supervisor.py. A process may be in any language. In
    `gvisor` it hands over no broker of its own."""
    roomiest = max(languages.DEFINITIONS, key=lambda name: languages.DEFINITIONS[name].reserves)
    return {
        "control": 3,
        "is_second": True,
        "has_broker": not gvisor,
        "kernel_tells_of_sizes": not gvisor,
        "guest_listeners": [],
        "supervised": False,
        "fork": False,
        "rlimits": rlimits(roomiest, limits, cgroup=cgroup),
        "scratch": SCRATCH,
        "scratch_entries": limits.files,
        "landlock": landlock_grants(),
    }


def landlock_grants() -> dict[str, list[str]]:
    """Landlock's rules: for each kind of access (guest/landlock.py explains them) the directories below which programs
    have it."""
    # A rule on a file can't grant rights on directories, so access to a file is granted by its directory.
    mounts = [inside if source.is_dir() else str(Path(inside).parent) for inside, source in MOUNTS.items()]
    return {
        "list": ["/"],
        "read": [
            *("/usr", *(f"/{name}" for name in SYSTEM), "/etc", GUEST),
            *(PREFIX, PYTHON_PACKAGES, NODE_MODULES, GO_MODULES, *mounts, *PREPARED),
        ],
        "change": ["/proc"],
        "device": ["/dev"],
        "all": [WORKSPACE, prefix.LAYER, *SCRATCH, CACHE],
    }


def rlimits(language: Language, limits: Limits, *, cgroup: bool) -> dict[str, int]:
    """Limits of each process (getrlimit(2)). Where no cgroup bounds memory, each process's private data is bounded
    instead. Address space (RLIMIT_AS) won't do, since V8 reserves far more of it than it uses; of private data, too, it
    reserves a good part."""
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

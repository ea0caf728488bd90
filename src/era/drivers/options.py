"""bubblewrap's options for a sandbox: what it sees, and what of that it can change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from era.core.program import Limits
from era.drivers import guest, prefix
from era.drivers.staging import Paths
from era.languages.python import PREFIX

_READ_ONLY_PROC = ("sys", "sysrq-trigger", "irq", "bus")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is started for one sandbox."""

    files: dict[str, bytes]
    """Files that are made for it, by their paths inside."""

    options: Callable[[dict[str, int]], list[str]]
    """bubblewrap's options, given for each of `files` the descriptor that holds its content."""

    command: list[str]
    """argv of what bubblewrap runs inside, as PID 1."""


def arguments(
    paths: Paths, sandbox_id: str, limits: Limits, config: str, data: dict[str, int], package_set: str | None = None
) -> list[str]:
    """bubblewrap's options for one sandbox. `config` is the supervisor's configuration, `data` maps paths inside to
    descriptors that hold the files' content, `package_set` is a digest."""
    options = ["--unshare-all", "--unshare-user", "--disable-userns"]
    options += ["--uid", str(guest.UID), "--gid", str(guest.UID)]
    options += ["--die-with-parent", "--as-pid-1", "--new-session", "--hostname", "era", "--cap-drop", "ALL"]
    options += ["--clearenv", "--setenv", "PATH", guest.PATH, "--setenv", "LANG", "C.UTF-8"]
    options += ["--setenv", "PYTHONPATH", guest.GUEST, "--setenv", "PYTHONDONTWRITEBYTECODE", "1"]
    options += ["--setenv", "ERA_GUEST", config]

    options += read_only(paths, data, package_set)
    options += ["--proc", "/proc", "--dev", "/dev"]
    # The kernel's own settings. bubblewrap makes them read-only too, but only where it thinks that it could write them.
    for name in _READ_ONLY_PROC:
        options += ["--ro-bind-try", f"/proc/{name}", f"/proc/{name}"]
    for path in guest.scratch(config):
        options += ["--size", str(limits.tmp_bytes), "--perms", "1777", "--tmpfs", path]
    options += own_directories(paths, sandbox_id)
    # The root and /dev are tmpfs without a bound: nobody gets to write there.
    options += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", guest.WORKSPACE]
    return options


def own_directories(paths: Paths, sandbox_id: str) -> list[str]:
    """Options for the directories of the host that a sandbox can change: those of its session."""
    home = paths.sandboxes / sandbox_id
    return ["--bind", str(home / "workspace"), guest.WORKSPACE, "--bind", str(home / "packages"), prefix.LAYER]


def read_only(paths: Paths, data: dict[str, int], package_set: str | None) -> list[str]:
    """Options for what a sandbox holds and can't change: programs, libraries, interpreters, made files, packages."""
    options = ["--ro-bind", "/usr", "/usr"]
    for name in guest.SYSTEM:
        directory = Path("/") / name
        if directory.is_symlink():
            options += ["--symlink", str(directory.readlink()), str(directory)]
        elif directory.is_dir():
            options += ["--ro-bind", str(directory), str(directory)]
    for name in ("ssl/certs", "alternatives", "ld.so.cache", "localtime", "mime.types", "fonts"):
        options += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for name in ("services", "protocols"):
        options += ["--symlink", f"{guest.GUEST}/etc/{name}", f"/etc/{name}"]
    for path, descriptor in data.items():
        options += ["--perms", "0444", "--ro-bind-data", str(descriptor), path]
    for inside, source in paths.mounts.items():
        options += ["--ro-bind", str(source), inside]
    options += ["--ro-bind", str(paths.python / "prefix"), PREFIX]
    for covered in prefix.machine_site_directories():
        options += ["--ro-bind", str(paths.python / "site"), covered]
    if package_set is not None:
        installed = paths.package_sets / package_set
        options += ["--ro-bind", str(installed / "python"), prefix.PYTHON_PACKAGES]
        options += ["--ro-bind", str(installed / "node_modules"), guest.NODE_MODULES]
        options += ["--ro-bind-try", str(installed / "go"), guest.GO_MODULES]
    return [*options, "--ro-bind", str(paths.guest), guest.GUEST]


def etc_files() -> dict[str, bytes]:
    """Files under /etc that are made, not taken from the host."""
    return {
        "/etc/passwd": f"root:x:0:0:root:/:/bin/false\nera:x:{guest.UID}:{guest.UID}::/tmp:/bin/sh\n".encode(),
        "/etc/group": f"root:x:0:\nera:x:{guest.UID}:\n".encode(),
        **resolver_files(),
    }


def resolver_files() -> dict[str, bytes]:
    """Files under /etc by which the C library resolves names."""
    return {
        "/etc/hosts": b"127.0.0.1 localhost era\n::1 localhost\n",
        "/etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
        "/etc/resolv.conf": f"nameserver {guest.NAMESERVER}\n".encode(),
    }

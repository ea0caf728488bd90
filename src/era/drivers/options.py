"""bubblewrap's options for a sandbox: what it sees, and what of that it can change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from era.core.models import JsonObject
from era.core.program import Limits
from era.drivers import guest, prefix
from era.drivers.staging import Paths
from era.languages.python import PREFIX

READ_ONLY_PROC = ("sys", "sysrq-trigger", "irq", "bus")


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
    paths: Paths,
    sandbox_id: str,
    limits: Limits,
    config: JsonObject,
    data: dict[str, int],
    package_set: str | None = None,
) -> list[str]:
    """bubblewrap's options for one sandbox. `config` is the supervisor's configuration, `data` maps paths inside to
    descriptors that hold the files' content, `package_set` is a digest."""
    options = ["--unshare-all", "--unshare-user", "--disable-userns"]
    options += ["--uid", str(guest.UID), "--gid", str(guest.UID)]
    options += ["--die-with-parent", "--as-pid-1", "--new-session", "--hostname", "era", "--cap-drop", "ALL"]
    options += variables(config)
    options += read_only(paths, data, package_set)
    options += ["--proc", "/proc", "--dev", "/dev"]
    # The kernel's own settings. bubblewrap makes them read-only too, but only where it thinks that it could write them.
    for name in READ_ONLY_PROC:
        options += ["--ro-bind-try", f"/proc/{name}", f"/proc/{name}"]
    return options + own(paths, sandbox_id, limits, config)


def template_arguments(
    paths: Paths, template_id: str, limits: Limits, config: JsonObject, data: dict[str, int]
) -> list[str]:
    """bubblewrap's options for a root service's template (guest/template.py). It sees what a sandbox sees, and the
    host's /proc, from where it enters namespaces. Of what root may do it may become a sandbox's uid, and have its
    children killed when it ends."""
    options = ["--unshare-ipc", "--unshare-net", "--unshare-uts", "--die-with-parent", "--new-session"]
    options += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]
    options += [*variables(config), *read_only(paths, {}, None)]
    for path, descriptor in data.items():
        options += ["--ro-bind-data", str(descriptor), path]
    options += ["--ro-bind", "/proc", "/proc", "--dev", "/dev", "--dir", prefix.PACKAGES_SITE]
    return options + own(paths, template_id, limits, config)


def variables(config: JsonObject) -> list[str]:
    """Options for the environment of a supervisor with this configuration."""
    options = ["--clearenv", "--setenv", "PATH", guest.PATH, "--setenv", "LANG", "C.UTF-8"]
    options += ["--setenv", "PYTHONPATH", guest.GUEST, "--setenv", "PYTHONDONTWRITEBYTECODE", "1"]
    return [*options, "--setenv", "ERA_GUEST", json.dumps(config)]


def own(paths: Paths, sandbox_id: str, limits: Limits, config: JsonObject) -> list[str]:
    """Options for what a sandbox can write to, and that it can't to anything else. They come last."""
    options = []
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
    if paths.view is None:
        for name in guest.ETC:
            options += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        for name in guest.OWN_ETC:
            options += ["--symlink", f"{guest.GUEST}/etc/{name}", f"/etc/{name}"]
    else:  # each mount costs bubblewrap a third of a millisecond
        for source in (paths.view / "etc", *(path for path in paths.view.glob("*/*") if path.parent.name != "etc")):
            options += ["--ro-bind", str(source), f"/{source.relative_to(paths.view)}"]
    for path, descriptor in data.items():
        if paths.view is None or not (paths.view / path.lstrip("/")).exists():
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


def template_files() -> dict[str, bytes]:
    """Files that a template has otherwise. Python notes its user's home when it starts, and a template is root."""
    return {"/etc/passwd": b"root:x:0:0:root:/tmp:/bin/false\n"}


def resolver_files() -> dict[str, bytes]:
    """Files under /etc by which the C library resolves names."""
    return {
        "/etc/hosts": b"127.0.0.1 localhost era\n::1 localhost\n",
        "/etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n",
        "/etc/resolv.conf": f"nameserver {guest.NAMESERVER}\n".encode(),
    }

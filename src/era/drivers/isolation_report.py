"""The isolation that a sandbox's supervisor observed, as text for records and operators, and a driver's self-test."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from era import languages
from era.core.models import JsonObject, Language
from era.core.ports import Driver, Sandbox
from era.core.program import Limits, Output, Program
from era.errors import NoIsolation, SandboxFailed

_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_SECCOMP = {"0": "none", "1": "strict", "2": "filter"}
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def seen(report: JsonObject) -> JsonObject:
    """The walls that the kernel reports, by the supervisor's `report` (guest/startup.py)."""
    own = {name: os.readlink(f"/proc/self/ns/{name}") for name in _NAMESPACES}
    capabilities = [f"{name} {report[name]}" for name in _CAPABILITIES if int(report.get(name, "0"), 16)]
    return {
        "namespaces": [name for name in _NAMESPACES if report["namespaces"].get(name) != own[name]],
        "capabilities": ", ".join(capabilities) or "none",
        "no_new_privs": report["NoNewPrivs"] == "1",
        "seccomp": _SECCOMP[report["Seccomp"]],
        "landlock": report["landlock"],
    }


def of_sandbox(
    driver: str, uid: int | None, group: JsonObject | None, rlimits: dict[str, int], report: JsonObject
) -> JsonObject:
    """What is in force in a sandbox: `seen` of its `report`, and what bounds it. `uid` is None for this process's own,
    `group` None without a control group."""
    walls = seen(report)
    return {
        "driver": driver,
        "uid": os.getuid() if uid is None else uid,
        **walls,
        "network": "none" if "net" in walls["namespaces"] else "host",
        "cgroup": group,
        "memory": "cgroup" if group else "watched",
        "rlimits": rlimits,
    }


def of_the_kernel(enforced: JsonObject) -> list[str]:
    """The walls that the kernel has inside a sandbox, in words."""
    return [
        "system calls filtered" if enforced["seccomp"] == "filter" else "system calls not filtered",
        f"Landlock ABI {enforced['landlock']}" if enforced["landlock"] else "no Landlock in this kernel",
    ]


def summary(first: str, enforced: JsonObject, *, own_uid: bool, inner: Sequence[str] = ()) -> str:
    """A sentence about what is in force: `first` what kind of sandbox it is, then what all kinds have, with `inner`
    what this one has inside."""
    words = [first, "a uid of its own for each sandbox" if own_uid else "user namespaces of this user", *inner]
    if enforced["cgroup"]:
        bounded = "memory, processes and cpu" if "cpus" in enforced["cgroup"] else "memory and processes"
        words.append(f"{bounded} bounded by cgroup v{enforced['cgroup']['version']}")
    else:
        words.append("no cgroup: memory is watched, cpu is not bounded (start ERA as root for more)")
    reason = enforced["network_reason"]
    words.append(f"no internet access: {reason}" if reason else "internet only, and only for sessions that may")
    return "; ".join(words)


def advice(message: str) -> str:
    """What to do where bubblewrap fails with this message."""
    if "namespace" in message or "uid map" in message or "Operation not permitted" in message:
        return (
            "This kernel keeps ordinary users from making user namespaces. Allow it with "
            "`sysctl -w kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu), "
            "`sysctl -w kernel.unprivileged_userns_clone=1` (older Debian) or "
            "`sysctl -w user.max_user_namespaces=15000`."
        )
    return "Sandboxes need bubblewrap, user namespaces and a /usr that everyone may read."


_SECONDS = 120.0
"""For the program to run. A busy machine needs far more than the moment that it takes otherwise, and a driver that
fails its test is passed over until the service is started anew: for a weaker one, or else the service doesn't start."""


async def self_test(
    driver: Driver, language: Language, limits: Limits, why_offline: Callable[[Sandbox], str | None]
) -> JsonObject:
    """Run a program in a sandbox of its own. Returns what that had in force, and why its programs can't have the
    internet. Raises NoIsolation."""
    try:
        sandbox = await driver.create(language, limits)
    except SandboxFailed as error:
        raise NoIsolation(f"No {language} sandbox can be made. {error.message}", hint=advice(error.message)) from error
    try:
        code = languages.DEFINITIONS[language].hello.encode()
        output = b""
        async for event in sandbox.run(Program(code, timeout=_SECONDS, ephemeral=True)):
            if isinstance(event, Output):
                output += event.data
        if output != b"up\n":
            raise NoIsolation(
                f"A {language} sandbox does not work: it said {output[-500:].decode(errors='replace')!r}."
            )
        return {**sandbox.enforced, "network_reason": why_offline(sandbox)}
    finally:
        await sandbox.close()

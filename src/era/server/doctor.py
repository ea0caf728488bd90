"""What this machine has and lacks: each language, each wall of each kind of sandbox, and how to get what is missing.
`era doctor` prints it, and a server shows it to its operator."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta

from era import languages
from era.cluster.host_tls import HostTls, host_tls
from era.core.models import Finding, Isolation, JsonObject
from era.errors import NoIsolation, NotReady
from era.settings import Settings

_PACKAGES = {"seccomp": "install libseccomp (Debian, Ubuntu: apt-get install libseccomp2)"}
_SOON = timedelta(days=14)
"""Before its end, a certificate counts as one that is missing."""

_CGROUP = "start ERA as root or in a delegated cgroup, on a machine with cgroups (memory, pids, cpu)"


def language_findings() -> Iterator[Finding]:
    """Of each language, whether it can be run here; and its contexts, where they are missing."""
    for name in languages.LANGUAGES:
        try:
            yield Finding(name, True, f"{name} {languages.runtime(name).version}")
            if lack := languages.contexts_missing(name):
                yield Finding(name, False, f"contexts in {name}: {lack.reason}", lack.hint)
        except languages.Missing as missing:
            yield Finding(name, False, f"{name}: {missing.reason}", missing.hint)


def walls(kind: Isolation, isolation: JsonObject) -> Iterator[Finding]:
    """The walls of a driver that works, given its `isolation()`: limits on what programs can do or use."""

    def wall(there: bool, name: str, remedy: str = "") -> Finding:
        return Finding(kind, there, name, "" if there else remedy)

    tested = [name for name in languages.runtimes() if languages.DEFINITIONS[name].hello]
    yield wall(True, f"programs start and run in {', '.join(tested)}")
    namespaces = isolation["namespaces"]
    yield wall(len(namespaces) == 7, f"namespaces of its own: {', '.join(namespaces)}", "a newer kernel")
    privileged = isolation["capabilities"] != "none" or not isolation["no_new_privs"]
    yield wall(not privileged, "no capabilities, and no way to gain any")
    yield wall(isolation["own_uid"], "a host uid of its own for each sandbox", "start ERA as root")
    yield wall(isolation["seccomp"] == "filter", "system calls filtered", _PACKAGES["seccomp"])
    if isolation["driver"] == "gvisor":
        yield wall(True, "a kernel of its own in user space: programs reach the host's only by its TCP and UDP")
    else:
        landlock = isolation["landlock"]
        yield wall(
            bool(landlock),
            f"Landlock, ABI {landlock}" if landlock else "Landlock",
            "a kernel of 5.19 or newer with Landlock in its `lsm=` list",
        )
    cgroup = isolation["cgroup"]
    yield wall(cgroup is not None, "memory of the whole sandbox bounded", f"{_CGROUP}; until then of each process")
    yield wall(
        cgroup is not None and "cpus" in cgroup, "processors bounded", f"{_CGROUP}; until then a run may use them all"
    )
    yield wall(True, "processes, files, disk and output bounded")
    yield wall(isolation["network"] == "none", "no network but loopback")
    reason = isolation["network_reason"]
    yield wall(reason is None, "internet over TCP and UDP where a session may, by any client", reason or "")


def cluster_findings(settings: Settings) -> Iterator[Finding]:
    """Of a host whose cluster is to talk over TLS, whether the certificate that the settings name is good."""
    try:
        yield from certificate_findings(host_tls(settings))
    except NotReady as problem:
        yield Finding("cluster", False, f"TLS between hosts: {problem.message}", "see docs/cluster.md")


def certificate_findings(tls: HostTls | None) -> Iterator[Finding]:
    """For how long this host's certificate is good, where there is one."""
    if tls is not None:
        soon = tls.expires < datetime.now(UTC) + _SOON
        text = f"TLS between hosts: a certificate for {', '.join(tls.names)} until {tls.expires:%Y-%m-%d}"
        yield Finding("cluster", not soon, text, "put a new one there, and restart this host" if soon else "")


def findings(results: Mapping[Isolation, JsonObject | NoIsolation], tls: HostTls | None) -> Iterator[Finding]:
    """All of it, with the sandboxes of these results, as `report` takes them, and the certificate that is in use,
    whatever its file holds by now."""
    yield from language_findings()
    yield from certificate_findings(tls)
    for kind, isolation in results.items():
        if isinstance(isolation, NoIsolation):
            yield Finding(kind, False, isolation.message, isolation.hint)
        else:
            yield from walls(kind, isolation)


def report(
    results: Mapping[Isolation, JsonObject | NoIsolation], default: Isolation | None, settings: Settings
) -> Iterator[str]:
    """The lines of the report. `results` has the `isolation()` of each driver that works, and why others don't.
    `default` is what `auto` means, None where nothing works."""
    yield f"Linux {platform.release()}, Python {sys.version.split()[0]}"
    preparations = languages.preparations()
    for finding in language_findings():
        yield from _lines(finding)
        preparation = preparations.get(finding.about) if finding.there else None
        if preparation is not None and preparation.ready_place() is None:
            when = "the service first starts" if preparation.at_start else f"{finding.about} is first asked for"
            yield f"         {preparation.title} is compiled when {when}, which takes a minute, or by `make setup`"
    for finding in cluster_findings(settings):
        yield from _lines(finding)
    for name, isolation in results.items():
        yield ""
        if isinstance(isolation, NoIsolation):
            yield f"{name}: can't be had"
            yield f"missing  {isolation.message}"
            yield f"         {isolation.hint}"
            continue
        yield f"{name}: works" + (", and is what sessions get that don't say" if name == default else "")
        for wall in walls(name, isolation):
            yield from _lines(wall)
        if settings.cgroup_parent:
            text = f"control groups of sandboxes are made below ERA_CGROUP_PARENT, {settings.cgroup_parent}"
            yield from _lines(Finding(name, True, text))


def _lines(finding: Finding) -> Iterator[str]:
    yield f"{'ok     ' if finding.there else 'missing'}  {finding.text}"
    if not finding.there:
        yield f"         to get it: {finding.remedy}"

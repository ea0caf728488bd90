"""What is checked before a server starts, and before what it is made of is even imported: that takes a second or more,
and most that goes wrong at a start can be told at once. Each problem is a sentence with the way out."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from era.cluster.host_tls import host_tls
from era.common.spelling import nearest
from era.errors import Forbidden, NotReady
from era.settings import Settings

_LIKE = 0.75
"""How much of two names must be the same for one to be misspelt: ERA_PROT is, ERA_VERSION may be somebody's own."""

_LINGERS_SECONDS = 2.0
"""For which the lock of a server that was killed may outlast it: a process that it was just forking has it, too."""

_BACKLOG = 2048
"""Connections that may wait to be accepted."""

_SEEN_INSIDE = (
    *(Path("/", name) for name in ("usr", "bin", "lib", "lib32", "lib64", "libx32", "sbin")),
    Path(sys.base_prefix),
)
"""What sandboxes see of the machine (drivers/options.py), and the installation of their Python."""

OTHER_VARIABLES = frozenset(
    {
        "ERA_SERVER",  # of the command
        # what programs in a session have, which may start a server of their own
        *("ERA_SESSION", "ERA_SESSION_ID", "ERA_LANGUAGE", "ERA_BASE_URL", "ERA_PROXY_URL", "ERA_STORAGE_URL"),
    }
)
"""Variables that begin as settings do and are none."""


def check(settings: Settings, environment: Mapping[str, str]) -> Iterator[str]:
    """Check settings and machine. Yields what is odd but no reason not to start. Raises NotReady, or Forbidden for an
    address that is open to anybody."""
    yield from check_variables(environment)
    check_access(settings)
    check_cluster(settings)
    check_is_hidden(settings)
    check_directory(settings.data_dir)


def check_variables(environment: Mapping[str, str]) -> Iterator[str]:
    """Raises NotReady for a misspelt setting. Yields a warning for a variable that is none and is like none."""
    known = {f"ERA_{name.upper()}" for name in Settings.model_fields}
    for variable in sorted(environment):
        if not variable.startswith("ERA_") or variable in known | OTHER_VARIABLES:
            continue
        if meant := nearest(variable.removeprefix("ERA_"), [name.removeprefix("ERA_") for name in known], _LIKE):
            raise NotReady(f"{variable} is not a setting. Did you mean ERA_{meant}?")
        yield f"{variable} is not a setting, and is ignored; docs/settings.md has them all."


def check_access(settings: Settings) -> None:
    """Raises Forbidden for a server that anybody on a network could have code run by, unless that is insisted on."""
    if not is_loopback(settings.host) and settings.api_key is None and not settings.allow_no_key:
        raise Forbidden(
            f"Without an API key ERA serves loopback only, not {settings.host}: whoever reaches it could run code.",
            hint="Set ERA_API_KEY, or insist with --allow-no-key.",
        )


def check_cluster(settings: Settings) -> None:
    """Raises NotReady for a host of a cluster that the others couldn't reach, or couldn't trust."""
    if settings.shared_dir is None:
        for name in ("cluster_secret", "cluster_certificate", "cluster_certificate_key", "cluster_authority"):
            if getattr(settings, name) is not None:
                setting = f"ERA_{name.upper()}"
                raise NotReady(f"{setting} is set, but not ERA_SHARED_DIR: set both for a host of a cluster.")
        return
    if settings.cluster_secret is None:
        raise NotReady("A host of a cluster needs the secret of all its hosts: set ERA_CLUSTER_SECRET.")
    if settings.shared_dir.resolve() == settings.data_dir.resolve():
        raise NotReady("ERA_SHARED_DIR is this host's data directory; choose another with --data-dir or ERA_DATA_DIR.")
    if settings.host in ("0.0.0.0", "::") and settings.host_url is None:  # noqa: S104  it is only compared
        raise NotReady(f"At {settings.host} no other host reaches this one: set ERA_HOST_URL to a URL where they do.")
    try:
        _ = urlsplit(settings.host_url or "").port
    except ValueError:
        raise NotReady(f"ERA_HOST_URL is {settings.host_url}, at which no host can be called.") from None
    if host_tls(settings) is None and settings.cluster_port:
        raise NotReady("ERA_CLUSTER_PORT is for hosts that talk over TLS: set ERA_CLUSTER_CERTIFICATE, too.")


def check_is_hidden(settings: Settings) -> None:
    """Raises NotReady for a directory of ours in one that sandboxes see, whose programs could read what is in there."""
    for name, directory in (("ERA_DATA_DIR", settings.data_dir), ("ERA_SHARED_DIR", settings.shared_dir)):
        for seen in _SEEN_INSIDE:
            if directory is not None and directory.resolve().is_relative_to(seen.resolve()):
                why = f"sandboxes see {seen}, and so would programs what is in there"
                raise NotReady(f"{name} can't be {directory}: {why}; choose another directory.")


def check_directory(directory: Path) -> None:
    """Raises NotReady for a data directory that can't be made or written to, or that another server uses."""
    other = "choose another with --data-dir or ERA_DATA_DIR"
    place = directory.resolve()
    while not os.path.exists(place) and place != place.parent:  # unlike Path's, false also where it may not look
        place = place.parent
    if not os.path.isdir(place):
        raise NotReady(f"The data directory can't be {directory}: {place} is not a directory; {other}.")
    try:
        with tempfile.TemporaryDirectory(prefix=".era-start-", dir=place):
            pass  # permissions alone don't tell: root may write everywhere, but not to a file system that is read-only
    except OSError as error:
        why = f"{place} can't be written to ({error.strerror})"
        raise NotReady(f"The data directory can't be {directory}: {why}; {other}.") from None
    given_up_at = time.monotonic() + _LINGERS_SECONDS
    try:
        with (directory / "lock").open() as lock:
            while not _can_be_had(lock):
                if time.monotonic() > given_up_at:
                    raise NotReady(f"Another ERA service uses {directory.resolve()}: stop it, or {other}.")
                time.sleep(0.02)
    except OSError:
        return  # nobody has used it yet, or its problem is told when it is opened to stay


def _can_be_had(lock: IO[str]) -> bool:
    """Whether no other process holds a lock that nobody may share."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_address(settings: Settings) -> list[socket.socket]:
    """Listen where the settings say, from now on: of two servers that start at the same moment, one is told at once.
    Who connects meanwhile waits until the service is there. Raises NotReady.

    A host of a cluster only sees whether it could, and returns none: it may be started anew in the place of one that
    has died. As long as nobody listens there, others know that a call hasn't reached it, and make the call elsewhere.
    """
    listening = listen(settings.host, settings.port)
    if settings.shared_dir is None:
        return listening
    if settings.cluster_certificate is not None:
        listening += listen(settings.host, settings.cluster_port, "ERA_CLUSTER_PORT")
    for each in listening:
        each.close()
    return []


def listen(host: str, port: int, option: str = "--port") -> list[socket.socket]:
    """Sockets that listen at all addresses that the host has: `localhost` may have two. `option` sets the port. Raises
    NotReady."""
    nowhere = NotReady(f"There is no address {host} to listen on: give one of this machine's with --host.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise nowhere from None
    listening: list[socket.socket] = []
    for family, kind, protocol, _, address in dict.fromkeys(found):
        try:
            made = socket.socket(family, kind, protocol)
        except OSError:
            continue  # this machine has no such addresses, IPv6 mostly
        listening.append(made)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # or `::` would be all IPv4 addresses, too
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind(address)
            made.listen(_BACKLOG)
        except OSError as error:
            for each in listening:
                each.close()
            raise NotReady(_unusable(host, port, error, option)) from None
    if not listening:
        raise nowhere
    return listening


def _unusable(host: str, port: int, error: OSError, option: str) -> str:
    """Why an address can't be listened on, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {host} is in use: choose another with {option} (0: any), or stop what listens there."
    if error.errno == errno.EACCES:
        return f"Port {port} may be used by root only: choose one from 1024 with {option}."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine: give one that is with --host."
    return f"{host}, port {port}, can't be listened on: {error.strerror}; choose others with --host and {option}."


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on this address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False

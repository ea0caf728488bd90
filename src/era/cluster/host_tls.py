"""TLS between the hosts of a cluster: what each of them shows the others, and whom it believes.

Theory of operation. A host has a certificate for its own address, and an authority that has signed those of all hosts.
It serves the others at a port of its own, and nobody there who has no such certificate; calling them it looks whether
the certificate is for the address that it calls. Nothing else is trusted, neither what the machine trusts nor anything
plain. So a host without a certificate, or with one of somebody else's, is of no use to the others.

A host tries its certificate on itself before it starts, both ways: what OpenSSL would refuse between two hosts is told
at once, and in OpenSSL's own words.
"""

from __future__ import annotations

import ssl
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from era.errors import NotReady
from era.settings import Settings


@dataclass(frozen=True, slots=True)
class HostTls:
    """The two ends of the connections between hosts."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    names: tuple[str, ...]
    """Names and addresses that this host's certificate is for."""

    expires: datetime
    """When that ends."""


def host_tls(settings: Settings) -> HostTls | None:
    """TLS as the settings want it; None where they don't. Raises NotReady where it can't be had."""
    files = {
        "ERA_CLUSTER_CERTIFICATE": settings.cluster_certificate,
        "ERA_CLUSTER_CERTIFICATE_KEY": settings.cluster_certificate_key,
        "ERA_CLUSTER_AUTHORITY": settings.cluster_authority,
    }
    if not any(files.values()):
        return None
    if missing := [name for name, file in files.items() if file is None]:
        raise NotReady(f"TLS between hosts needs {' and '.join(missing)}, too; or set none of {', '.join(files)}.")
    for name, file in files.items():
        _check_readable(name, file)
    if settings.host_url is not None and urlsplit(settings.host_url).scheme != "https":
        raise NotReady("ERA_HOST_URL is plain, and ERA_CLUSTER_CERTIFICATE says that hosts talk over TLS: use https.")
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context in (server, client):
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        _load(context, settings)
    server.num_tickets = 0  # each connection is kept for many calls
    return HostTls(server, client, *_tried(server, client, host_name(settings)))


def host_name(settings: Settings) -> str:
    """The name or address at which other hosts call this one."""
    return (settings.host_url and urlsplit(settings.host_url).hostname) or settings.host


def _check_readable(name: str, file: Path | None) -> None:
    try:
        if file is not None:
            file.open("rb").close()
    except OSError as error:
        raise NotReady(f"{name} can't be read: {file}: {error.strerror}.") from None


def _load(context: ssl.SSLContext, settings: Settings) -> None:
    """Raises NotReady where files have something else in them, or don't belong together."""
    try:
        context.load_verify_locations(cafile=settings.cluster_authority)
    except ssl.SSLError:
        raise NotReady(f"ERA_CLUSTER_AUTHORITY has no certificate in PEM: {settings.cluster_authority}.") from None
    certificate, key = settings.cluster_certificate, settings.cluster_certificate_key
    try:  # a password is asked for by nobody: a host starts unattended
        context.load_cert_chain(str(certificate), key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        why = getattr(error, "reason", None) or "it is no PEM, or needs a password"
        raise NotReady(f"ERA_CLUSTER_CERTIFICATE and its key can't be used: {certificate}, {key}: {why}.") from None


def _tried(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> tuple[tuple[str, ...], datetime]:
    """Have this host call itself: names of its certificate, and the end of its time. Raises NotReady."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        caller = client.wrap_bio(down, up, server_hostname=name)
        called = server.wrap_bio(up, down, server_side=True)
        for end in (caller, called, caller, called):
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
    except ssl.SSLError as error:  # of a key that TLS 1.3 has no signatures for, too
        raise NotReady(f"Other hosts wouldn't take ERA_CLUSTER_CERTIFICATE: {why_refused(error)}.") from None
    except ValueError:
        raise NotReady(f"Other hosts couldn't call this one: '{name}' is no name of a host.") from None
    certificate = caller.getpeercert() or {}
    names = tuple(str(each[1]) for each in certificate.get("subjectAltName", ()))
    return names, datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"]))).astimezone()


def why_refused(error: ssl.SSLError) -> str:
    """Why TLS came to nothing, in OpenSSL's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message).rstrip(".")
    return str(error.reason or error).replace("_", " ").lower()

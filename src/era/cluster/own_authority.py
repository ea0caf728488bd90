"""TLS between hosts on one machine, without anybody's certificates: an authority that is made when they start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from era.issuer import YEARS, Issuer


def certify(directory: Path, hosts: Sequence[str], address: str) -> Mapping[str, Mapping[str, str]]:
    """The settings of each of these hosts, all at this address, by its name. Their files are in the directory, and are
    those of nobody else: with the authority's key, which is kept nowhere, no more can be made. Raises OSError."""
    directory.mkdir(mode=0o700, exist_ok=True)
    issuer = Issuer("ERA, hosts of a cluster")
    authority = directory / "authority.pem"
    _write(authority, issuer.certificate)
    found = {}
    for host in hosts:
        certificate, key = directory / f"{host}.pem", directory / f"{host}.key"
        for file, content in zip((key, certificate), issuer.issue([address], YEARS, calls=True), strict=True):
            _write(file, content)
        found[host] = {
            "ERA_CLUSTER_AUTHORITY": str(authority),
            "ERA_CLUSTER_CERTIFICATE": str(certificate),
            "ERA_CLUSTER_CERTIFICATE_KEY": str(key),
        }
    return found


def _write(file: Path, content: bytes) -> None:
    """Write a file for nobody else to read, in the place of the one before."""
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as opened:
        opened.write(content)

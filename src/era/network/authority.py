"""A certificate authority of this process's own, for TLS with programs of runs with secrets (interception.py).

Its key is made when the service starts, and is nowhere but in this process's memory. What is on disk is a bundle of
certificates for sandboxes: those that programs trust anyway, and this authority's. Only runs with secrets trust it.
"""

from __future__ import annotations

import os
import ssl
import time
from collections import OrderedDict
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from era.network.issuer import Issuer

BUNDLE = "/etc/era/certificates.pem"
"""The bundle's path in sandboxes."""

TRUSTED = "/etc/ssl/certs/ca-certificates.crt"
"""Where Debian and others keep the certificates that a machine trusts. Sandboxes have it at the same path."""

_VARIABLES = (
    *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "DENO_CERT"),
    *("GIT_SSL_CAINFO", "PIP_CERT", "AWS_CA_BUNDLE"),
)
_TWO_DAYS = timedelta(days=2)
_FRESH_SECONDS = 12 * 3600.0
_MAX_HOSTS = 1024


class Authority:
    """Issues certificates for hosts when they are needed."""

    def __init__(self) -> None:
        self._issuer = Issuer("ERA, for runs with secrets")
        self.certificate = self._issuer.certificate
        """In PEM."""

        self._contexts: OrderedDict[str, tuple[float, ssl.SSLContext]] = OrderedDict()

    def write(self, path: Path) -> None:
        """Write the bundle, for everybody to read. Raises OSError."""
        candidates = (TRUSTED, ssl.get_default_verify_paths().cafile)
        trusted = next((Path(one).read_bytes() for one in candidates if one and Path(one).exists()), b"")
        new = path.with_suffix(".new")
        new.write_bytes(trusted.rstrip(b"\n") + b"\n" + self.certificate)
        new.chmod(0o644)
        new.replace(path)

    def context(self, host: str, *, kept: bool = True) -> ssl.SSLContext:
        """A TLS server context with a certificate for this host, good for _FRESH_SECONDS and `kept` for that long. Its
        only application protocol is HTTP/1.1."""
        made, context = self._contexts.get(host, (0.0, None))
        if context is None or time.monotonic() > made + _FRESH_SECONDS:
            context = self._new_context(host)
            if not kept:
                return context
            self._contexts[host] = time.monotonic(), context
            if len(self._contexts) > _MAX_HOSTS:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(host)
        return context

    def _new_context(self, host: str) -> ssl.SSLContext:
        key, certificate = self._issuer.issue([host], _TWO_DAYS)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        # OpenSSL reads a file only. This one is memory of this process.
        with os.fdopen(os.memfd_create("era-certificate"), "wb", buffering=0) as file:
            file.write(key + certificate)
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context


def variables() -> Mapping[str, str]:
    """Environment variables by which programs trust the bundle."""
    return dict.fromkeys(_VARIABLES, BUNDLE)

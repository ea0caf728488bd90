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
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BUNDLE = "/etc/era/certificates.pem"
"""The bundle's path in sandboxes."""

TRUSTED = "/etc/ssl/certs/ca-certificates.crt"
"""Where Debian and others keep the certificates that a machine trusts. Sandboxes have it at the same path."""

_VARIABLES = (
    *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "DENO_CERT"),
    *("GIT_SSL_CAINFO", "PIP_CERT", "AWS_CA_BUNDLE"),
)
_YEARS = timedelta(days=3650)
_DAY = timedelta(days=1)
_FRESH_SECONDS = 12 * 3600.0
_MAX_HOSTS = 1024


class Authority:
    """Issues certificates for hosts when they are needed."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ERA, for runs with secrets")])
        self._certificate = self._signed(
            self._name,
            self._key.public_key(),
            _YEARS,
            [
                (x509.BasicConstraints(ca=True, path_length=0), True),
                (_usage(signs=True), True),
            ],
        )
        self._contexts: OrderedDict[str, tuple[float, ssl.SSLContext]] = OrderedDict()

    def write(self, path: Path) -> None:
        """Write the bundle, for everybody to read. Raises OSError."""
        candidates = (TRUSTED, ssl.get_default_verify_paths().cafile)
        trusted = next((Path(one).read_bytes() for one in candidates if one and Path(one).exists()), b"")
        new = path.with_suffix(".new")
        new.write_bytes(trusted.rstrip(b"\n") + b"\n" + self._certificate.public_bytes(Encoding.PEM))
        new.chmod(0o644)
        new.replace(path)

    def context(self, host: str) -> ssl.SSLContext:
        """A TLS server context with a certificate for this host, good for _FRESH_SECONDS and kept for that long. Its
        only application protocol is HTTP/1.1."""
        made, context = self._contexts.get(host, (0.0, None))
        if context is None or time.monotonic() > made + _FRESH_SECONDS:
            context = self._new_context(host)
            self._contexts[host] = time.monotonic(), context
            if len(self._contexts) > _MAX_HOSTS:
                self._contexts.popitem(last=False)
        self._contexts.move_to_end(host)
        return context

    def _new_context(self, host: str) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._signed(
            x509.Name([]),
            key.public_key(),
            2 * _DAY,
            [
                (x509.BasicConstraints(ca=False, path_length=None), True),
                (x509.SubjectAlternativeName([x509.DNSName(host)]), True),
                (_usage(signs=False), True),
                (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            ],
        )
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.set_alpn_protocols(["http/1.1"])
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        # OpenSSL reads a file only. This one is memory of this process.
        with os.fdopen(os.memfd_create("era-certificate"), "wb", buffering=0) as file:
            file.write(pem + certificate.public_bytes(Encoding.PEM))
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
        return context

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        validity: timedelta,
        extensions: list[tuple[x509.ExtensionType, bool]],
    ) -> x509.Certificate:
        """A certificate by this authority; `extensions` come with whether they are critical."""
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + validity)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self._key, hashes.SHA256())


def variables() -> Mapping[str, str]:
    """Environment variables by which programs trust the bundle."""
    return dict.fromkeys(_VARIABLES, BUNDLE)


def _usage(*, signs: bool) -> x509.KeyUsage:
    """The KeyUsage extension of an authority (`signs`) or of a server."""
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )

"""An authority that signs certificates for TLS. Its key is in this process's memory and nowhere else; who trusts it is
for whoever makes one to decide."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

YEARS = timedelta(days=3650)
_DAY = timedelta(days=1)
"""By which clocks may be apart."""


class Issuer:
    """Such an authority, made new."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        own = [(x509.BasicConstraints(ca=True, path_length=0), True), (_usage(signs=True), True)]
        self.certificate = self._signed(self._name, self._key.public_key(), YEARS, own)
        """Its own certificate, in PEM."""

    def issue(self, names: Sequence[str], validity: timedelta, *, calls: bool = False) -> tuple[bytes, bytes]:
        """The key and the certificate, in PEM, of a server with these names or addresses, which `calls` others with the
        same certificate or doesn't."""
        key = ec.generate_private_key(ec.SECP256R1())
        uses = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if calls else [])]
        extensions: list[tuple[x509.ExtensionType, bool]] = [
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (x509.SubjectAlternativeName([_name(each) for each in names]), True),
            (_usage(signs=False), True),
            (x509.ExtendedKeyUsage(uses), False),
        ]
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return pem, self._signed(x509.Name([]), key.public_key(), validity, extensions)

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        validity: timedelta,
        extensions: Sequence[tuple[x509.ExtensionType, bool]],
    ) -> bytes:
        """A certificate by this authority, in PEM; `extensions` come with whether they are critical."""
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
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


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

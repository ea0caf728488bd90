"""Secrets: values that a run's programs may use towards hosts that the caller names, and never see.

A program has a placeholder in its environment, made up for this run. Where it sends that to one of the hosts, the
network swaps the value in (network/interception.py). So a value passes through this process and is nowhere else: in no
row, blob, log or sandbox.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from era.core.allowlist import Allowlist, NotAnEntry, allowlist
from era.errors import BadRequest

MAX_SECRETS = 64
MAX_HOSTS = 32
"""Of one secret."""

MAX_VALUE_BYTES = 8 << 10

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def _placeholder() -> str:
    # Nothing in it is written another way in a URL, a form, a header or JSON.
    return f"era_secret_{secrets.token_hex(16)}"


PLACEHOLDER = re.compile(rb"era_secret_[0-9a-f]{32}")
"""Every placeholder there is, also those of other runs."""


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret of one run."""

    name: str
    """The variable that has the placeholder."""

    value: str = field(repr=False)
    hosts: Allowlist
    """Where the value may be sent: names only, at least one."""

    plain_http: bool = False
    """Whether it may be sent there without TLS, too."""

    placeholder: str = field(default_factory=_placeholder)


def secret(
    name: str, value: str, hosts: Sequence[str], other_names: Container[str], *, plain_http: bool = False
) -> Secret:
    """Validate a secret of a request. `other_names` are the names of the run's other variables. Raises BadRequest,
    which never quotes a value, nor what might be one in a wrong place."""
    if not _NAME.fullmatch(name):
        raise BadRequest(
            "'secrets' has a name that can't be used.",
            hint="A name has letters, digits and underscores, at most 128, and doesn't begin with a digit.",
        )
    if name in other_names:
        raise BadRequest(f"'{name}' is in 'env' and in 'secrets'.", hint="Leave it out of one of them.")
    if not value or _CONTROL.search(value):
        raise BadRequest(
            f"'secrets.{name}.value' can't be used.",
            hint="A value has a character at least, and no control characters.",
        )
    if len(value.encode()) > MAX_VALUE_BYTES:
        raise BadRequest(f"'secrets.{name}.value' is over {MAX_VALUE_BYTES >> 10} KiB.", hint="Use a shorter one.")
    try:
        names = allowlist(hosts)
    except NotAnEntry:
        names = None
    if names is None or names.ranges or names.everything:
        raise BadRequest(
            f"'secrets.{name}.hosts' has an entry that is no host name, or none at all.",
            hint="An entry is a host (api.example.com) or all below one (*.example.com).",
        )
    return Secret(name, value, names, plain_http)


def placeholders(secrets: Sequence[Secret]) -> dict[str, str]:
    """The environment variables that programs get instead of the values."""
    return {secret.name: secret.placeholder for secret in secrets}

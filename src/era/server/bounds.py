"""The settings that bound something: as the values that the core works with, and as an operator is shown them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from era.core.limits import LEAST, Rules, can_be_limits
from era.core.metadata import Retention
from era.core.models import JsonObject, SettingInForce
from era.core.owners.quotas import WORDS, Amounts
from era.core.program import Limits
from era.errors import BadRequest
from era.settings import Settings

_OUTPUT_BYTES = 10 << 20
"""Bytes of stdout, and of stderr, that the answer of a run has by default."""

_TMP_BYTES = 64 << 20
"""Size of /tmp, and of /dev/shm. A session that asks for more memory than the default gets so much more of these."""

_MOST = 1 << 40
"""The largest number in a setting of limits or quotas. Read as MiB, its number of bytes fits into 64 bits."""


def rules(settings: Settings) -> Rules:
    """The limits that sessions get by default and may ask for at most. Raises BadRequest for ERA_MAX_LIMITS."""
    defaults = Limits(
        memory_bytes=settings.memory_mb << 20,
        cpus=settings.cpus,
        pids=settings.pids,
        disk_bytes=settings.disk_mb << 20,
        files=settings.files,
        output_bytes=_OUTPUT_BYTES,
        tmp_bytes=_TMP_BYTES,
        write_bytes_per_second=settings.disk_write_mbps << 20,
    )
    most = _amounts(settings.max_limits)
    if not can_be_limits(most) or max(most.values(), default=0) > _MOST:
        raise BadRequest(
            f"ERA_MAX_LIMITS is {settings.max_limits[:200]!r}, which are no limits.",
            hint=f"Write them as memory_mb=2048,cpus=4. There are {', '.join(LEAST)}.",
        )
    return Rules.of(defaults, most)


def retention(settings: Settings) -> Retention:
    """How much of the past is kept."""
    return Retention(
        versions=settings.versions_kept,
        outputs=settings.outputs_kept,
        grace_seconds=settings.grace_seconds,
    )


def quotas_by_default(settings: Settings) -> Amounts:
    """The quotas of owners for whom nothing else was set. Raises BadRequest for ERA_QUOTAS."""
    amounts = _amounts(settings.quotas)
    if not all(name in WORDS and isinstance(amount, int) and 0 <= amount <= _MOST for name, amount in amounts.items()):
        raise BadRequest(
            f"ERA_QUOTAS is {settings.quotas[:200]!r}, which are no quotas.",
            hint=f"Write them as sessions=100,disk_mb=10000. There are {', '.join(WORDS)}.",
        )
    return dict.fromkeys(WORDS, 0) | amounts


def _amounts(text: str) -> JsonObject:
    """Parse NAME=NUMBER, separated by commas or spaces. What is no number stays text."""
    amounts: JsonObject = {}
    for part in text.replace(",", " ").split():
        name, _, value = part.partition("=")
        try:
            amounts[name] = int(value) if value.isdecimal() else float(value)
        except ValueError:
            amounts[name] = value
    return amounts


def settings_in_force(settings: Settings) -> Iterator[SettingInForce]:
    """Every setting that bounds something: none of them is a secret, or says where something is."""
    for name, field in Settings.model_fields.items():
        if field.annotation not in (int, float, int | None) or name == "port":
            continue
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            value = None
        yield SettingInForce(f"ERA_{name.upper()}", value, field.default, field.description or "")
    usual = rules(Settings.model_construct()).most
    for name, most in rules(settings).most.items():
        yield SettingInForce(f"ERA_MAX_LIMITS {name}", most, usual[name], "Most that a session may ask for.")
    for name, amount in quotas_by_default(settings).items():
        yield SettingInForce(f"ERA_QUOTAS {name}", amount, 0, f"Of each owner: {WORDS[name]}. 0: no bound.")

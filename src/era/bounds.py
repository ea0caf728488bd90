"""The settings that bound something: as the values that the core works with, and as an operator is shown them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from era.core.limits import Rules
from era.core.metadata import Retention
from era.core.program import Limits
from era.core.quotas import WORDS, Amounts
from era.core.server_facts import SettingInForce
from era.settings import Settings


def rules(settings: Settings) -> Rules:
    """The limits that sessions get by default and may ask for at most. A maximum below its default is raised to it."""
    defaults = Limits(
        memory_bytes=settings.memory_mb << 20,
        cpus=settings.cpus,
        pids=settings.pids,
        disk_bytes=settings.disk_mb << 20,
        files=settings.files,
        output_bytes=settings.output_bytes,
        tmp_bytes=settings.tmp_mb << 20,
        write_bytes_per_second=settings.disk_write_mbps << 20,
    )
    maxima = Limits(
        memory_bytes=max(settings.max_memory_mb << 20, defaults.memory_bytes),
        cpus=max(settings.max_cpus, defaults.cpus),
        pids=max(settings.max_pids, defaults.pids),
        disk_bytes=max(settings.max_disk_mb << 20, defaults.disk_bytes),
        files=max(settings.max_files, defaults.files),
        output_bytes=max(settings.max_output_bytes, defaults.output_bytes),
        tmp_bytes=defaults.tmp_bytes,
        write_bytes_per_second=defaults.write_bytes_per_second,
    )
    return Rules(defaults, maxima)


def retention(settings: Settings) -> Retention:
    """How much of the past is kept."""
    return Retention(
        versions=settings.versions_kept,
        outputs=settings.outputs_kept,
        output_bytes=settings.outputs_mb << 20,
        answer_bytes=settings.answers_mb << 20,
        grace_seconds=settings.grace_seconds,
        runs=settings.runs_kept,
    )


def quotas_by_default(settings: Settings) -> Amounts:
    """The quotas of owners for whom nothing else was set."""
    return {name: getattr(settings, f"quota_{name}") for name in WORDS}


def settings_in_force(settings: Settings) -> Iterator[SettingInForce]:
    """Every setting that is a number, but the port: none of them is a secret, or says where something is."""
    for name, field in Settings.model_fields.items():
        if field.annotation not in (int, float, int | None) or name == "port":
            continue
        value = getattr(settings, name)
        if name.startswith("max_") and (default := name.removeprefix("max_")) in Settings.model_fields:
            value = max(value, getattr(settings, default))  # as `rules` has it
        if value is not None and not math.isfinite(value):
            value = None
        yield SettingInForce(f"ERA_{name.upper()}", value, field.default, field.description or "")

"""What the operator is shown of a server: limits as they hold, nothing secret, and how to get what is missing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from era import languages
from era.core.models import Finding, now
from era.errors import BadRequest, NoIsolation, NotFound
from era.server import doctor
from era.server.bounds import quotas_by_default, retention, rules, settings_in_force
from era.settings import Settings
from era.store.metadata import SqlStore
from tests.owners import mine


def test_limits_are_those_that_hold() -> None:
    settings = Settings(
        memory_mb=1024, max_limits="memory_mb=512,cpus=0.5", quotas="sessions=3", max_timeout=float("inf")
    )
    shown = {each.name: each for each in settings_in_force(settings)}
    maxima = rules(settings).maxima
    assert (shown["ERA_MAX_LIMITS memory_mb"].value, maxima.memory_bytes) == (1024, 1 << 30)
    assert (shown["ERA_MAX_LIMITS cpus"].value, maxima.cpus) == (1, 1)
    assert (shown["ERA_MAX_LIMITS disk_mb"].value, maxima.disk_bytes) == (4 * 4096, 4 * 4096 << 20)
    assert (shown["ERA_QUOTAS sessions"].value, shown["ERA_QUOTAS disk_mb"].value) == (3, 0)
    assert shown["ERA_MAX_TIMEOUT"].value is None
    assert (shown["ERA_MAX_WARM"].value, shown["ERA_MAX_WARM"].default) == (None, None)
    assert (shown["ERA_MEMORY_MB"].value, shown["ERA_MEMORY_MB"].default) == (1024, 512)
    assert all(each.description for each in shown.values())


def test_no_setting_is_told_that_is_a_secret_or_a_place() -> None:
    settings = Settings(api_key=SecretStr("sesame"), public_url="http://inside.example")
    for shown in settings_in_force(settings):
        assert isinstance(shown.value, int | float | None)
    names = {shown.name for shown in settings_in_force(settings)}
    assert not names & {"ERA_API_KEY", "ERA_PORT", "ERA_HOST", "ERA_DATA_DIR", "ERA_DATABASE_URL", "ERA_ALLOW_NO_KEY"}


def test_what_is_missing_says_how_to_get_it() -> None:
    found = list(doctor.findings({"gvisor": NoIsolation("runsc is missing", hint="install it")}, None))
    assert found[-1] == Finding("gvisor", False, "runsc is missing", "install it")
    assert {each.about for each in found[:-1]} == set(languages.LANGUAGES)


NUMBERS = {
    name: field.annotation
    for name, field in Settings.model_fields.items()
    if field.annotation in (int, float, int | None) and name not in ("max_timeout", "port", "cluster_port")
}


@pytest.mark.parametrize("name", [name for name, kind in NUMBERS.items() if kind is float])
def test_no_time_is_endless_and_no_number_of_processors(name: str) -> None:
    for value in (math.inf, math.nan, 1e15):
        with pytest.raises(ValidationError):
            Settings.model_validate({name: value})


def test_idle_seconds_too_short_is_refused() -> None:
    Settings(idle_seconds=0.1)
    with pytest.raises(ValidationError):
        Settings(idle_seconds=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "memory=512",
        "memory_mb=12.5",
        "memory_mb",
        "memory_mb=1",
        "memory_mb=1099511627777",
        "cpus=inf",
        "cpus=nan",
        "=1",
    ],
)
def test_maximum_limits_are_refused_when_the_api_has_no_such_limit(text: str) -> None:
    with pytest.raises(BadRequest, match="ERA_MAX_LIMITS"):
        rules(Settings(max_limits=text))


@pytest.mark.parametrize(
    "text", ["session=1", "sessions=-1", "sessions=1.0", "sessions", "sessions=1099511627777", "5"]
)
def test_quotas_are_refused_when_the_api_has_no_such_quota(text: str) -> None:
    with pytest.raises(BadRequest, match="ERA_QUOTAS"):
        quotas_by_default(Settings(quotas=text))


def test_quotas_are_separated_by_commas_or_spaces() -> None:
    for text in ("sessions=3,disk_mb=100", "sessions=3 disk_mb=100", " sessions=3, disk_mb=100 "):
        set_here = {name: amount for name, amount in quotas_by_default(Settings(quotas=text)).items() if amount}
        assert set_here == {"sessions": 3, "disk_mb": 100}


async def test_the_largest_numbers_that_are_accepted_fit_into_rows(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        Settings(versions_kept=1 << 63)
    largest = {
        name: 300 if name == "lease_seconds" else 3.16224e9 if kind is float else 1 << 40
        for name, kind in NUMBERS.items()
    }
    store = SqlStore(f"sqlite:///{tmp_path}/era.sqlite", retention(Settings.model_validate(largest)))
    await store.open()
    try:
        await store.purge(now())
        await store.prune_runs()
        await store.prune_idempotency_keys()
        with pytest.raises(NotFound):
            await store.restore_session(mine("nobody's"))
    finally:
        await store.close()

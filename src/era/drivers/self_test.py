"""The proof that a driver's sandboxes work: a program in one."""

from __future__ import annotations

from collections.abc import Callable

from era import languages
from era.core.models import JsonObject, Language
from era.core.ports import Driver, Sandbox
from era.core.program import Limits, Output, Program
from era.drivers import isolation_report
from era.errors import NoIsolation, SandboxFailed

_SECONDS = 120.0
"""For the program to run. A busy machine needs far more than the moment that it takes otherwise, and a driver that
fails its test is passed over until the service is started anew: for a weaker one, or else the service doesn't start."""


async def self_test(
    driver: Driver, language: Language, limits: Limits, why_offline: Callable[[Sandbox], str | None]
) -> JsonObject:
    """Run a program in a sandbox of its own. Returns what that had in force, and why its programs can't have the
    internet. Raises NoIsolation."""
    try:
        sandbox = await driver.create(language, limits)
    except SandboxFailed as error:
        raise NoIsolation(
            f"No {language} sandbox can be made. {error.message}", hint=isolation_report.advice(error.message)
        ) from error
    try:
        code = languages.DEFINITIONS[language].hello.encode()
        output = b""
        async for event in sandbox.run(Program(code, timeout=_SECONDS, ephemeral=True)):
            if isinstance(event, Output):
                output += event.data
        if output != b"up\n":
            raise NoIsolation(
                f"A {language} sandbox does not work: it said {output[-500:].decode(errors='replace')!r}."
            )
        return {**sandbox.enforced, "network_reason": why_offline(sandbox)}
    finally:
        await sandbox.close()

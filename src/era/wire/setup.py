"""Setups and installed packages, as clients ask for them and are shown them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from era.wire.base import Body


class PipRequirements(Body):
    requirements: str = Field(description="As in a requirements.txt; separated by spaces or newlines.")


class NpmPackage(Body):
    packageJson: str = Field(description="The text of a package.json; its dependencies are what counts.")


class GoModules(Body):
    goMod: str = Field(description="The text of a go.mod; what it requires is what counts.")


class SetupBody(Body):
    """What is installed before a session runs anything."""

    pip: list[str] | PipRequirements | None = Field(None, examples=[["requests>=2.32"]])
    npm: list[str] | NpmPackage | None = Field(None, examples=[["axios@^1"]])
    go: list[str] | GoModules | None = Field(None, examples=[["rsc.io/quote@v1.5.2"]])
    commands: list[str] | None = Field(None, description="Run in the session's sandbox, after the packages.")
    envs: dict[str, str] | None = Field(None, description="Variables of every run; a run's own `env` wins.")


class SetupResult(BaseModel):
    success: bool
    duration_ms: int
    pip_packages: list[str]
    npm_packages: list[str]
    go_modules: list[str]
    commands_run: list[str]
    error: str | None
    stderr: str
    stdout: str


class PackageAnswer(BaseModel):
    name: str
    version: str
    integrity: str | None = Field(None, description="A digest of its archive, where the registry gives one.")


class EnvironmentAnswer(BaseModel):
    session_id: str
    setup_status: str | None
    environment: str | None
    pip: list[PackageAnswer]
    npm: list[PackageAnswer]
    go: list[PackageAnswer]


def wanted_setup(setup: SetupBody | None) -> dict[str, Any] | None:
    """A setup as the client gave it."""
    return setup.model_dump(exclude_unset=True) if setup else None

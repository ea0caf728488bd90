"""Setups and installed packages: what clients ask for, and how both are shown."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from era.common.few_errors import TextByName, Texts
from era.core.models import Session, SetupStatus
from era.core.setup.package_sets import PackageSet
from era.core.setup.setups import EVENTS
from era.wire.base import Body, ErrorEvent, GapEvent


class PipRequirements(Body):
    requirements: str = Field(description="As in a requirements.txt; separated by spaces or newlines.")


class NpmPackage(Body):
    packageJson: str = Field(description="The text of a package.json; only its dependencies are used.")


class GoModules(Body):
    goMod: str = Field(description="The text of a go.mod; only its requirements are used.")


class SetupBody(Body):
    """What is installed in a session before it runs anything. A string is a list, separated by spaces."""

    pip: Texts | str | PipRequirements | None = Field(None, examples=[["requests>=2.32"]])
    npm: Texts | str | NpmPackage | None = Field(None, examples=[["axios@^1"]])
    go: Texts | str | GoModules | None = Field(None, examples=[["rsc.io/quote@v1.5.2"]])
    commands: Texts | None = Field(None, description="Run in the session's sandbox, after the packages.")
    envs: TextByName | None = Field(None, description="Variables of every run; a run's own `env` wins.")


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


class SetupStatusEvent(BaseModel):
    """The setup waits or runs."""

    type: Literal["status"]
    setup_status: SetupStatus


class SetupLineEvent(BaseModel):
    """A line that a tool or a command wrote."""

    type: Literal["line"]
    stream: Literal["stdout", "stderr"]
    text: str


class SetupDoneEvent(BaseModel):
    """The setup has ended."""

    type: Literal["done"]
    setup_status: SetupStatus
    setup_result: SetupResult | None


SetupEvent = Annotated[
    SetupStatusEvent | SetupLineEvent | SetupDoneEvent | GapEvent | ErrorEvent, Field(discriminator="type")
]


class PackageAnswer(BaseModel):
    name: str
    version: str
    integrity: str | None = Field(None, description="Digest of its archive, where the registry gives one.")


class EnvironmentAnswer(BaseModel):
    session_id: str
    setup_status: SetupStatus | None
    environment: str | None = Field(description="The digest of all packages together.")
    pip: list[PackageAnswer]
    npm: list[PackageAnswer]
    go: list[PackageAnswer]


def result_view(session: Session) -> dict[str, Any] | None:
    """The result of a session's setup, None while there is none."""
    result: dict[str, Any] | None = json.loads(session.setup_result or "null")
    return result and {name: value for name, value in result.items() if name != EVENTS}


def requested_setup(setup: SetupBody | None) -> dict[str, Any] | None:
    """A setup as the client sent it, without the fields that were left out."""
    return setup.model_dump(exclude_unset=True) if setup else None


def environment_answer(session: Session, package_set: PackageSet | None) -> dict[str, Any]:
    """A session's installed packages, by installer. `package_set` is None where none are installed."""

    def listed(kind: str) -> list[dict[str, str]]:
        return [
            {name: item[name] for name in ("name", "version", "integrity") if item.get(name) is not None}
            for item in getattr(package_set, kind, ())
        ]

    return {
        "session_id": session.id,
        "setup_status": session.setup_status,
        "environment": session.package_set,
        "pip": listed("pip"),
        "npm": listed("npm"),
        "go": listed("go"),
    }

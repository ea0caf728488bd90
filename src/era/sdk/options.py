"""The keyword arguments that many methods share, and the JSON that they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from era.errors import BadRequest

if TYPE_CHECKING:

    class Secret(TypedDict):
        """A value that the program can send to these hosts, and never sees."""

        value: str
        hosts: Sequence[str]
        plain_http: NotRequired[bool]

    class ProgramOptions(TypedDict, total=False):
        """How a program is called."""

        command: str | Sequence[str]
        """What is run in place of code: a program and its arguments, or a line for `sh -c`."""

        args: Sequence[str]
        stdin: str
        cwd: str
        """Where to start, below the working directory."""

        env: Mapping[str, str]
        """Variables of this run only; never stored."""

        secrets: Mapping[str, Secret]
        timeout: float
        """Seconds that it may take. Default: the session's."""

    class ProcessOptions(TypedDict, total=False):
        """How a process is started."""

        cwd: str
        env: Mapping[str, str]
        secrets: Mapping[str, Secret]
        stdin: bool
        """Whether it takes input."""

        pty: Mapping[str, int]
        """A terminal of so many `cols` and `rows`."""

        tag: str
        """A name, which no other process that runs has."""

        timeout: float

    class RunOptions(ProgramOptions, total=False):
        """The same, of a run in a session."""

        atomic: bool
        """Keep data and files only if the run ends with 0."""

        context: str
        """The interpreter that stays, in which the code is a cell."""

        record_code: bool
        """False leaves the code or command out of the run's record. True doesn't override the session's False."""

        idempotency_key: str
        """A name of your own for this run, 1 to 255 characters of ASCII: however often it is sent, it runs once, and
        later calls get the first one's result."""

    class CellOptions(TypedDict, total=False):
        """How a cell is run in a context."""

        stdin: str
        cwd: str
        env: Mapping[str, str]
        secrets: Mapping[str, Secret]
        timeout: float
        record_code: bool
        """False leaves the code out of the run's record. True doesn't override the session's False."""

        idempotency_key: str

    class ExecuteOptions(ProgramOptions, total=False):
        """The same, of a run without a session."""

        files: Mapping[str, str]
        """Text files for its working directory."""

        allow_internet: bool
        limits: Mapping[str, float]
        isolation: str

    class SessionSettings(TypedDict, total=False):
        """What of a session can be given at its creation and changed later."""

        data: Mapping[str, Any]
        metadata: Mapping[str, Any]
        setup: Mapping[str, Any] | None
        default_timeout: float
        ttl: int | None
        """Seconds without a call after which it expires."""

        limits: Mapping[str, float]
        isolation: str
        allow_internet: bool
        egress: Sequence[str]
        """The hosts that its programs may reach; all, if none is named."""

        allow_public: bool
        """Whether anybody may call its public URL."""

        service: str | Sequence[str] | None
        storage: bool
        record_code: bool
        """Whether records of its runs keep the code or command that ran. Default: True."""

    class NewSession(SessionSettings, total=False):
        """What a session can be created with."""

        persistent: bool
        """Whether files outlive a run."""


_NAMES = {"allow_internet": "allowInternetAccess", "allow_public": "allowPublicAccess"}


def body(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the API that keyword arguments stand for. Those that are None are left out of a run's."""
    fields = {_NAMES.get(name, name): value for name, value in options.items()}
    if "egress" in fields:
        fields["egress"] = {"allow": list(fields["egress"])}
    return fields


def run_body(code: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Make the body of a run. Options that are None count as not given. Raises BadRequest for bytes."""
    given = {name: value for name, value in {"code": code, **options}.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, bytes | bytearray | memoryview):
            raise BadRequest(
                f"'{name}' is text, not bytes.",
                hint="Decode it. Bytes that are no text go into a file: session.files.write(path, content).",
                code="invalid_field",
            )
    return body(given)


def run_seconds(given: Mapping[str, Any], default: float) -> float:
    """Return the seconds that a run may take: its timeout, or the default. A timeout that is no number counts as left
    out here: the server refuses it and says why."""
    timeout = given.get("timeout")
    return float(timeout) if isinstance(timeout, int | float) else default

"""Reads capsule.json of an import, line by line, with every value validated."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from era.core import jsontext
from era.core.capsules import format as layout
from era.core.capsules.tars import Entry
from era.core.capsules.validators import bad_capsule, check_fields, too_large
from era.core.history import MAX_NAMED
from era.core.models import KeptOutputs, RunRecord, Session, Snapshot, StoredCode, Version, VersionContent
from era.core.sessions import check_code, check_metadata, data_text
from era.core.setup.requirements import setup_text
from era.errors import BadRequest

MAX_LINE_BYTES = 24 << 20
"""More than any request body may have, hence more than any line that a server has written."""

_CHUNK = 1 << 20
_FORMAT = re.compile(rb'\s*\{\s*"format"\s*:\s*(\d{1,9})\s*[,}]')
_RECORD = {field.name for field in fields(RunRecord)} - {"key", "session_key", "pieces"}


@dataclass(frozen=True, slots=True)
class Outputs:
    """The digests of a run's outputs."""

    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class DocumentReader:
    """Reads the capsule.json that is `entry` of the archive open as `fd`.

    All methods return validated values, and raise BadRequest or TooLarge. They may be called repeatedly: each reads the
    file again instead of keeping it in memory.
    """

    fd: int
    entry: Entry
    snapshot: Callable[[str], Snapshot]
    """Checks the tree of a root, and returns its snapshot."""

    def check_format(self) -> None:
        """Raises BadRequest for another format than this server reads."""
        match = _FORMAT.match(os.pread(self.fd, min(self.entry.size, 256), self.entry.offset))
        if match is None:
            raise bad_capsule(f"has a {layout.DOCUMENT} that doesn't begin with its format number")
        if int(match[1]) != layout.FORMAT:
            raise BadRequest(
                f"The capsule has format {int(match[1])}, this server reads format {layout.FORMAT}.",
                hint="Import it on a server of the version that wrote it, or of a newer one.",
                code="unknown_format",
            )

    def session(self) -> Session:
        """The session, with the content of its current version. Reads, and so checks, all versions."""
        last = None
        for last in self.versions():  # noqa: B007 - only the last one is used
            pass
        head = self._head()
        if last is None or last.version.n != head["version"]:
            raise bad_capsule("doesn't end with the session's current version")
        return _session(head, last)

    def versions(self) -> Iterator[VersionContent]:
        """The versions, oldest first. Numbers may be missing: of versions without a name, and of checkpoints, which are
        dropped before others that are older."""
        before = None
        names = set[str]()
        for value in self._items(0):
            if isinstance(value, dict):
                value = {**layout.ADDED_TO_VERSIONS, **value}
            content = _version(check_fields(value, layout.VERSION, "a version"), self.snapshot)
            version = content.version
            if before is not None and version.n <= before.n:
                raise bad_capsule("has versions that don't follow one another")
            if version.name is not None and version.name in names:
                raise bad_capsule(f"has two versions with the name '{version.name}'")
            if len(names) == MAX_NAMED and version.name is not None:
                raise too_large(f"has more than {MAX_NAMED} named versions")
            names |= set() if version.name is None else {version.name}
            before = version
            yield content

    def runs(self) -> Iterator[tuple[RunRecord, Outputs | None]]:
        """The records of the runs, oldest first, with the digests of their outputs if those are kept."""
        for value in self._items(1):
            if isinstance(value, dict):
                value = {**layout.ADDED_TO_RUNS, **value}
            yield _run(check_fields(value, layout.RUN, "a run"))

    def _head(self) -> dict[str, Any]:
        """The fields of the session, from the first line."""
        for line in self._lines():
            if not line.endswith(b","):
                break
            head = check_fields(_value(line[:-1] + b"}"), _HEAD, f"a {layout.DOCUMENT}")
            session = head["session"]
            if isinstance(session, dict):
                session = {**layout.ADDED, **session}
            return check_fields(session, layout.SESSION, "a session")
        raise bad_capsule(f"has a {layout.DOCUMENT} whose first line isn't the session's")

    def _items(self, section: int) -> Iterator[Any]:
        """The JSON values of one section: the versions (0) or the runs (1)."""
        lines = self._lines()
        next(lines, None)
        for number, (begin, end) in enumerate(_SECTIONS):
            if next(lines, None) != begin:
                raise bad_capsule(f"has a {layout.DOCUMENT} that isn't laid out line by line")
            for line in _list(lines, end):
                if number == section:
                    yield _value(line)
        if next(lines, None) is not None:
            raise bad_capsule(f"has a {layout.DOCUMENT} with something after its end")

    def _lines(self) -> Iterator[bytes]:
        """The lines of the document, without their line ends."""
        rest, at, end = b"", self.entry.offset, self.entry.offset + self.entry.size
        while at < end:
            piece = os.pread(self.fd, min(_CHUNK, end - at), at)
            at += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
            if len(rest) > MAX_LINE_BYTES or not piece:
                raise bad_capsule(f"has a {layout.DOCUMENT} with a line that is too long")
        if rest:
            raise bad_capsule(f"has a {layout.DOCUMENT} that ends in the middle of a line")


_HEAD = {
    "format": lambda value: value == layout.FORMAT,
    "era": lambda value: isinstance(value, str),
    "exported_at": lambda value: isinstance(value, str),
    "session": lambda value: isinstance(value, dict),
}
_SECTIONS = ((layout.VERSIONS_BEGIN, layout.VERSIONS_END), (layout.RUNS_BEGIN, layout.END))


def _list(lines: Iterator[bytes], end: bytes) -> Iterator[bytes]:
    """The lines up to `end`, without the commas between them."""
    follows = None
    for line in lines:
        if line == end and not follows:
            return
        if follows is False:
            break
        follows = line.endswith(b",")
        yield line.removesuffix(b",")
    raise bad_capsule(f"has a {layout.DOCUMENT} that isn't laid out line by line")


def _value(line: bytes) -> Any:
    """The JSON value of a line. Raises BadRequest."""
    try:
        return jsontext.loads(line)
    except jsontext.JsonProblem as error:
        raise bad_capsule(f"has a {layout.DOCUMENT} with a line that {error}") from None


def _session(head: dict[str, Any], current: VersionContent) -> Session:
    """A session, from its validated fields. Raises BadRequest or TooLarge where a part exceeds a bound."""
    check_metadata(head["metadata"])
    stored = None
    if head["code"] is not None:
        code = check_fields(head["code"], layout.CODE, "stored code")
        check_code(code["code"])
        stored = StoredCode(code["code"], code["description"], code["updated_at"])
    return Session(
        key=0,
        id=head["id"],
        owner="",  # set by the importer; a capsule doesn't name an owner
        language=head["language"],
        persistent=head["persistent"],
        data=current.data,
        metadata=head["metadata"],
        allow_internet=head["allowInternetAccess"],
        allow_public=head["allowPublicAccess"],  # the importer decides whether it counts
        default_timeout=float(head["default_timeout"]),
        stored=stored,
        version=head["version"],
        snapshot=current.version.snapshot,
        created_at=head["created_at"],
        updated_at=head["updated_at"],
        last_run_at=head["last_run_at"],
        ttl=head["ttl"],
        limits=head["limits"],
        isolation=head["isolation"],
        egress=head["egress"],
        service=head["service"],
        setup=setup_text(head["setup"]),
        setup_status="pending" if head["setup"] else None,
        setup_lock=jsontext.compact(head["lock"]) if head["setup"] and head["lock"] else None,
        storage=head["storage"],
        record_code=head["record_code"],
    )


def _version(value: dict[str, Any], snapshot: Callable[[str], Snapshot]) -> VersionContent:
    """A version, from its validated fields."""
    root = value["snapshot"]
    version = Version(
        n=value["version"],
        created_at=value["created_at"],
        cause=value["cause"],
        run_id=value["run_id"],
        snapshot=Snapshot() if root is None else snapshot(root),
        name=value["name"],
    )
    return VersionContent(version, data_text("data", value["data"]))


def _run(value: dict[str, Any]) -> tuple[RunRecord, Outputs | None]:
    """A run, from its validated fields."""
    for name in ("enforced", "egress", "artifacts"):
        if len(data_text(name, value[name])) > layout.MAX_ENFORCED:
            raise too_large(f"has a run whose '{name}' is over {layout.MAX_ENFORCED} characters")
    record = RunRecord(session_key=0, **{name: value[name] for name in _RECORD})
    stdout, stderr = value["stdout"], value["stderr"]
    if (stdout is None) != (stderr is None):
        raise bad_capsule("has a run of which one output is kept and one isn't")
    return record, None if stdout is None else Outputs(stdout, stderr)


def kept_outputs(digests: Outputs, read: Callable[[str], bytes | None]) -> KeptOutputs:
    """Outputs in the form of a row. `read` returns the content of a short one, None for one that is a blob."""
    stdout, stderr = read(digests.stdout), read(digests.stderr)
    return KeptOutputs(
        stdout,
        stderr,
        digests.stdout if stdout is None else None,
        digests.stderr if stderr is None else None,
    )

"""Reads capsule.json of an import, line by line, with every value validated."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from era.core import jsontext
from era.core.capsules import format as layout
from era.core.capsules.manifest import (
    FORMAT,
    MAX_ENFORCED,
    PLAIN_FIELDS,
    RECORD_FIELDS,
    HeadValues,
    RunValues,
    SessionValues,
    VersionValues,
)
from era.core.capsules.problems import bad_capsule, too_large
from era.core.capsules.tars import Entry
from era.core.models import KeptOutputs, RunRecord, Session, Snapshot, StoredCode, Version, VersionContent
from era.core.sessions import check_code, check_metadata, data_text
from era.core.setup.requirements import setup_text
from era.core.versions import MAX_NAMED
from era.errors import BadRequest

MAX_LINE_BYTES = 24 << 20
"""More than any request body may have, hence more than any line that a server has written."""

_CHUNK = 1 << 20
_FORMAT = re.compile(rb'\s*\{\s*"format"\s*:\s*(\d{1,9})\s*[,}]')


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
        if int(match[1]) != FORMAT:
            raise BadRequest(
                f"The capsule has format {int(match[1])}, this server reads format {FORMAT}.",
                hint="Import it on a server of the version that wrote it, or of a newer one.",
                code="unknown_format",
            )

    def session(self) -> Session:
        """The session, with the content of its current version. Reads, and so checks, all versions."""
        last = None
        for last in self.versions():  # noqa: B007 - only the last one is used
            pass
        head = self._head()
        if last is None or last.version.n != head.version:
            raise bad_capsule("doesn't end with the session's current version")
        return _session(head, last)

    def versions(self) -> Iterator[VersionContent]:
        """The versions, oldest first. Numbers may be missing: of versions without a name, and of checkpoints, which are
        dropped before others that are older."""
        before = None
        names = set[str]()
        for value in self._items(0):
            content = _version(VersionValues.read(value, "a version"), self.snapshot)
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
            yield _run(RunValues.read(value, "a run"))

    def _head(self) -> SessionValues:
        """The fields of the session, from the first line."""
        for line in self._lines():
            if not line.endswith(b","):
                break
            head = HeadValues.read(_value(line[:-1] + b"}"), f"a {layout.DOCUMENT}")
            return SessionValues.read(head.session, "a session")
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


def _session(head: SessionValues, current: VersionContent) -> Session:
    """A session, from its values. Raises BadRequest or TooLarge where a part exceeds a bound."""
    check_metadata(head.metadata)
    if head.code is not None:
        check_code(head.code.code)
    return Session(
        key=0,
        owner="",  # set by the importer, which also decides whether `allow_public` counts
        data=current.data,
        snapshot=current.version.snapshot,
        stored=None if head.code is None else StoredCode(**head.code.model_dump()),
        setup=setup_text(head.setup),
        setup_status="pending" if head.setup else None,
        setup_lock=jsontext.compact(head.lock) if head.setup and head.lock else None,
        **{name: getattr(head, name) for name in PLAIN_FIELDS},
    )


def _version(values: VersionValues, snapshot: Callable[[str], Snapshot]) -> VersionContent:
    """A version, from its values."""
    version = Version(
        n=values.version,
        created_at=values.created_at,
        cause=values.cause,
        run_id=values.run_id,
        snapshot=Snapshot() if values.snapshot is None else snapshot(values.snapshot),
        name=values.name,
    )
    return VersionContent(version, data_text("data", values.data))


def _run(values: RunValues) -> tuple[RunRecord, Outputs | None]:
    """A run, from its values."""
    for name in ("enforced", "egress", "artifacts"):
        if len(data_text(name, getattr(values, name))) > MAX_ENFORCED:
            raise too_large(f"has a run whose '{name}' is over {MAX_ENFORCED} characters")
    record = RunRecord(session_key=0, **{name: getattr(values, name) for name in RECORD_FIELDS})
    if values.stdout is not None and values.stderr is not None:
        return record, Outputs(values.stdout, values.stderr)
    if values.stdout != values.stderr:
        raise bad_capsule("has a run of which one output is kept and one isn't")
    return record, None


def kept_outputs(digests: Outputs, read: Callable[[str], bytes | None]) -> KeptOutputs:
    """Outputs in the form of a row. `read` returns the content of a short one, None for one that is a blob."""
    stdout, stderr = read(digests.stdout), read(digests.stderr)
    return KeptOutputs(
        stdout,
        stderr,
        digests.stdout if stdout is None else None,
        digests.stderr if stderr is None else None,
    )

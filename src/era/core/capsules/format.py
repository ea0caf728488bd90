"""The format of capsules: their files, and how capsule.json is written and read. manifest.py has its values.

A capsule is a tar archive of these files, in this order:

    capsule.json      the session: settings, labels, stored code; its versions with their data; the records of its runs
    README.txt        what this is, for whoever finds it in a bug report
    SHA256SUMS        of the two files above
    objects/DIGEST    each tree object and file of the versions, and each output of the runs, once, sorted by digest

capsule.json is one JSON document, laid out so that the session, each version and each run is a line of its own. It is
read line by line, so memory doesn't grow with their number, and each line is bounded by what a client could have sent.

A reader accepts this layout and nothing else: whatever differs is damaged or was meant to do harm. SHA256SUMS shows
whether capsule.json is complete, which no digest names; somebody who edits it by hand must update SHA256SUMS.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

from era import __version__
from era.core import jsontext
from era.core.capsules.manifest import (
    FORMAT,
    MAX_ENFORCED,
    PLAIN_FIELDS,
    RECORD_FIELDS,
    HeadValues,
    RunValues,
    SessionValues,
    VersionValues,
    bad_capsule,
    too_large,
)
from era.core.capsules.tars import Entry
from era.core.models import (
    JsonObject,
    KeptOutputs,
    RunRecord,
    Session,
    Snapshot,
    StoredCode,
    Version,
    VersionContent,
    now,
    timestamp,
)
from era.core.sessions.sessions import check_code, check_metadata, data_text
from era.core.sessions.versions import MAX_NAMED
from era.core.setup import requirements
from era.core.setup.requirements import setup_text
from era.errors import BadRequest

DOCUMENT, README, SUMS, OBJECTS = "capsule.json", "README.txt", "SHA256SUMS", "objects/"
VERSIONS_BEGIN, RUNS_BEGIN, END = b'"versions":[', b'"runs":[', b"]}"
VERSIONS_END = b"],"

_README = """\
This is a capsule of ERA: one session of a server that runs code in sessions that remember, with all that belongs to it.

  session   {id}
  written   {at} by ERA {version}, format {format}

capsule.json is the session: settings, labels, stored code, the versions of its data that are kept, and the records of
its runs. Times in it are microseconds since 1970, UTC. In objects/ are its files, what its runs wrote, and the lists of
its directories, each named by its SHA-256: a version's "snapshot" is the list of its working directory, a run's
"stdout" and "stderr" are what it wrote. `sha256sum -c SHA256SUMS` tells whether capsule.json is as it was written.

Values of env are not in here; they are never kept. Data, files, code and outputs are: look at them before you hand this
on. To take a look at the session on a server of your own:

  era import FILE --id NAME

Of its code, an import runs what its "setup" asks for and nothing else: its commands, and what must run to install its
packages. They run in a sandbox, with neither storage nor secrets of yours. The rest isn't run until you run it, as long
as you don't make the session public.
"""


class DocumentWriter:
    """Writes capsule.json into a file, and hashes it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hasher = hashlib.sha256()

    def write(self, session: Session, lock: JsonObject | None, versions: Iterator[bytes], runs: Iterator[bytes]) -> str:
        """Write the whole document. Returns its SHA-256.

        `lock` names the session's installed packages; `versions` and `runs` are lines, oldest first.
        """
        fields = _session_fields(session, lock)
        head = {"format": FORMAT, "era": __version__, "exported_at": timestamp(now()), "session": fields}
        self._line(jsontext.compact(head).encode()[:-1] + b",")
        self._line(VERSIONS_BEGIN)
        self._list(versions)
        self._line(VERSIONS_END)
        self._line(RUNS_BEGIN)
        self._list(runs)
        self._line(END)
        return self._hasher.hexdigest()

    def _list(self, lines: Iterator[bytes]) -> None:
        """Write lines with commas between them."""
        before: bytes | None = None
        for line in lines:
            if before is not None:
                self._line(before + b",")
            before = line
        if before is not None:
            self._line(before)

    def _line(self, line: bytes) -> None:
        self._file.write(line + b"\n")
        self._hasher.update(line + b"\n")


def version_line(content: VersionContent) -> bytes:
    """The line of a version in capsule.json."""
    version = content.version
    fields = {
        "version": version.n,
        "created_at": version.created_at,
        "cause": version.cause,
        "run_id": version.run_id,
        "name": version.name,
        "snapshot": version.snapshot.root,
    }
    # The data is stored as JSON text, and goes in as it is.
    return f'{jsontext.compact(fields)[:-1]},"data":{content.data}}}'.encode()


def run_line(record: RunRecord, digests: tuple[str, str] | None) -> bytes:
    """The line of a run in capsule.json. `digests` are those of stdout and stderr, None if they aren't kept."""
    values = {name: getattr(record, name) for name in RunValues.model_fields if name in RECORD_FIELDS}
    values["stdout"], values["stderr"] = digests or (None, None)
    return jsontext.compact(values).encode()


def readme(session_id: str) -> bytes:
    """The content of README.txt."""
    text = _README.format(id=session_id, at=timestamp(now()), version=__version__, format=FORMAT)
    return text.encode()


def sums(document: str, readme: bytes) -> bytes:
    """The content of SHA256SUMS. `document` is the digest of capsule.json, `readme` the content of README.txt."""
    return f"{document}  {DOCUMENT}\n{hashlib.sha256(readme).hexdigest()}  {README}\n".encode()


def _session_fields(session: Session, lock: JsonObject | None) -> dict[str, Any]:
    """The fields of a session in capsule.json."""
    others = {
        "setup": requirements.setup_view(session.setup),
        "lock": lock,
        "code": session.stored and asdict(session.stored),
    }
    return {
        field.alias or name: getattr(session, name) if name in PLAIN_FIELDS else others[name]
        for name, field in SessionValues.model_fields.items()
    }


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
            raise bad_capsule(f"has a {DOCUMENT} that doesn't begin with its format number")
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
            head = HeadValues.read(_value(line[:-1] + b"}"), f"a {DOCUMENT}")
            return SessionValues.read(head.session, "a session")
        raise bad_capsule(f"has a {DOCUMENT} whose first line isn't the session's")

    def _items(self, section: int) -> Iterator[Any]:
        """The JSON values of one section: the versions (0) or the runs (1)."""
        lines = self._lines()
        next(lines, None)
        for number, (begin, end) in enumerate(_SECTIONS):
            if next(lines, None) != begin:
                raise bad_capsule(f"has a {DOCUMENT} that isn't laid out line by line")
            for line in _list(lines, end):
                if number == section:
                    yield _value(line)
        if next(lines, None) is not None:
            raise bad_capsule(f"has a {DOCUMENT} with something after its end")

    def _lines(self) -> Iterator[bytes]:
        """The lines of the document, without their line ends."""
        rest, at, end = b"", self.entry.offset, self.entry.offset + self.entry.size
        while at < end:
            piece = os.pread(self.fd, min(_CHUNK, end - at), at)
            at += len(piece)
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
            if len(rest) > MAX_LINE_BYTES or not piece:
                raise bad_capsule(f"has a {DOCUMENT} with a line that is too long")
        if rest:
            raise bad_capsule(f"has a {DOCUMENT} that ends in the middle of a line")


_SECTIONS = ((VERSIONS_BEGIN, VERSIONS_END), (RUNS_BEGIN, END))


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
    raise bad_capsule(f"has a {DOCUMENT} that isn't laid out line by line")


def _value(line: bytes) -> Any:
    """The JSON value of a line. Raises BadRequest."""
    try:
        return jsontext.loads(line)
    except jsontext.JsonProblem as error:
        raise bad_capsule(f"has a {DOCUMENT} with a line that {error}") from None


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

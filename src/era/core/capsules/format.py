"""The format of capsules: their files, the fields of capsule.json with their validators, and how it is written.

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
from collections.abc import Iterator
from dataclasses import asdict
from typing import IO, Any, get_args

from era import __version__, languages
from era.core import jsontext
from era.core.allowlist import can_be_egress
from era.core.capsules import validators
from era.core.expiry import MAX_TTL
from era.core.files.artifacts import valid_artifacts
from era.core.limits import can_be_limits
from era.core.models import (
    Cause,
    JsonObject,
    RunRecord,
    Session,
    Status,
    VersionContent,
    WantedIsolation,
    can_be_service,
    now,
    timestamp,
)
from era.core.run_messages import MAX_RECORDED_BYTES
from era.core.setup import locks, requirements
from era.core.versions import NAME

FORMAT = 1
DOCUMENT, README, SUMS, OBJECTS = "capsule.json", "README.txt", "SHA256SUMS", "objects/"
VERSIONS_BEGIN, RUNS_BEGIN, END = b'"versions":[', b'"runs":[', b"]}"
VERSIONS_END = b"],"

_ID = validators.matching("[A-Za-z0-9_:-]{1,128}")
MAX_ENFORCED = 64 << 10
"""Bound of each of a run's JSON objects, in characters."""

SESSION: dict[str, validators.Check] = {
    "id": _ID,
    "language": validators.one_of(*languages.LANGUAGES),
    "persistent": validators.is_boolean,
    "metadata": validators.is_object,
    "allowInternetAccess": validators.is_boolean,
    "allowPublicAccess": validators.is_boolean,
    "default_timeout": validators.is_seconds,
    "ttl": validators.optional(validators.integer(1, MAX_TTL)),
    "limits": can_be_limits,
    "isolation": validators.one_of(*get_args(WantedIsolation.__value__)),
    "egress": can_be_egress,
    "service": validators.optional(can_be_service),
    "setup": validators.optional(requirements.can_be_setup),
    "lock": validators.optional(locks.can_be_lock),
    "storage": validators.is_boolean,
    "record_code": validators.is_boolean,
    "code": validators.optional(validators.is_object),
    "version": validators.integer(1),
    "created_at": validators.is_time,
    "updated_at": validators.is_time,
    "last_run_at": validators.optional(validators.is_time),
}
ADDED: dict[str, Any] = {
    **{"limits": {}, "isolation": "auto", "egress": {}, "service": None, "setup": None, "lock": None},
    "storage": True,
    "record_code": True,
}
ADDED_TO_VERSIONS: dict[str, Any] = {"name": None}
ADDED_TO_RUNS: dict[str, Any] = {
    **{"egress": {}, "artifacts": {}, "versions_dropped": 0, "setup_error": None},
    **{"code": None, "invocation": {}},
}
"""Fields of sessions, versions and runs that older capsules lack, with the values that they stand for."""

CODE: dict[str, validators.Check] = {
    "code": lambda value: isinstance(value, str),
    "description": validators.optional(lambda value: isinstance(value, str)),
    "updated_at": validators.is_time,
}
VERSION: dict[str, validators.Check] = {
    "version": validators.integer(1),
    "created_at": validators.is_time,
    "cause": validators.one_of(*get_args(Cause.__value__)),
    "run_id": validators.optional(_ID),
    "name": validators.optional(validators.matching(NAME)),
    "snapshot": validators.optional(validators.is_digest),
    "data": validators.is_object,
}
_WHOLE = validators.optional(validators.integer())
_SMALL = validators.optional(validators.integer(-(1 << 31), (1 << 31) - 1))
_COUNT = validators.integer()
_WORDS = validators.text(MAX_ENFORCED)
_DESTINATION = validators.object_of(
    {
        "host": _WORDS,
        "port": _COUNT,
        "address": validators.optional(_WORDS),
        "allowed": validators.is_boolean,
        "reason": validators.optional(_WORDS),
        **dict.fromkeys(("connections", "sent", "received"), _COUNT),
    },
    {"secrets": validators.list_of(_WORDS)},
)
_EGRESS = validators.object_of(
    {"destinations": validators.list_of(_DESTINATION), "more": _COUNT},
    dict.fromkeys(("made", "refused", "sent", "received", "bytes"), _COUNT),
)
"""Of runs that noted it, see network/destinations.py."""

_MAX_INVOCATION = 6 * MAX_RECORDED_BYTES + (64 << 10)
"""Characters of a run's `invocation` as JSON, in which a character may be escaped, and each word has its quotes."""

_WORD_LIST = validators.list_of(validators.text(MAX_RECORDED_BYTES))
_INVOCATION = validators.object_of(
    {},
    {
        "command": lambda value: _WORD_LIST(value if isinstance(value, list) else [value]),
        "args": _WORD_LIST,
        "truncated": validators.is_boolean,
    },
)

RUN: dict[str, validators.Check] = {
    "id": _ID,
    "status": validators.one_of(*(set(get_args(Status.__value__)) - {"running"})),
    "started_at": validators.is_time,
    "ended_at": validators.optional(validators.is_time),
    "exit_code": _SMALL,
    "duration_us": _WHOLE,
    "stdout_bytes": validators.integer(),
    "stderr_bytes": validators.integer(),
    "stdout_truncated": validators.is_boolean,
    "stderr_truncated": validators.is_boolean,
    "committed": validators.is_boolean,
    "reason": validators.optional(validators.text(64 << 10)),
    "version": validators.optional(validators.integer(1)),
    "peak_memory_bytes": _WHOLE,
    "cpu_us": _WHOLE,
    "reaped": _SMALL,
    "enforced": validators.is_object,
    "egress": lambda value: value == {} or _EGRESS(value),
    "artifacts": valid_artifacts,
    "versions_dropped": validators.integer(0, (1 << 31) - 1),
    "setup_error": validators.optional(validators.text(64 << 10)),
    "code": validators.optional(validators.text(MAX_RECORDED_BYTES)),
    "invocation": lambda value: _INVOCATION(value) and len(jsontext.compact(value)) <= _MAX_INVOCATION,
    "stdout": validators.optional(validators.is_digest),
    "stderr": validators.optional(validators.is_digest),
}

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
        fields = _session(session, lock)
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
    fields = asdict(record)
    for name in ("key", "session_key", "pieces"):  # the order of the pieces isn't in a capsule either
        del fields[name]
    fields["stdout"], fields["stderr"] = digests or (None, None)
    return jsontext.compact(fields).encode()


def readme(session_id: str) -> bytes:
    """The content of README.txt."""
    text = _README.format(id=session_id, at=timestamp(now()), version=__version__, format=FORMAT)
    return text.encode()


def sums(document: str, readme: bytes) -> bytes:
    """The content of SHA256SUMS. `document` is the digest of capsule.json, `readme` the content of README.txt."""
    return f"{document}  {DOCUMENT}\n{hashlib.sha256(readme).hexdigest()}  {README}\n".encode()


def _session(session: Session, lock: JsonObject | None) -> dict[str, Any]:
    """The fields of a session in capsule.json."""
    stored = session.stored
    return {
        "id": session.id,
        "language": session.language,
        "persistent": session.persistent,
        "metadata": session.metadata,
        "allowInternetAccess": session.allow_internet,
        "allowPublicAccess": session.allow_public,
        "default_timeout": session.default_timeout,
        "ttl": session.ttl,
        "limits": session.limits,
        "isolation": session.isolation,
        "egress": session.egress,
        "service": session.service,
        "setup": requirements.setup_view(session.setup),
        "lock": lock,
        "storage": session.storage,
        "record_code": session.record_code,
        "code": stored and {"code": stored.code, "description": stored.description, "updated_at": stored.updated_at},
        "version": session.version,
        "created_at": session.created_at,
        "updated_at": session.updated_at,
        "last_run_at": session.last_run_at,
    }

"""The format of capsules: their files, and how capsule.json is written. manifest.py has its values.

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
from typing import IO, Any

from era import __version__
from era.core import jsontext
from era.core.capsules.manifest import FORMAT, PLAIN_FIELDS, RECORD_FIELDS, RunValues, SessionValues
from era.core.models import JsonObject, RunRecord, Session, VersionContent, now, timestamp
from era.core.setup import requirements

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


def _session(session: Session, lock: JsonObject | None) -> dict[str, Any]:
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

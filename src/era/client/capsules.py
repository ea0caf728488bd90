"""`era export` and `era import`: a session as one file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from era.client.command import SESSION, Command, argument
from era.client.failure import Failure
from era.client.output import print_json, progress
from era.client.servers import connect


def export(named: Any) -> None:
    target = named.output or f"{named.session}.era.tar"
    with connect(named, timeout=600.0) as era, progress(f"export {named.session}") as advance:
        session = era.sessions.named(named.session)
        if target == "-":
            _to_stdout(session.capsule(current=named.current), advance)
            return
        size = session.export(target, current=named.current, progress=advance)
    if named.json:
        print_json({"file": target, "size": size})
    else:
        print(f"{target}  {size} bytes")


def _to_stdout(pieces: Any, advance: Any) -> None:
    try:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
            advance(len(piece))
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes its buffer when it ends, and would print a second error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Failure(f"standard output can't be written: {error.strerror}") from None


def import_(named: Any) -> None:
    source = None if named.file == "-" else Path(named.file)
    size = source.stat().st_size if source is not None and source.exists() else None
    with connect(named, timeout=600.0) as era, progress(f"import {named.file}", size) as advance:
        session = era.sessions.load(source or sys.stdin.buffer, named.id, public=named.public, progress=advance)
        if named.json:
            print_json(session.info().answer)
        else:
            print(session.id)


COMMANDS = {
    "export": Command(
        "Write SESSION, with all that belongs to it, into one file.",
        export,
        [
            "era export counter",
            "era export counter --current --output counter.tar",
            "era export counter --output - | ssh elsewhere era import -",
        ],
        [
            SESSION,
            argument("-o", "--output", metavar="FILE", help="- for standard output; default: SESSION.era.tar"),
            argument("--current", action="store_true", help="leave out older versions and the records of runs"),
        ],
    ),
    "import": Command(
        "Create the session that a file from `era export` holds, and print its id.",
        import_,
        [
            "era import counter.era.tar",
            "era import counter.era.tar --id counter-again",
            "era import counter.era.tar --public",
        ],
        [
            argument("file", metavar="FILE", help="- for standard input"),
            argument("--id", help="the new session's id; default: the one it had"),
            argument("--public", action="store_true", help="leave it open to anybody by its public URL if it was so"),
        ],
    ),
}

"""`era files`: a session's files, one by one."""

from __future__ import annotations

import os
import sys
from typing import Any

from era.client.command import SESSION, Command, Group, argument, calls, does, lists, on_session
from era.client.failure import Failure
from era.client.output import print_json, progress
from era.client.servers import connect
from era.sdk.answers import FileInfo
from era.sdk.sync.files import Files
from era.sdk.sync.sessions import Session

_PATH = argument("path", metavar="PATH")
_VERSION = argument("--version", type=int, metavar="N", help="as it was in this version")


def _files(session: Session, version: int | None) -> Files:
    return session.files if version is None else session.versions.files(version)


def _listed(file: FileInfo) -> str:
    return f"{file.path} -> {file.link}" if file.link else file.path + "/" * (file.type == "dir")


def _show(named: Any) -> None:
    sys.stdout.flush()
    with connect(named) as era:
        for piece in _files(era.sessions.named(named.session), named.version).pieces(named.path):
            sys.stdout.buffer.write(piece)


def _get(named: Any) -> None:
    if named.target == "-":
        _show(named)
        return
    name = os.path.basename(named.path.rstrip("/"))
    target = named.target or name
    if named.target and os.path.isdir(target):
        target = os.path.join(target, name)
    with connect(named) as era, progress(named.path) as advance:
        _files(era.sessions.named(named.session), named.version).download(named.path, target, progress=advance)
    if named.json:
        print_json({"path": named.path, "file": target, "size": os.stat(target).st_size})


def _put(session: Session, named: Any) -> tuple[Files, str]:
    if named.source == "-" and named.path is None:
        raise Failure("What is standard input to be called?\n     era files put SESSION - PATH")
    path = named.path or os.path.basename(named.source)
    if named.source == "-":
        session.files.write(path, sys.stdin.buffer)
    else:
        from pathlib import Path

        with progress(path, _size(named.source)) as advance:
            session.files.write(path, Path(named.source), progress=advance)
    return session.files, path


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size
    except OSError:
        return None  # the SDK says what is wrong


def _move(session: Session, named: Any) -> None:
    session.files.move(named.path, named.to, replace=named.replace)


def _delete(session: Session, named: Any) -> None:
    for path in named.paths:
        session.files.delete(path, recursive=named.recursive)
        if named.json:
            print_json({"success": True, "path": path})


def _link(session: Session, named: Any) -> dict[str, Any]:
    url = session.files.link(named.path, method="PUT" if named.put else "GET", expires_in=named.expires)
    return {"url": url, "path": named.path}


COMMANDS = {
    "files": Group(
        "List, read, write, move and delete a session's files. `era push` and `era pull` copy many.",
        {
            "list": Command(
                "List a session's files, or those whose paths begin with PREFIX.",
                lists(
                    on_session(lambda session, named: _files(session, named.version).list(named.prefix)),
                    "files",
                    {"mode": "mode", "bytes": "size", "modified": "modified_at", "path": _listed},
                ),
                ["era files list app src/"],
                [SESSION, argument("prefix", metavar="PREFIX", nargs="?", default=""), _VERSION],
                summary="list files",
            ),
            "show": Command(
                "Print a file's content.",
                _show,
                ["era files show app notes.txt", "era files show app a.txt --version 3"],
                [SESSION, _PATH, _VERSION],
                summary="print a file",
                has_json=False,
            ),
            "get": Command(
                "Fetch a file into a local one.",
                _get,
                ["era files get app out/report.pdf", "era files get app out/report.pdf ~/reports"],
                [
                    SESSION,
                    _PATH,
                    argument(
                        "target",
                        metavar="FILE",
                        nargs="?",
                        help="or the directory to put it into; default: PATH's last name; - for standard output",
                    ),
                    _VERSION,
                ],
                summary="fetch a file",
            ),
            "put": Command(
                "Write a local file into the session.",
                calls(on_session(_put), json=lambda written: written[0].stat(written[1]).answer),
                ["era files put app data.csv", "date | era files put app - when.txt"],
                [
                    SESSION,
                    argument("source", metavar="FILE", help="- for standard input"),
                    argument("path", metavar="PATH", nargs="?", help="default: FILE's name"),
                ],
                summary="write a file",
            ),
            "move": Command(
                "Move a file, a link or a directory.",
                does(on_session(_move), **{"from": "path", "to": "to"}),
                ["era files move app a.txt old/a.txt"],
                [
                    SESSION,
                    _PATH,
                    argument("to", metavar="TO"),
                    argument("--replace", action="store_true", help="replace what is there"),
                ],
                summary="move a file or directory",
            ),
            "mkdir": Command(
                "Make a directory, and those on the way to it.",
                does(on_session(lambda session, named: session.files.mkdir(named.path)), path="path"),
                ["era files mkdir app data/raw"],
                [SESSION, _PATH],
                summary="make a directory",
            ),
            "delete": Command(
                "Delete files.",
                calls(on_session(_delete)),
                ["era files delete app a.txt", "era files delete app build --recursive"],
                [
                    SESSION,
                    argument("paths", metavar="PATH", nargs="+"),
                    argument("-r", "--recursive", action="store_true", help="directories, with all that is in them"),
                ],
            ),
            "link": Command(
                "Print a URL by which one file can be read, or written, without a key.",
                calls(on_session(_link), lambda found: print(found["url"])),
                ["era files link app report.pdf --expires 600"],
                [
                    SESSION,
                    _PATH,
                    argument("--put", action="store_true", help="to write it"),
                    argument("--expires", type=int, metavar="SECONDS", help="(3600)"),
                ],
                summary="print a URL that needs no key",
            ),
        },
    )
}

"""`era files`, `push`, `pull`, `export`, `import`: a session's files: one by one, a directory, an archive."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from era.client.command import SESSION, Command, Group, argument, calls, does, lists, on_session
from era.client.output import Failure, notice, print_json, progress
from era.client.servers import connect
from era.sdk.answers import FileInfo
from era.sdk.directories import Synced
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


def push(named: Any) -> None:
    with connect(named) as era, progress(f"push {named.session}") as advance:
        files = era.sessions.named(named.session).files
        done = files.push(named.directory, delete=named.delete, progress=advance)
    _print_synced(named, done, "pushed")
    if done.left_out:
        notice(f"{done.left_out} files of the session's git or with names that aren't UTF-8 were not deleted")


def pull(named: Any) -> None:
    with connect(named) as era, progress(f"pull {named.session}") as advance:
        files = era.sessions.named(named.session).files
        done = files.pull(named.directory, delete=named.delete, progress=advance)
    _print_synced(named, done, "pulled")
    if done.left_out:
        notice(f"{done.left_out} links, unreadable files, files of git's or names that aren't UTF-8 were not pulled")


def _print_synced(named: Any, done: Synced, word: str) -> None:
    if named.json:
        print_json(done._asdict())
    else:
        print(f"{len(done.copied)} files {word}, {len(done.deleted)} deleted, {done.total} in all")


_ARGUMENTS = (argument("directory", metavar="DIRECTORY"), argument("-s", "--session", required=True))


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
    ),
    "push": Command(
        "Copy the files of DIRECTORY into a session.\n\nOnly those that differ there or are missing are sent, and "
        "they arrive all or none. What .gitignore files\nleave out stays here, and so do `.git` and links.",
        push,
        ["era push . --session app", "era push src --session app --delete"],
        [
            argument(
                "--delete",
                action="store_true",
                help="delete what the session has and DIRECTORY hasn't, but for the session's own .git",
            ),
            *_ARGUMENTS,
        ],
    ),
    "pull": Command(
        "Copy a session's files into DIRECTORY, which is made if it doesn't exist.\n\nOnly those that differ here "
        "or are missing are fetched. Nothing outside of DIRECTORY is ever written,\nwhatever the session's files "
        "are called. Links and .git are not pulled.",
        pull,
        ["era pull results --session app", "era pull . --session app --delete"],
        [
            argument(
                "--delete",
                action="store_true",
                help="delete what DIRECTORY has and the session hasn't, but for what its .gitignore files leave out",
            ),
            *_ARGUMENTS,
        ],
    ),
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

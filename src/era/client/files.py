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


def _read(named: Any) -> None:
    with connect(named) as era:
        files, target = _files(era.sessions.named(named.session), named.version), named.output
        if target == "-":
            sys.stdout.flush()
            for piece in files.pieces(named.path):
                sys.stdout.buffer.write(piece)
            return
        if os.path.isdir(target):
            target = os.path.join(target, os.path.basename(named.path.rstrip("/")))
        with progress(named.path) as advance:
            files.download(named.path, target, progress=advance)
    if named.json:
        print_json({"path": named.path, "file": target, "size": os.stat(target).st_size})


def _write(session: Session, named: Any) -> tuple[Files, str]:
    if named.file == "-":
        if sys.stdin.isatty():
            notice("the file's content is what you type, until Ctrl-D")
        session.files.write(named.path, sys.stdin.buffer)
    else:
        with progress(named.path, _size(named.file)) as advance:
            session.files.write(named.path, Path(named.file), progress=advance)
    return session.files, named.path


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size
    except OSError:
        return None  # the SDK says what is wrong


def _move(session: Session, named: Any) -> None:
    session.files.move(named.path, named.to, replace=named.replace)


def _remove(session: Session, named: Any) -> None:
    for path in named.paths:
        session.files.remove(path, recursive=named.recursive)
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


_ARGUMENTS = (SESSION, argument("directory", metavar="DIRECTORY"))


def export(named: Any) -> None:
    target = named.output or f"{named.session}.era.tar"
    with connect(named, timeout=600.0) as era, progress(f"export {named.session}") as advance:
        session = era.sessions.named(named.session)
        if target == "-":
            _to_stdout(session.export_pieces(current=named.current), advance)
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
        session = era.sessions.import_(source or sys.stdin.buffer, named.id, public=named.public, progress=advance)
        if named.json:
            print_json(session.info().answer)
        else:
            print(session.id)


COMMANDS = {
    "files": Group(
        "List, read, write, move and remove a session's files. `era push` and `era pull` copy many.",
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
            "read": Command(
                "Print a file of a session, or write it into a local file.",
                _read,
                ["era files read app notes.txt", "era files read app out/report.pdf -o ~/reports"],
                [
                    SESSION,
                    _PATH,
                    argument(
                        "-o",
                        "--output",
                        metavar="FILE",
                        default="-",
                        help="the local file, or the directory to put it into; default: standard output",
                    ),
                    _VERSION,
                ],
                summary="print or fetch a file",
            ),
            "write": Command(
                "Write a local file, or standard input, into a session.",
                calls(on_session(_write), json=lambda written: written[0].stat(written[1]).answer),
                ["era files write app data.csv data.csv", "date | era files write app when.txt"],
                [
                    SESSION,
                    _PATH,
                    argument("file", metavar="FILE", nargs="?", default="-", help="default: standard input"),
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
            "rm": Command(
                "Remove files.",
                calls(on_session(_remove)),
                ["era files rm app a.txt", "era files rm app build --recursive"],
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
        ["era push app .", "era push --delete app src"],
        [
            *_ARGUMENTS,
            argument(
                "--delete",
                action="store_true",
                help="delete what the session has and DIRECTORY hasn't, but for the session's own .git",
            ),
        ],
    ),
    "pull": Command(
        "Copy a session's files into DIRECTORY, which is made if it doesn't exist.\n\nOnly those that differ here "
        "or are missing are fetched. Nothing outside of DIRECTORY is ever written,\nwhatever the session's files "
        "are called. Links and .git are not pulled.",
        pull,
        ["era pull app results", "era pull --delete app ."],
        [
            *_ARGUMENTS,
            argument(
                "--delete",
                action="store_true",
                help="delete what DIRECTORY has and the session hasn't, but for what its .gitignore files leave out",
            ),
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

"""`era files`: a session's files, one by one."""

from __future__ import annotations

import os
import sys
from typing import Any

from era.client.failure import Failure
from era.client.grammar import Parser
from era.client.output import print_json, progress, table
from era.client.servers import connect
from era.sdk.sync.files import Files
from era.sdk.sync.sessions import Session


def add(parser: Parser) -> None:
    command = parser.group("List, read, write, move and delete a session's files. `era push` and `era pull` copy many.")

    each = command("list", "list files")
    each.describe(
        list_, "List a session's files, or those whose paths begin with PREFIX.", ("era files list app src/",)
    )
    _session(each)
    each.add_argument("prefix", metavar="PREFIX", nargs="?", default="")
    _version(each)

    each = command("show", "print a file")
    each.describe(
        show,
        "Print a file's content.",
        ("era files show app notes.txt", "era files show app a.txt --version 3"),
        json=False,
    )
    _session(each)
    each.add_argument("path", metavar="PATH")
    _version(each)

    each = command("get", "fetch a file")
    each.describe(
        get,
        "Fetch a file into a local one.",
        ("era files get app out/report.pdf", "era files get app out/report.pdf ~/reports"),
    )
    _session(each)
    each.add_argument("path", metavar="PATH")
    each.add_argument(
        "target",
        metavar="FILE",
        nargs="?",
        help="or the directory to put it into; default: PATH's last name; - for standard output",
    )
    _version(each)

    each = command("put", "write a file")
    each.describe(
        put,
        "Write a local file into the session.",
        ("era files put app data.csv", "date | era files put app - when.txt"),
    )
    _session(each)
    each.add_argument("source", metavar="FILE", help="- for standard input")
    each.add_argument("path", metavar="PATH", nargs="?", help="default: FILE's name")

    each = command("move", "move a file or directory")
    each.describe(move, "Move a file, a link or a directory.", ("era files move app a.txt old/a.txt",))
    _session(each)
    each.add_argument("path", metavar="PATH")
    each.add_argument("to", metavar="TO")
    each.add_argument("--replace", action="store_true", help="replace what is there")

    each = command("mkdir", "make a directory")
    each.describe(mkdir, "Make a directory, and those on the way to it.", ("era files mkdir app data/raw",))
    _session(each)
    each.add_argument("path", metavar="PATH")

    each = command("delete", "delete files")
    each.describe(delete, "Delete files.", ("era files delete app a.txt", "era files delete app build --recursive"))
    _session(each)
    each.add_argument("paths", metavar="PATH", nargs="+")
    each.add_argument("-r", "--recursive", action="store_true", help="directories, with all that is in them")

    each = command("link", "print a URL that needs no key")
    each.describe(
        link,
        "Print a URL by which one file can be read, or written, without a key.",
        ("era files link app report.pdf --expires 600",),
    )
    _session(each)
    each.add_argument("path", metavar="PATH")
    each.add_argument("--put", action="store_true", help="to write it")
    each.add_argument("--expires", type=int, metavar="SECONDS", help="(3600)")


def _session(parser: Parser) -> None:
    parser.add_argument("session", metavar="SESSION")


def _version(parser: Parser) -> None:
    parser.add_argument("--version", type=int, metavar="N", help="as it was in this version")


def _files(session: Session, version: int | None) -> Files:
    return session.files if version is None else session.versions.files(version)


def list_(named: Any) -> None:
    with connect(named) as era:
        found = _files(era.sessions.named(named.session), named.version).list(named.prefix)
    if named.json:
        print_json({"files": [file.answer for file in found], "count": len(found)})
        return
    table(
        ("mode", "bytes", "modified", "path"),
        [
            (f.mode, f.size, f.modified_at, f"{f.path} -> {f.link}" if f.link else f.path + "/" * (f.type == "dir"))
            for f in found
        ],
    )


def show(named: Any) -> None:
    sys.stdout.flush()
    with connect(named) as era:
        for piece in _files(era.sessions.named(named.session), named.version).pieces(named.path):
            sys.stdout.buffer.write(piece)


def get(named: Any) -> None:
    if named.target == "-":
        show(named)
        return
    name = os.path.basename(named.path.rstrip("/"))
    target = named.target or name
    if named.target and os.path.isdir(target):
        target = os.path.join(target, name)
    with connect(named) as era, progress(named.path) as advance:
        _files(era.sessions.named(named.session), named.version).download(named.path, target, progress=advance)
    if named.json:
        print_json({"path": named.path, "file": target, "size": os.stat(target).st_size})


def put(named: Any) -> None:
    if named.source == "-" and named.path is None:
        raise Failure("What is standard input to be called?\n     era files put SESSION - PATH")
    path = named.path or os.path.basename(named.source)
    with connect(named) as era:
        files = era.sessions.named(named.session).files
        if named.source == "-":
            files.write(path, sys.stdin.buffer)
        else:
            from pathlib import Path

            with progress(path, _size(named.source)) as advance:
                files.write(path, Path(named.source), progress=advance)
        if named.json:
            print_json(files.stat(path).answer)


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size
    except OSError:
        return None  # the SDK says what is wrong


def move(named: Any) -> None:
    with connect(named) as era:
        era.sessions.named(named.session).files.move(named.path, named.to, replace=named.replace)
    if named.json:
        print_json({"success": True, "from": named.path, "to": named.to})


def mkdir(named: Any) -> None:
    with connect(named) as era:
        era.sessions.named(named.session).files.mkdir(named.path)
    if named.json:
        print_json({"success": True, "path": named.path})


def delete(named: Any) -> None:
    with connect(named) as era:
        for path in named.paths:
            era.sessions.named(named.session).files.delete(path, recursive=named.recursive)
            if named.json:
                print_json({"success": True, "path": path})


def link(named: Any) -> None:
    with connect(named) as era:
        files = era.sessions.named(named.session).files
        url = files.link(named.path, method="PUT" if named.put else "GET", expires_in=named.expires)
    if named.json:
        print_json({"url": url, "path": named.path})
    else:
        print(url)

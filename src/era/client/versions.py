"""`era versions`: a session's past."""

from __future__ import annotations

from json import dumps
from typing import Any

from era.client.grammar import Parser
from era.client.output import print_json, table
from era.client.servers import connect


def add(parser: Parser) -> None:
    command = parser.group("Look at a session's past, and go back to it.")
    for name, call, summary, example in (
        ("list", list_, "list versions, newest first", "era versions list app"),
        ("show", show, "show a version with its data", "era versions show app 3"),
        ("diff", diff, "show what a version changed", "era versions diff app 3"),
        ("name", name_, "name a version, so that it is kept", "era versions name app 3 before-the-move"),
        ("unname", unname, "take a version's name away", "era versions unname app 3"),
        ("rollback", rollback, "make a new version with the content of an old one", "era versions rollback app 3"),
    ):
        each = command(name, summary)
        each.describe(call, f"{summary}.", (example,))
        each.add_argument("session", metavar="SESSION")
        if name == "list":
            each.add_argument("-n", "--limit", type=int, metavar="N", help="how many at most")
        else:
            each.add_argument("version", metavar="VERSION", type=int)
        if name == "rollback":
            each.add_argument("--stop", action="store_true", help="end the session's processes and contexts first")
        if name == "name":
            each.add_argument("name", metavar="NAME")


def list_(named: Any) -> None:
    with connect(named) as era:
        found = era.sessions.named(named.session).versions.list(named.limit)
    if named.json:
        print_json({"versions": [version.answer for version in found], "count": len(found)})
        return
    names = ("version", "created", "cause", "files", "bytes", "run", "name")
    table(
        names, [(v.version, v.created_at, v.cause, v.file_count, v.total_size_bytes, v.run_id, v.name) for v in found]
    )


def show(named: Any) -> None:
    with connect(named) as era:
        print_json(era.sessions.named(named.session).versions.get(named.version).answer)


def diff(named: Any) -> None:
    with connect(named) as era:
        found = era.sessions.named(named.session).versions.diff(named.version)
    if named.json:
        print_json(found.answer)
        return
    rows: list[tuple[object, ...]] = []
    for change in found.data:
        old, new = (dumps(change[each], ensure_ascii=False) if each in change else None for each in ("old", "new"))
        rows.append((change["op"], f"data{change['path']}", old, new))
    for kind in ("added", "changed", "removed"):
        rows += [(kind, file["path"], file.get("old_size"), file["size"]) for file in found.files[kind]]
    table(("change", "what", "old", "new"), rows)


def name_(named: Any) -> None:
    with connect(named) as era:
        version = era.sessions.named(named.session).versions.name(named.version, named.name)
    if named.json:
        print_json(version.answer)


def unname(named: Any) -> None:
    with connect(named) as era:
        era.sessions.named(named.session).versions.unname(named.version)
    if named.json:
        print_json({"success": True, "version": named.version})


def rollback(named: Any) -> None:
    with connect(named) as era:
        session = era.sessions.named(named.session)
        session.rollback(named.version, stop=named.stop)
        info = session.info()
    if named.json:
        print_json(info.answer)
    else:
        print(f"version {info.version}")

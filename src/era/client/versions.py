"""`era versions`: a session's past."""

from __future__ import annotations

from json import dumps
from typing import TYPE_CHECKING, Any

from era.client.command import LIMIT, SESSION, Command, Group, argument, calls, does, lists, on_session
from era.client.output import print_json, table

if TYPE_CHECKING:
    from era.sdk.answers import Diff, SessionInfo
    from era.sdk.sync.sessions import Session

_VERSION = (SESSION, argument("version", metavar="VERSION", type=int))


def _show_diff(found: Diff) -> None:
    rows: list[tuple[object, ...]] = []
    for change in found.data:
        old, new = (dumps(change[each], ensure_ascii=False) if each in change else None for each in ("old", "new"))
        rows.append((change["op"], f"data{change['path']}", old, new))
    for kind in ("added", "changed", "removed"):
        rows += [(kind, file["path"], file.get("old_size"), file["size"]) for file in found.files[kind]]
    table(("change", "what", "old", "new"), rows)


def _roll_back(session: Session, named: Any) -> SessionInfo:
    session.rollback(named.version, stop=named.stop)
    return session.info()


COMMANDS = {
    "versions": Group(
        "Look at a session's past, and go back to it.",
        {
            "list": Command(
                "List versions, newest first.",
                lists(
                    on_session(lambda session, named: session.versions.list(named.limit)),
                    "versions",
                    {
                        "version": "version",
                        "created": "created_at",
                        "cause": "cause",
                        "files": "file_count",
                        "bytes": "total_size_bytes",
                        "run": "run_id",
                        "name": "name",
                    },
                ),
                ["era versions list app"],
                [SESSION, LIMIT],
            ),
            "show": Command(
                "Show a version with its data.",
                calls(
                    on_session(lambda session, named: session.versions.get(named.version)),
                    lambda version: print_json(version.answer),
                ),
                ["era versions show app 3"],
                _VERSION,
            ),
            "diff": Command(
                "Show what a version changed.",
                calls(on_session(lambda session, named: session.versions.diff(named.version)), _show_diff),
                ["era versions diff app 3"],
                _VERSION,
            ),
            "name": Command(
                "Name a version, so that it is kept.",
                calls(on_session(lambda session, named: session.versions.name(named.version, named.name))),
                ["era versions name app 3 before-the-move"],
                [*_VERSION, argument("name", metavar="NAME")],
            ),
            "unname": Command(
                "Take a version's name away.",
                does(on_session(lambda session, named: session.versions.unname(named.version)), version="version"),
                ["era versions unname app 3"],
                _VERSION,
            ),
            "rollback": Command(
                "Make a new version with the content of an old one.",
                calls(on_session(_roll_back), lambda info: print(f"version {info.version}")),
                ["era versions rollback app 3"],
                [
                    *_VERSION,
                    argument("--stop", action="store_true", help="end the session's processes and contexts first"),
                ],
            ),
        },
    )
}

"""`era sessions`, `versions`, `setup`: sessions, their settings, data and code, their past and their packages."""

from __future__ import annotations

import sys
from json import dumps
from typing import Any

from era.client.command import (
    LIMIT,
    SESSION,
    Command,
    Group,
    argument,
    calls,
    does,
    json_object,
    json_or_text,
    labels,
    lists,
    on_session,
    seconds,
    text_of,
)
from era.client.output import Failure, notice, pairs, print_json, table
from era.client.servers import connect
from era.sdk.answers import Diff, SessionInfo, StoredCode
from era.sdk.events import SetupDone, SetupLine
from era.sdk.sync.client import Era
from era.sdk.sync.sessions import Session

_SETTINGS = (
    argument("--data", metavar="JSON", help="the state: an object"),
    argument("-m", "--metadata", action="append", default=[], metavar="NAME=VALUE", help="a label; may be repeated"),
    argument("--timeout", type=seconds, metavar="SECONDS", help="of runs that name none"),
    argument("--ttl", type=int, metavar="SECONDS", help="without a call after which it expires"),
    argument("--internet", choices=("on", "off"), help="whether programs reach the internet"),
    argument(
        "--allow", action="append", default=[], metavar="HOST", help="the only hosts that they reach; may be repeated"
    ),
    argument("--public", choices=("on", "off"), help="whether anybody may call its public URL"),
    argument(
        "--record-code", choices=("on", "off"), help="whether records of its runs keep the code or command that ran"
    ),
)
_SHOWN = (
    "id",
    "language",
    "status",
    "version",
    "created_at",
    "last_run_at",
    "file_count",
    "total_size_bytes",
    "persistent",
    "default_timeout",
    "ttl",
    "expires_at",
    "allowInternetAccess",
    "allowPublicAccess",
    "isolation",
    "storage",
    "record_code",
    "setup_status",
)


def _options(named: Any) -> dict[str, Any]:
    """What the settings say, as arguments of the SDK."""
    options: dict[str, Any] = {}
    if (data := json_object(named.data, "--data")) is not None:
        options["data"] = data
    if named.metadata:
        options["metadata"] = labels(named.metadata)
    if named.timeout is not None:
        options["default_timeout"] = named.timeout
    if named.ttl is not None:
        options["ttl"] = named.ttl
    if named.internet:
        options["allow_internet"] = named.internet == "on"
    if named.public:
        options["allow_public"] = named.public == "on"
    if named.record_code:
        options["record_code"] = named.record_code == "on"
    if named.allow:
        options["egress"] = named.allow
    return options


def _create(era: Era, named: Any) -> Session:
    options = _options(named)
    if (setup := json_object(named.setup, "--setup")) is not None:
        options["setup"] = setup
    return era.session(named.language, named.session, **options)


def _update(session: Session, named: Any) -> SessionInfo:
    options = _options(named)
    if not options:
        raise Failure("Nothing to change is named.\n     era sessions update --help lists the settings.")
    return session.update(**options)


def _delete(era: Era, named: Any) -> None:
    for session in named.sessions:
        era.sessions.delete(session, purge=named.purge)
        if named.json:
            print_json({"success": True, "id": session})


def _data(named: Any) -> None:
    if named.delete and (named.key is None or named.value is not None):
        raise Failure("--delete wants a key, and no value.")
    with connect(named) as era:
        found = era.sessions.named(named.session).data
        if named.delete or (named.key is not None and named.value is None):
            if named.key not in found:
                raise Failure(f"'{named.key}' is not in the data of '{named.session}'.")
            if named.delete:
                found.delete(named.key)
            else:
                print_json(found[named.key])
        elif named.key is None:
            print_json(found.all())
        else:
            found.set(named.key, json_or_text(named.value))


def _code(session: Session, named: Any) -> StoredCode | None:
    if named.file is None:
        return session.code()
    session.set_code(text_of(named.file), named.description)
    return session.code() if named.json else None


def _run(named: Any) -> int:
    from era.client.runs import follow

    with connect(named) as era:
        session = era.sessions.named(named.session)
        return follow(session, session.stream, as_json=named.json)


def _info_of(session: Session) -> dict[str, Any]:
    return session.info().answer


def _show_id(session: Session) -> None:
    print(session.id)


def _show(info: SessionInfo) -> None:
    values: dict[str, object] = {name: info.answer[name] for name in _SHOWN if info.answer.get(name) is not None}
    pairs(values | {name: info.answer[name] for name in ("metadata", "data") if info.answer[name]})


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


def _url(session: Session, named: Any) -> dict[str, Any]:
    url = session.proxy_url(named.port) if named.proxy else session.url(named.port)
    return {"url": url, "port": named.port}


def setup(named: Any) -> int:
    with connect(named) as era:
        session = era.sessions.named(named.session)
        if named.packages:
            found = session.packages()
            if named.json:
                print_json(found)
            else:
                kinds = ("pip", "npm", "go")
                table(("kind", "name", "version"), [(k, p["name"], p["version"]) for k in kinds for p in found[k]])
            return 0
        if named.again:
            session.set_up_again()
        for event in session.setup():
            if isinstance(event, SetupLine) and not named.json:
                print(event.text, file=sys.stderr if event.stream == "stderr" else sys.stdout, flush=True)
            elif isinstance(event, SetupDone):
                if named.json:
                    fields = dict(event.answer)
                    del fields["type"]
                    print_json(fields)
                elif event.setup_status != "completed":
                    notice(f"setup {event.setup_status}: {event.setup_result.get('error')}")
                return 0 if event.setup_status == "completed" else 1
    return 1


COMMANDS = {
    "sessions": Group(
        "Create, list, show, change, copy and delete sessions.",
        {
            "list": Command(
                "List sessions, newest first.",
                lists(
                    lambda era, named: era.sessions.infos(
                        named.limit, named.language, named.status, labels(named.metadata)
                    ),
                    "sessions",
                    {
                        "id": "id",
                        "language": "language",
                        "status": "status",
                        "files": "file_count",
                        "bytes": "total_size_bytes",
                        "version": "version",
                        "last run": "last_run_at",
                        "created": "created_at",
                    },
                ),
                ["era sessions list", "era sessions list --metadata team=blue"],
                [
                    LIMIT,
                    argument("-l", "--language"),
                    argument("--status", help="idle, running; expired or deleted lists what can be restored"),
                    argument(
                        "-m",
                        "--metadata",
                        action="append",
                        default=[],
                        metavar="NAME=VALUE",
                        help="only with this label",
                    ),
                ],
            ),
            "create": Command(
                "Make a session and print its id.",
                calls(_create, _show_id, json=_info_of),
                [
                    "era sessions create python",
                    "era sessions create node shop --data '{\"n\": 0}' --metadata team=blue",
                ],
                [
                    argument("language", metavar="LANGUAGE"),
                    argument("session", metavar="ID", nargs="?", help="default: one that the server makes up"),
                    argument("--setup", metavar="JSON", help='packages, as {"pip": ["requests"]}'),
                    *_SETTINGS,
                ],
                summary="make a session",
            ),
            "update": Command(
                "Change a session's settings, and print it.",
                calls(on_session(_update), _show),
                ["era sessions update shop --timeout 60"],
                [SESSION, *_SETTINGS],
                summary="change a session's settings",
            ),
            "get": Command(
                "Show a session.",
                calls(on_session(lambda session, _: session.info()), _show),
                ["era sessions get shop", "era sessions get shop --json"],
                [SESSION],
            ),
            "delete": Command(
                "Delete sessions. For a day they can be restored.",
                calls(_delete),
                ["era sessions delete shop old-shop"],
                [
                    argument("sessions", metavar="SESSION", nargs="+"),
                    argument("--purge", action="store_true", help="for good"),
                ],
                summary="delete sessions",
            ),
            "restore": Command(
                "Bring back a session that was deleted or expired.",
                calls(lambda era, named: era.sessions.restore(named.session), json=_info_of),
                ["era sessions restore shop"],
                [SESSION],
            ),
            "copy": Command(
                "Make a session of another one and print its id.",
                calls(
                    on_session(lambda session, named: session.duplicate(named.id, from_version=named.from_version)),
                    _show_id,
                    json=_info_of,
                ),
                ["era sessions copy shop --id shop-2"],
                [
                    SESSION,
                    argument("--id", help="the new session's id"),
                    argument("--from-version", type=int, metavar="N", help="as it was in this version"),
                ],
                summary="make a session of another one",
            ),
            "data": Command(
                "Show a session's data or a key of it; with a VALUE, set the key. VALUE is JSON, or text where it is "
                "none.",
                _data,
                ["era sessions data shop", "era sessions data shop count", "era sessions data shop count 5"],
                [
                    SESSION,
                    argument("key", metavar="KEY", nargs="?"),
                    argument("value", metavar="VALUE", nargs="?"),
                    argument("--delete", action="store_true", help="remove the key"),
                ],
                summary="show or set a session's data",
            ),
            "code": Command(
                "Show a session's stored code, or store a FILE as such.",
                calls(
                    on_session(_code), lambda stored: print(stored.code, end="" if stored.code.endswith("\n") else "\n")
                ),
                ["era sessions code shop main.py"],
                [
                    SESSION,
                    argument("file", metavar="FILE", nargs="?", help="- for standard input"),
                    argument("--description"),
                ],
                summary="show or store the code that runs where none is sent",
            ),
            "run": Command(
                "Run a session's stored code and leave with its exit code.",
                _run,
                ["era sessions run shop"],
                [SESSION],
                summary="run a session's stored code",
            ),
        },
    ),
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
            "get": Command(
                "Show a version with its data.",
                calls(
                    on_session(lambda session, named: session.versions.get(named.version)),
                    lambda version: print_json(version.answer),
                ),
                ["era versions get app 3"],
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
    ),
    "url": Command(
        "Print the public address of a port of a session.\n\nIt is a site of its own. Where that name doesn't resolve, "
        "--proxy prints the address as a path of the server.",
        calls(on_session(_url), lambda found: print(found["url"])),
        ["era url shop 3000", "curl $(era url --proxy shop 3000)"],
        [
            SESSION,
            argument("port", metavar="PORT", type=int, nargs="?", default=80, help="(80)"),
            argument("--proxy", action="store_true", help="as a path of the server's own address"),
        ],
    ),
    "stop": Command(
        "End a session's processes and commit what they left.",
        calls(on_session(lambda session, _: session.stop())),
        ["era stop shop"],
        [SESSION],
    ),
    "setup": Command(
        "Follow the installing of a session's packages; leaves with 0 if it succeeds.",
        setup,
        ["era setup app", "era setup app --again", "era setup app --packages"],
        [
            SESSION,
            argument("--again", action="store_true", help="install them once more"),
            argument("--packages", action="store_true", help="list what is installed"),
        ],
    ),
}

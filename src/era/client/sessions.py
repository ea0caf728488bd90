"""`era sessions`: sessions, their settings, data and code."""

from __future__ import annotations

from typing import Any

from era.client.argument_values import json_object, json_or_text, labels, seconds, text_of
from era.client.failure import Failure
from era.client.grammar import Parser
from era.client.output import pairs, print_json, table
from era.client.servers import connect
from era.sdk.answers import SessionInfo


def add(parser: Parser) -> None:
    command = parser.group("Create, list, show, change, copy and delete sessions.")

    each = command("list", "list sessions, newest first")
    each.describe(
        list_, "List sessions, newest first.", ("era sessions list", "era sessions list --metadata team=blue")
    )
    each.add_argument("-n", "--limit", type=int, metavar="N", help="how many at most")
    each.add_argument("-l", "--language")
    each.add_argument("--status", help="idle, running; expired or deleted lists what can be restored")
    each.add_argument(
        "-m", "--metadata", action="append", default=[], metavar="NAME=VALUE", help="only with this label"
    )

    each = command("create", "make a session")
    each.describe(
        create,
        "Make a session and print its id.",
        ("era sessions create python", "era sessions create node shop --data '{\"n\": 0}' --metadata team=blue"),
    )
    each.add_argument("language", metavar="LANGUAGE")
    each.add_argument("session", metavar="ID", nargs="?", help="default: one that the server makes up")
    each.add_argument("--setup", metavar="JSON", help='packages, as {"pip": ["requests"]}')
    _settings(each)

    each = command("update", "change a session's settings")
    each.describe(update, "Change a session's settings, and print it.", ("era sessions update shop --timeout 60",))
    each.add_argument("session", metavar="SESSION")
    _settings(each)

    each = command("show", "show a session")
    each.describe(show, "Show a session.", ("era sessions show shop", "era sessions show shop --json"))
    each.add_argument("session", metavar="SESSION")

    each = command("delete", "delete sessions")
    each.describe(delete, "Delete sessions. For a day they can be restored.", ("era sessions delete shop old-shop",))
    each.add_argument("sessions", metavar="SESSION", nargs="+")
    each.add_argument("--purge", action="store_true", help="for good")

    each = command("restore", "bring back a session that was deleted or expired")
    each.describe(restore, "Bring back a session that was deleted or expired.", ("era sessions restore shop",))
    each.add_argument("session", metavar="SESSION")

    each = command("copy", "make a session of another one")
    each.describe(copy, "Make a session of another one and print its id.", ("era sessions copy shop --id shop-2",))
    each.add_argument("session", metavar="SESSION")
    each.add_argument("--id", help="the new session's id")
    each.add_argument("--from-version", type=int, metavar="N", help="as it was in this version")

    each = command("data", "show or set a session's data")
    each.describe(
        data,
        "Show a session's data or a key of it; with a VALUE, set the key. VALUE is JSON, or text where it is none.",
        ("era sessions data shop", "era sessions data shop count", "era sessions data shop count 5"),
    )
    each.add_argument("session", metavar="SESSION")
    each.add_argument("key", metavar="KEY", nargs="?")
    each.add_argument("value", metavar="VALUE", nargs="?")
    each.add_argument("--delete", action="store_true", help="remove the key")

    each = command("code", "show or store the code that runs where none is sent")
    each.describe(code, "Show a session's stored code, or store a FILE as such.", ("era sessions code shop main.py",))
    each.add_argument("session", metavar="SESSION")
    each.add_argument("file", metavar="FILE", nargs="?", help="- for standard input")
    each.add_argument("--description")

    each = command("run", "run a session's stored code")
    each.describe(run, "Run a session's stored code and leave with its exit code.", ("era sessions run shop",))
    each.add_argument("session", metavar="SESSION")

    each = command("stop", "end a session's processes and commit what they left")
    each.describe(stop, "End a session's processes and commit what they left.", ("era sessions stop shop",))
    each.add_argument("session", metavar="SESSION")

    each = command("url", "print a session's public URL")
    each.describe(url, "Print a session's public URL.", ("era sessions url shop --port 3000",))
    each.add_argument("session", metavar="SESSION")
    each.add_argument("-p", "--port", type=int, default=80, help="(80)")


def _settings(parser: Parser) -> None:
    add = parser.add_argument
    add("--data", metavar="JSON", help="the state: an object")
    add("-m", "--metadata", action="append", default=[], metavar="NAME=VALUE", help="a label; may be repeated")
    add("--timeout", type=seconds, metavar="SECONDS", help="of runs that name none")
    add("--ttl", type=int, metavar="SECONDS", help="without a call after which it expires")
    add("--internet", choices=("on", "off"), help="whether programs reach the internet")
    add("--allow", action="append", default=[], metavar="HOST", help="the only hosts that they reach; may be repeated")
    add("--public", choices=("on", "off"), help="whether anybody may call its public URL")
    add("--record-code", choices=("on", "off"), help="whether records of its runs keep the code or command that ran")


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


def list_(named: Any) -> None:
    with connect(named) as era:
        found = era.sessions.infos(named.limit, named.language, named.status, labels(named.metadata))
    if named.json:
        print_json({"sessions": [info.answer for info in found], "count": len(found)})
        return
    names = ("id", "language", "status", "files", "bytes", "version", "last run", "created")
    table(
        names,
        [
            (s.id, s.language, s.status, s.file_count, s.total_size_bytes, s.version, s.last_run_at, s.created_at)
            for s in found
        ],
    )


def create(named: Any) -> None:
    options = _options(named)
    if (setup := json_object(named.setup, "--setup")) is not None:
        options["setup"] = setup
    with connect(named) as era:
        session = era.session(named.language, named.session, **options)
        if named.json:
            print_json(session.info().answer)
        else:
            print(session.id)


def update(named: Any) -> None:
    options = _options(named)
    if not options:
        raise Failure("Nothing to change is named.\n     era sessions update --help lists the settings.")
    with connect(named) as era:
        _print(named, era.sessions.named(named.session).update(**options))


def show(named: Any) -> None:
    with connect(named) as era:
        _print(named, era.sessions.named(named.session).info())


def delete(named: Any) -> None:
    with connect(named) as era:
        for session in named.sessions:
            era.sessions.delete(session, purge=named.purge)
            if named.json:
                print_json({"success": True, "id": session})


def restore(named: Any) -> None:
    with connect(named) as era:
        session = era.sessions.restore(named.session)
        if named.json:
            print_json(session.info().answer)


def copy(named: Any) -> None:
    with connect(named) as era:
        session = era.sessions.named(named.session).duplicate(named.id, from_version=named.from_version)
        if named.json:
            print_json(session.info().answer)
        else:
            print(session.id)


def data(named: Any) -> int | None:
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
    return None


def code(named: Any) -> None:
    with connect(named) as era:
        session = era.sessions.named(named.session)
        if named.file is not None:
            session.set_code(text_of(named.file), named.description)
            if named.json:
                print_json(session.code().answer)
            return
        stored = session.code()
    if named.json:
        print_json(stored.answer)
    else:
        print(stored.code, end="" if stored.code.endswith("\n") else "\n")


def run(named: Any) -> int:
    from era.client.follow import follow

    with connect(named) as era:
        session = era.sessions.named(named.session)
        return follow(session, session.stream, as_json=named.json)


def stop(named: Any) -> None:
    with connect(named) as era:
        info = era.sessions.named(named.session).stop()
    if named.json:
        print_json(info.answer)


def url(named: Any) -> None:
    with connect(named) as era:
        found = era.sessions.named(named.session).url(named.port)
    if named.json:
        print_json({"url": found, "port": named.port})
    else:
        print(found)


def _print(named: Any, info: SessionInfo) -> None:
    if named.json:
        print_json(info.answer)
        return
    shown = ("id", "language", "status", "version", "created_at", "last_run_at", "file_count", "total_size_bytes",
             "persistent", "default_timeout", "ttl", "expires_at", "allowInternetAccess", "allowPublicAccess",
             "isolation", "storage", "record_code", "setup_status")  # fmt: skip
    values: dict[str, object] = {name: info.answer[name] for name in shown if info.answer.get(name) is not None}
    pairs(values | {name: info.answer[name] for name in ("metadata", "data") if info.answer[name]})

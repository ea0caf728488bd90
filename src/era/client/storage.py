"""`era storage`: what an owner's sessions share."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from era.client.command import LIMIT, Command, Group, argument, calls, json_object, json_or_text, text_of
from era.client.output import Failure, print_json, table
from era.client.servers import connect

if TYPE_CHECKING:
    from era.sdk.sync.client import Era

_KEY = (argument("namespace", metavar="NAMESPACE"), argument("key", metavar="KEY"))
_LIST = (
    argument("namespace", metavar="NAMESPACE"),
    argument("--prefix", default="", help="only those that begin like this"),
    LIMIT,
)
_SQL = (
    argument("namespace", metavar="NAMESPACE"),
    argument("sql", metavar="SQL"),
    argument("params", metavar="PARAM", nargs="*", help="for each ?: JSON, or text where it is none"),
)


def _get_value(named: Any) -> None:
    with connect(named) as era:
        value = era.storage.kv.get(named.namespace, named.key)
    if named.json:
        print_json(value)
    if value is None:
        raise Failure(f"There is no key '{named.key}' in '{named.namespace}'.", "not_found")
    if not named.json:
        print(value)


def _get_object(named: Any) -> None:
    with connect(named) as era:
        content = era.storage.r2.get(named.namespace, named.key)
    if named.json:
        from base64 import b64encode

        print_json(None if content is None else {"base64": b64encode(content).decode()})
    if content is None:
        raise Failure(f"There is no object '{named.key}' in '{named.namespace}'.", "not_found")
    if not named.json:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)


def _set_value(era: Era, named: Any) -> None:
    value = text_of("-") if named.value is None else named.value
    era.storage.kv.set(named.namespace, named.key, value, json_object(named.metadata, "--metadata"))


def _put_object(era: Era, named: Any) -> None:
    try:
        if named.file == "-":
            content = sys.stdin.buffer.read()
        else:
            with open(named.file, "rb") as file:
                content = file.read()
    except OSError as error:
        raise Failure(f"{named.file} can't be read: {error.strerror}") from None
    era.storage.r2.put(named.namespace, named.key, content)


def _query(era: Era, named: Any) -> Any:
    return era.storage.d1.query(named.namespace, named.sql, [json_or_text(each) for each in named.params])


def _execute(era: Era, named: Any) -> Any:
    return era.storage.d1.exec(named.namespace, named.sql, [json_or_text(each) for each in named.params])


def _show_rows(rows: list[dict[str, Any]]) -> None:
    if rows:
        table(list(rows[0]), [list(row.values()) for row in rows])


_KV = Group(
    "Text by key.",
    {
        "get": Command("Print the value of a key.", _get_value, ["era storage kv get shop user:7"], _KEY),
        "set": Command(
            "Set a key.",
            calls(_set_value),
            ["era storage kv set shop user:7 Ada"],
            [
                *_KEY,
                argument("value", metavar="VALUE", nargs="?", help="default: standard input"),
                argument("--metadata", metavar="JSON"),
            ],
        ),
        "list": Command(
            "List keys.",
            calls(
                lambda era, named: era.storage.kv.list(named.namespace, named.prefix, named.limit),
                lambda found: table(("key", "metadata"), [(key["name"], key["metadata"]) for key in found]),
            ),
            ["era storage kv list shop --prefix user:"],
            _LIST,
        ),
        "delete": Command(
            "Delete a key.",
            calls(lambda era, named: era.storage.kv.delete(named.namespace, named.key)),
            ["era storage kv delete shop user:7"],
            _KEY,
        ),
    },
)
_D1 = Group(
    "An SQL database for each namespace.",
    {
        "query": Command(
            "Run one statement and print its rows.",
            calls(_query, _show_rows),
            ["era storage d1 query shop 'SELECT * FROM t'"],
            _SQL,
        ),
        "exec": Command(
            "Run statements in one transaction.",
            calls(_execute, lambda done: print(f"{done['meta']['changes']} rows changed")),
            ["era storage d1 exec shop 'CREATE TABLE t (n)'"],
            _SQL,
        ),
    },
    summary="SQL databases",
)
_R2 = Group(
    "Bytes by key.",
    {
        "get": Command(
            "Write an object to standard output.",
            _get_object,
            ["era storage r2 get shop logo.png > logo.png"],
            _KEY,
        ),
        "put": Command(
            "Store a file.",
            calls(_put_object),
            ["era storage r2 put shop logo.png ./logo.png"],
            [*_KEY, argument("file", metavar="FILE", nargs="?", default="-", help="default: standard input")],
        ),
        "list": Command(
            "List objects.",
            calls(
                lambda era, named: era.storage.r2.list(named.namespace, named.prefix, named.limit),
                lambda found: table(
                    ("key", "bytes", "uploaded"), [(each["key"], each["size"], each["uploaded"]) for each in found]
                ),
            ),
            ["era storage r2 list shop"],
            _LIST,
        ),
        "delete": Command(
            "Delete an object.",
            calls(lambda era, named: era.storage.r2.delete(named.namespace, named.key)),
            ["era storage r2 delete shop logo.png"],
            _KEY,
        ),
    },
)
COMMANDS = {
    "storage": Group(
        "Keys, SQL and objects that an owner's sessions share.",
        {
            "kv": _KV,
            "d1": _D1,
            "r2": _R2,
            "stats": Command(
                "Count what is stored.",
                calls(
                    lambda era, _: era.storage.stats(),
                    lambda found: table(("namespace", "items"), list(found["by_namespace"].items())),
                ),
                ["era storage stats"],
            ),
        },
    )
}

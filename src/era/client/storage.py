"""`era storage`: what an owner's sessions share."""

from __future__ import annotations

import sys
from typing import Any

from era.client.argument_values import json_object, json_or_text, text_of
from era.client.failure import Failure
from era.client.grammar import Parser
from era.client.output import print_json, table
from era.client.servers import connect

_KV, _R2 = "era storage kv", "era storage r2"


def add(parser: Parser) -> None:
    kind = parser.group("Keys, SQL and objects that an owner's sessions share.")

    command = kind("kv", "text by key").group("Text by key.")
    for name, call, summary, example in (
        ("get", kv_get, "print the value of a key", f"{_KV} get shop user:7"),
        ("set", kv_set, "set a key", f"{_KV} set shop user:7 Ada"),
        ("list", kv_list, "list keys", f"{_KV} list shop --prefix user:"),
        ("delete", kv_delete, "delete a key", f"{_KV} delete shop user:7"),
    ):
        each = _keyed(command, name, call, summary, example)
        if name == "set":
            each.add_argument("value", metavar="VALUE", nargs="?", help="default: standard input")
            each.add_argument("--metadata", metavar="JSON")

    command = kind("d1", "SQL databases").group("An SQL database for each namespace.")
    for name, call, summary, example in (
        ("query", d1_query, "run one statement and print its rows", "era storage d1 query shop 'SELECT * FROM t'"),
        ("exec", d1_exec, "run statements in one transaction", "era storage d1 exec shop 'CREATE TABLE t (n)'"),
    ):
        each = command(name, summary)
        each.describe(call, f"{summary}.", (example,))
        each.add_argument("namespace", metavar="NAMESPACE")
        each.add_argument("sql", metavar="SQL")
        each.add_argument("params", metavar="PARAM", nargs="*", help="for each ?: JSON, or text where it is none")

    command = kind("r2", "bytes by key").group("Bytes by key.")
    for name, call, summary, example in (
        ("get", r2_get, "write an object to standard output", f"{_R2} get shop logo.png > logo.png"),
        ("put", r2_put, "store a file", f"{_R2} put shop logo.png ./logo.png"),
        ("list", r2_list, "list objects", f"{_R2} list shop"),
        ("delete", r2_delete, "delete an object", f"{_R2} delete shop logo.png"),
    ):
        each = _keyed(command, name, call, summary, example)
        if name == "put":
            each.add_argument("file", metavar="FILE", nargs="?", default="-", help="default: standard input")

    each = kind("stats", "count what is stored")
    each.describe(stats, "Count what is stored.", ("era storage stats",))


def _keyed(command: Any, name: str, call: Any, summary: str, example: str) -> Parser:
    each: Parser = command(name, summary)
    each.describe(call, f"{summary}.", (example,))
    each.add_argument("namespace", metavar="NAMESPACE")
    if name == "list":
        each.add_argument("--prefix", default="", help="only those that begin like this")
        each.add_argument("-n", "--limit", type=int, metavar="N", help="how many at most")
    else:
        each.add_argument("key", metavar="KEY")
    return each


def kv_get(named: Any) -> None:
    with connect(named) as era:
        value = era.storage.kv.get(named.namespace, named.key)
    if named.json:
        print_json(value)
    if value is None:
        raise Failure(f"There is no key '{named.key}' in '{named.namespace}'.", "not_found")
    if not named.json:
        print(value)


def kv_set(named: Any) -> None:
    value = text_of("-") if named.value is None else named.value
    with connect(named) as era:
        era.storage.kv.set(named.namespace, named.key, value, json_object(named.metadata, "--metadata"))


def kv_list(named: Any) -> None:
    with connect(named) as era:
        found = era.storage.kv.list(named.namespace, named.prefix, named.limit)
    if named.json:
        print_json(found)
    else:
        table(("key", "metadata"), [(key["name"], key["metadata"]) for key in found])


def kv_delete(named: Any) -> None:
    with connect(named) as era:
        era.storage.kv.delete(named.namespace, named.key)


def d1_query(named: Any) -> None:
    with connect(named) as era:
        rows = era.storage.d1.query(named.namespace, named.sql, [json_or_text(each) for each in named.params])
    if named.json:
        print_json(rows)
    elif rows:
        table(list(rows[0]), [list(row.values()) for row in rows])


def d1_exec(named: Any) -> None:
    with connect(named) as era:
        done = era.storage.d1.exec(named.namespace, named.sql, [json_or_text(each) for each in named.params])
    if named.json:
        print_json(done)
    else:
        print(f"{done['meta']['changes']} rows changed")


def r2_get(named: Any) -> None:
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


def r2_put(named: Any) -> None:
    try:
        if named.file == "-":
            content = sys.stdin.buffer.read()
        else:
            with open(named.file, "rb") as file:
                content = file.read()
    except OSError as error:
        raise Failure(f"{named.file} can't be read: {error.strerror}") from None
    with connect(named) as era:
        era.storage.r2.put(named.namespace, named.key, content)


def r2_list(named: Any) -> None:
    with connect(named) as era:
        found = era.storage.r2.list(named.namespace, named.prefix, named.limit)
    if named.json:
        print_json(found)
    else:
        table(("key", "bytes", "uploaded"), [(each["key"], each["size"], each["uploaded"]) for each in found])


def r2_delete(named: Any) -> None:
    with connect(named) as era:
        era.storage.r2.delete(named.namespace, named.key)


def stats(named: Any) -> None:
    with connect(named) as era:
        found = era.storage.stats()
    if named.json:
        print_json(found)
    else:
        table(("namespace", "items"), list(found["by_namespace"].items()))

"""`era login` and `logout`: several servers by name; `era bench`: how fast one answers, as its users see it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from era.client.command import Command, argument
from era.client.output import Failure, notice, print_json, table
from era.client.servers import Servers, connect
from era.sdk.sync.client import Era

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def login(named: Any) -> None:
    servers = Servers()
    if named.url is None:
        _use_or_list(named, servers)
        return
    try:
        parts = urlsplit(named.url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Failure(f"'{named.url}' is no address of a server: it begins with http:// or https://.")
    if parts.username or parts.password:
        raise Failure("A key doesn't belong into an address: say it with --key.")
    name = named.name or parts.hostname
    if not _NAME.fullmatch(name):
        raise Failure(f"'{name}' can't be a name: letters, digits, '.', '_' and '-'.\n     Choose one with --name.")
    key = sys.stdin.readline().strip() if named.key == "-" else named.key or os.environ.get("ERA_API_KEY")
    url = named.url.rstrip("/")
    with Era(url, api_key=key or "", retries=0) as era:
        era.languages()  # a wrong key or address is said now
    servers.known[name] = {"url": url, "key": key}
    servers.current = name
    servers.save()
    notice(f"commands call {url} from now on; it is remembered as '{name}'")


def _use_or_list(named: Any, servers: Servers) -> None:
    if named.name is not None:
        if named.name not in servers.known:
            raise Failure(f"There is no server '{named.name}'.\n     `era login` lists those that there are.")
        servers.current = named.name
        servers.save()
        return
    rows = [(name, server["url"], bool(server.get("key"))) for name, server in sorted(servers.known.items())]
    if named.json:
        shown = [{"name": n, "url": u, "has_key": k, "current": n == servers.current} for n, u, k in rows]
        print_json({"servers": shown})
    else:
        names = ("name", "address", "key", "")
        table(names, [(n, u, "key" if k else "", "in use" if n == servers.current else "") for n, u, k in rows])


def logout(named: Any) -> None:
    servers = Servers()
    if servers.known.pop(named.name, None) is None:
        raise Failure(f"There is no server '{named.name}'.\n     `era login` lists those that there are.")
    if servers.current == named.name:
        servers.current = None
    servers.save()


def bench(named: Any) -> None:
    if named.runs < 1:
        raise Failure("--runs is at least 1.")
    with connect(named) as era, era.session(named.language) as session:

        def first() -> None:
            with era.session(named.language) as other:
                other.run("").check()

        cases: dict[str, Callable[[], object]] = {
            "a run in a warm session": lambda: session.run(""),
            "its data read": session.data.all,
            "a file written": lambda: session.files.write("bench.txt", "x"),
            "a new session, its first run, and its end": first,
        }
        figures = {}
        for name, call in cases.items():
            call()
            taken = sorted(_milliseconds(call) for _ in range(named.runs))
            figures[name] = {"p50": taken[len(taken) // 2], "p95": taken[len(taken) * 95 // 100], "best": taken[0]}
    if named.json:
        print_json(figures)
    else:
        rows = [(name, *(f"{each[key]:.1f} ms" for key in ("p50", "p95", "best"))) for name, each in figures.items()]
        table(("what", "p50", "p95", "best"), rows)


def _milliseconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


COMMANDS = {
    "login": Command(
        "Remember a server and its key, and use it from now on.\n\nWithout URL, list the servers that are "
        "remembered; with --name alone, use another one of them. ERA_SERVER\nand --server come before.",
        login,
        [
            "era login https://era.example.com --key era_… --name work",
            "era login http://127.0.0.1:8787",
            "era login --name work",
            "era run --server work hello.py",
        ],
        [
            argument("url", metavar="URL", nargs="?"),
            argument("--key", help="the API key; - reads it from standard input; default: ERA_API_KEY"),
            argument("--name", help="default: the host's name"),
        ],
    ),
    "logout": Command("Forget a server and its key.", logout, ["era logout work"], [argument("name", metavar="NAME")]),
    "bench": Command(
        "Measure a server: how many milliseconds calls take, one after the other. It makes a session for that, and\n"
        "deletes it. The benchmarks that ERA is developed with are `make bench`.",
        bench,
        ["era bench", "era bench --language node --runs 100"],
        [
            argument("-l", "--language", default="python", help="(python)"),
            argument("--runs", type=int, default=30, metavar="N", help="calls of each kind (30)"),
        ],
    ),
}

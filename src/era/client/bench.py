"""`era bench`: how fast a server answers, as its users see it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from era.client.command import Command, argument
from era.client.failure import Failure
from era.client.output import print_json, table
from era.client.servers import connect


def bench(named: Any) -> None:
    if named.runs < 1:
        raise Failure("--runs is at least 1.")
    with connect(named) as era, era.session(named.language, ephemeral=True) as session:

        def first() -> None:
            with era.session(named.language, ephemeral=True) as other:
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
    "bench": Command(
        "Measure a server: how many milliseconds calls take, one after the other. It makes a session for that, and\n"
        "deletes it. The benchmarks that ERA is developed with are `make bench`.",
        bench,
        ["era bench", "era bench --language node --runs 100"],
        [
            argument("-l", "--language", default="python", help="(python)"),
            argument("--runs", type=int, default=30, metavar="N", help="calls of each kind (30)"),
        ],
    )
}

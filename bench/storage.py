"""The storage for programs: from inside a run, and over HTTP."""

from __future__ import annotations

from collections.abc import Callable

from bench.arena import Answer, Arena
from bench.cases import Probe, warm

_GETS = 100
_PYTHON = "import era_storage\nfor _ in range({n}): value = era_storage.kv.get('bench', 'key')\nprint(value)"
_NODE = """\
const {{ KVStorage }} = require('./era_storage.js');
(async () => {{
  let value;
  for (let i = 0; i < {n}; i++) value = await KVStorage.get('bench', 'key');
  console.log(value);
}})();
"""


def run(language: str, gets: int = 1) -> Callable[[Arena], Probe]:
    """A warm run that gets one value `gets` times."""
    code = (_PYTHON if language == "python" else _NODE).format(n=gets)

    def start(arena: Arena) -> Probe:
        _put(arena)
        return warm(language, code)(arena)

    return start


def many(language: str) -> Callable[[Arena], Probe]:
    """A warm run that gets one value 100 times."""
    return run(language, _GETS)


def http(arena: Arena) -> Probe:
    """Getting a value over HTTP."""
    _put(arena)

    def after(answer: Answer) -> None:
        if answer != (200, b'{"value":"1","metadata":null}'):
            raise RuntimeError(f"The value is wrong: {answer}")

    return Probe(lambda _: arena.get("/api/storage/kv/bench/key"), after=after)


def put(arena: Arena) -> Probe:
    """Setting a value over HTTP."""
    return Probe(lambda _: _put(arena))


def sql(arena: Arena) -> Probe:
    """A SELECT over HTTP."""
    body = {"sql": "SELECT 1 AS one"}
    check = arena.check_status(200)
    return Probe(lambda _: arena.post("/api/storage/d1/bench/query", body), after=check)


def _put(arena: Arena) -> None:
    arena.check_status(200)(arena.put("/api/storage/kv/bench/key", {"value": "1"}))

"""What a case is, and the common ones. Which there are is in lists.py."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from bench import rivals
from bench.arena import Answer, Arena

PROGRAMS = {
    "python": "print(1)",
    "node": "console.log(1)",
    "typescript": "const one: number = 1; console.log(one)",
}
COUNTER = """\
import json
with open(".session_data.json") as file:
    data = json.load(file)
data["n"] = data.get("n", 0) + 1
with open(".session_data.json", "w") as file:
    json.dump(data, file)
print(1)
"""


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class Probe:
    """A case made ready to be measured, over and over: `call(before())` is one measurement, of `call` alone."""

    call: Callable[[Any], Any]
    before: Callable[[], Any] = _nothing
    after: Callable[[Any], object] = lambda _: None
    """Gets what `call` answered. Raises where that is not what it should be."""

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered before the calls of a round, left after them."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    what: str
    start: Callable[[Arena], Probe]
    pause: float = 0.0
    """Seconds of rest before each measured call, after `before`."""
    burst: int = 5
    """Measured calls in a round."""
    goal: float | None = None
    """Milliseconds, of the median."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A case ÷ its rival. A goal is a wish to look at, not a bound to fail on."""

    case: str
    rival: str
    goal: float | None = None
    quantile: float = 0.5
    """Of the calls of each round: the one that is compared."""

    @property
    def name(self) -> str:
        return f"{self.case} ÷ {self.rival}" + ("" if self.quantile == 0.5 else f", p{self.quantile * 100:.0f}")


def warm(language: str, code: str) -> Callable[[Arena], Probe]:
    """A run in a session whose sandbox is live."""

    def start(arena: Arena) -> Probe:
        session = arena.new_session(language)
        arena.check_run(arena.run(session, code))
        return Probe(lambda _: arena.run(session, code), after=arena.check_run)

    return start


def relayed(code: str) -> Callable[[Arena], Probe]:
    """A call of the public URL of a session whose sandbox is live."""

    def start(arena: Arena) -> Probe:
        session = arena.new_session("python")
        arena.store_code(session, code)
        arena.check_run(arena.run(session, code))
        path = f"/proxy/{session}/80/hook?a=1"

        def after(answer: Answer) -> None:
            if answer != (200, b"1"):
                raise RuntimeError(f"A relayed call went wrong: {answer}")

        return Probe(lambda _: arena.post(path, {"hello": "world"}), after=after)

    return start


def first(language: str, code: str) -> Callable[[Arena], Probe]:
    """The first run of a session made just before, while the pool has a sandbox for it."""

    def start(arena: Arena) -> Probe:
        session = ""

        def before() -> str:
            nonlocal session
            if session:
                arena.delete_session(session)
            session = arena.new_session(language)
            arena.wait_for_pool()
            return session

        return Probe(lambda session: arena.run(session, code), before, arena.check_run)

    return start


def create(arena: Arena) -> Probe:
    """A session made. Those of a round go when the service does."""
    return Probe(lambda _: arena.create("python"), after=arena.check_created)


def health(arena: Arena) -> Probe:
    return Probe(lambda _: arena.get("/health"), after=arena.check_status(200))


def no_such_path(arena: Arena) -> Probe:
    return Probe(lambda _: arena.get("/nothing"), after=arena.check_status(404))


def program(command: rivals.Maker, output: bytes = b"1\n") -> Callable[[Arena], Probe]:
    """A program of the host's, from its start to its end."""

    def start(arena: Arena) -> Probe:
        argv = command(arena.scratch)

        def after(answer: bytes) -> None:
            if answer != output:
                raise RuntimeError(f"{argv[0]} said {answer!r}, not {output!r}.")

        return Probe(lambda _: rivals.run(argv), after=after)

    return start


def commit(arena: Arena) -> Probe:
    change = rivals.durable_commit(arena.scratch)
    return Probe(lambda _: change())

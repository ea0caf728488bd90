"""What a case is, and the cases that most of the list in lists.py is made of."""

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
    "deno": "const one: number = 1; console.log(one)",
    "go": 'package main\n\nimport "fmt"\n\nfunc main() { fmt.Println(1) }\n',
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
    """A case that is set up. One measurement is `after(call(before()))`, of which only `call` is timed."""

    call: Callable[[Any], Any]
    before: Callable[[], Any] = _nothing
    after: Callable[[Any], object] = lambda _: None
    """Gets what `call` returned. Raises RuntimeError if that is wrong."""

    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered before the calls of a round, left after them."""

    runs: int = 1
    """How many runs one call makes. Processor time is that of one of them."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is measured."""

    name: str
    what: str
    """A few words about it, for the report."""
    start: Callable[[Arena], Probe]
    """Sets it up, once for all rounds."""
    pause: float = 0.0
    """Seconds of rest before each measured call, after `before`."""
    burst: int = 5
    """Measured calls in a round."""
    goal: float | None = None
    """What the median should be at most, in milliseconds."""

    processor: bool = False
    """Whether its processor time is measured, too. No sandbox may end meanwhile, whose time would be missing."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """The time of a case ÷ that of its rival. A goal is shown in the report; missing it is no failure."""

    case: str
    rival: str
    goal: float | None = None
    quantile: float = 0.5
    """Which quantile of each round's calls is compared."""
    rival_quantile: float | None = None
    """Which of the rival's, where that is another one."""

    processor: bool = False
    """Compare processor time in place of what a clock says."""

    @property
    def name(self) -> str:
        if self.processor:
            return f"{self.case} ÷ {self.rival}, processor time"
        which = "" if self.quantile == 0.5 else f", p{self.quantile * 100:.0f}"
        return f"{self.case} ÷ {self.rival}{which}" + (
            "" if self.rival_quantile is None else f" ÷ p{self.rival_quantile * 100:.0f}"
        )


def warm(language: str, code: str) -> Callable[[Arena], Probe]:
    """A run in a warm session."""

    def start(arena: Arena) -> Probe:
        session = arena.new_session(language)
        arena.check_run(arena.run(session, code))
        return Probe(lambda _: arena.run(session, code), after=arena.check_run)

    return start


def relayed(code: str) -> Callable[[Arena], Probe]:
    """A call of a warm session's public URL, answered by its stored code."""

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
    """The first run of a session created just before, for which the pool has a sandbox."""

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


def create_and_run(code: str) -> Callable[[Arena], Probe]:
    """A session created and run for the first time, one after the other: how long until there is a result."""

    def start(arena: Arena) -> Probe:
        def call(_: object) -> tuple[str, Answer]:
            session = arena.check_created(arena.create("python"))
            return session, arena.run(session, code)

        def after(answer: tuple[str, Answer]) -> None:
            arena.check_run(answer[1])
            arena.delete_session(answer[0])

        return Probe(call, after=after)

    return start


def create(arena: Arena) -> Probe:
    """Creating a session. The sessions stay until the service's data is removed."""
    return Probe(lambda _: arena.create("python"), after=arena.check_created)


def health(arena: Arena) -> Probe:
    """GET /health."""
    return Probe(lambda _: arena.get("/health"), after=arena.check_status(200))


def http(arena: Arena) -> Probe:
    """A request that costs HTTP only. Not one for a path that doesn't exist: the server looks for what was meant."""
    return Probe(lambda _: arena.get("/api/sessions/none/files/.."), after=arena.check_status(400))


def program(command: rivals.Maker, output: bytes = b"1\n") -> Callable[[Arena], Probe]:
    """A process on the host, from its start to its end. It must print `output`."""

    def start(arena: Arena) -> Probe:
        argv = command(arena.scratch)

        def after(answer: bytes) -> None:
            if answer != output:
                raise RuntimeError(f"{argv[0]} said {answer!r}, not {output!r}.")

        return Probe(lambda _: rivals.run(argv), after=after)

    return start


def commit(arena: Arena) -> Probe:
    """One durable SQLite transaction, without the service."""
    change = rivals.durable_commit(arena.scratch)
    return Probe(lambda _: change())

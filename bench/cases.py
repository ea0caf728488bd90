"""What is measured, and against what. A new case is an entry of CASES, a new ratio one of RATIOS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import rivals
from bench.arena import Arena

SETTLED = 0.2
"""Seconds after which a sandbox that said it is ready has nothing left to do, in any language."""

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


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    what: str
    start: Callable[[Arena], Probe]
    pause: float = 0.0
    """Seconds of rest before each measured call, after `before`."""
    burst: int = 5
    """Measured calls in a round."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A case ÷ its rival. A goal is a wish to look at, not a bound to fail on."""

    case: str
    rival: str
    goal: float | None = None

    @property
    def name(self) -> str:
        return f"{self.case} ÷ {self.rival}"


def warm(language: str, code: str) -> Callable[[Arena], Probe]:
    """A run in a session whose sandbox is live."""

    def start(arena: Arena) -> Probe:
        session = arena.new_session(language)
        arena.check_run(arena.run(session, code))
        return Probe(lambda _: arena.run(session, code), after=arena.check_run)

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


# How long each language's spare takes to be ready again, generously.
_PAUSES = {"python": 0.05, "node": 0.1, "typescript": 0.2}
_HOST = {
    "python": rivals.python(PROGRAMS["python"]),
    "node": rivals.node(PROGRAMS["node"]),
    "typescript": rivals.typescript(PROGRAMS["typescript"]),
}

CASES = [
    *(
        case
        for language, code in PROGRAMS.items()
        for case in (
            Case(f"{language} warm", "a run in a live session, alone", warm(language, code), _PAUSES[language]),
            Case(f"{language} host", "the interpreter on the host", program(_HOST[language]), _PAUSES[language]),
            Case(f"{language} burst", "such runs back to back", warm(language, code)),
            Case(f"{language} host burst", "such starts back to back", program(_HOST[language])),
            Case(f"{language} first", "the first run of a new session", first(language, code), SETTLED, burst=2),
        )
    ),
    Case("python change", "a warm run that changes data", warm("python", COUNTER), _PAUSES["python"]),
    Case(
        "python bwrap",
        "the interpreter in a new bubblewrap",
        program(rivals.bwrap(PROGRAMS["python"])),
        _PAUSES["python"],
    ),
    Case("session create", "a session made", create),
    Case("health", "HTTP and one read of the database", health),
    Case("http floor", "GET of no such path: HTTP alone", no_such_path),
    Case("commit floor", "a durable commit of SQLite, same disk", commit),
]

RATIOS = [
    Ratio("python warm", "python host", goal=0.5),
    Ratio("node warm", "node host"),
    Ratio("typescript warm", "typescript host"),
    Ratio("python burst", "python host burst"),
    Ratio("node burst", "node host burst"),
    Ratio("typescript burst", "typescript host burst"),
    Ratio("python change", "python host"),
    Ratio("python warm", "python bwrap"),
    Ratio("python first", "python host"),
    Ratio("python first", "python bwrap"),
    Ratio("node first", "node host"),
    Ratio("typescript first", "typescript host"),
    Ratio("session create", "commit floor"),
    Ratio("python warm", "http floor"),
]

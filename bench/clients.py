"""The SDK and the command, beside calls of the same service by hand and programs on the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from bench import rivals
from bench.arena import Answer, Arena
from bench.cases import Case, Probe, Ratio
from era import Era
from era.sdk.answers import RunResult

_CODE = "print(1)"
_ERA = Path(sys.executable).parent / "era"
_INSTALLED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""The environment, but for what has each start compile the package anew: where it is installed it is compiled."""


def run_by_hand(*, keyed: bool) -> Callable[[Arena], Probe]:
    """A run of a warm session over http.client, with an Idempotency-Key of its own or without."""

    def start(arena: Arena) -> Probe:
        session = arena.new_session("python")
        arena.check_run(arena.run(session, _CODE))
        keys = count()

        def call(_: object) -> dict[str, object]:
            headers = {"Idempotency-Key": f"{session}-{next(keys)}"} if keyed else {}
            status, content = arena.run(session, _CODE, headers)
            told: dict[str, object] = json.loads(content)  # as the SDK does
            return told if status == 200 else {}

        def after(told: dict[str, object]) -> None:
            if told.get("stdout") != "1\n":
                raise RuntimeError(f"A run went wrong: {told}")

        return Probe(call, after=after)

    return start


def run_by_sdk(*, keyed: bool) -> Callable[[Arena], Probe]:
    """The same by the SDK."""

    def start(arena: Arena) -> Probe:
        session = _era(arena, keyed).session("python")
        session.run(_CODE).check()

        def after(result: RunResult) -> None:
            if result.stdout != "1\n":
                raise RuntimeError(f"A run went wrong: {result}")

        return Probe(lambda _: session.run(_CODE), after=after)

    return start


def get_by_hand(arena: Arena) -> Probe:
    """GET of a session over http.client, and its JSON."""
    path = f"/api/sessions/{arena.new_session('python')}"

    def call(_: object) -> Answer:
        answer = arena.get(path)
        json.loads(answer[1])
        return answer

    return Probe(call, after=arena.check_status(200))


def get_by_sdk(arena: Arena) -> Probe:
    """The same by the SDK."""
    session = _era(arena, False).session("python")
    return Probe(lambda _: session.info())


def _era(arena: Arena, keyed: bool) -> Era:
    return arena.closers.enter_context(Era(f"http://127.0.0.1:{arena.port}", idempotency_keys=keyed))


def command(*words: str) -> Callable[[Arena], Probe]:
    """The command, from its start to its end. It must print `1`."""

    def start(arena: Arena) -> Probe:
        (arena.scratch / "one.py").write_text(_CODE)
        environment = {**_INSTALLED, "ERA_SERVER": f"http://127.0.0.1:{arena.port}"}
        argv = [str(_ERA), *words]

        def call(_: object) -> bytes:
            return subprocess.run(
                argv, cwd=arena.scratch, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True
            ).stdout

        return Probe(call, before=lambda: call(None), after=_printed)

    return start


def host_file(arena: Arena) -> Probe:
    """`python3` with a file on the host."""
    (arena.scratch / "one.py").write_text(_CODE)
    argv = [rivals.python(_CODE)(arena.scratch)[0], "one.py"]
    return Probe(lambda _: subprocess.run(argv, cwd=arena.scratch, capture_output=True).stdout, after=_printed)


def imported(arena: Arena) -> Probe:
    """Python's start, and the import of the SDK."""
    argv = [sys.executable, "-c", "from era import Era; print(1)"]
    return Probe(lambda _: subprocess.run(argv, env=_INSTALLED, capture_output=True).stdout, after=_printed)


def _printed(output: bytes) -> None:
    if output != b"1\n":
        raise RuntimeError(f"It printed {output!r}.")


CASES = [
    Case("sdk run", "a warm run by the SDK, with its idempotency key", run_by_sdk(keyed=True), 0.05),
    Case("keyed run", "the same request by http.client", run_by_hand(keyed=True), 0.05),
    Case("sdk run plain", "a warm run by the SDK, without a key", run_by_sdk(keyed=False), 0.05),
    Case("plain run", "the same request by http.client", run_by_hand(keyed=False), 0.05),
    Case("sdk get", "a session by the SDK", get_by_sdk),
    Case("plain get", "the same request by http.client", get_by_hand),
    Case("era run", "the command, in a warm session", command("run", "-s", "warm", "one.py"), 0.05),
    Case("python file", "the program by python3 on the host", host_file),
    Case("import era", "Python's start and `from era import Era`", imported, goal=150),
]
RATIOS = [
    Ratio("sdk run", "keyed run", goal=1.15),
    Ratio("sdk run plain", "plain run", goal=1.15),
    Ratio("sdk run", "plain run"),
    Ratio("sdk get", "plain get"),
    Ratio("era run", "python file", goal=8),
]

"""How Python programs end: as under `python3 main.py`, whether their process ends early or is finalized.

The expectation is not written down: the same program is given to the host's interpreter, and exit code, streams and
files must not differ. Two changed builds show that the tests see what they mean to: one tells by its exit code which
programs ended early, the other ends all of them early, and is found out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from era.core.models import STATE_FILE
from era.drivers.bubblewrap import BubblewrapSandbox
from tests.api.plain_interpreter import python, run_plainly, without_numbers
from tests.drivers.exit_programs import DIFFERENT, MODULE, NOTICED, QUIET, UNKNOWN
from tests.drivers.sandboxes import Sandboxes, Weakness

type Outcome = tuple[int, str, str, dict[str, bytes]]

TOLD = 77
TELLING = Weakness(supervisor={"                _exit(0)\n": f"                _exit({TOLD})\n"})
HASTY = Weakness(supervisor={"alone and self._is_unnoticeable()": "alone"})


@pytest.fixture(scope="module")
def sandbox(sandboxes: Sandboxes) -> BubblewrapSandbox:
    return sandboxes.make()


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sandboxes, BubblewrapSandbox]]:
    yield from changed(tmp_path_factory.mktemp("telling"), TELLING)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sandboxes, BubblewrapSandbox]]:
    yield from changed(tmp_path_factory.mktemp("hasty"), HASTY)


def changed(directory: Path, weakness: Weakness) -> Iterator[tuple[Sandboxes, BubblewrapSandbox]]:
    made = Sandboxes(directory, weakness, self_tested=["node"])
    yield made, made.make()
    made.stop()


def inside(sandboxes: Sandboxes, sandbox: BubblewrapSandbox, code: str) -> Outcome:
    result = sandboxes.run(sandbox, code, files={"kept.py": MODULE.encode()})
    files = found(sandbox.workspace)
    for name in files:
        (sandbox.workspace / name).unlink()
    return result.ended.exit_code, without_numbers(result.stdout), without_numbers(result.stderr), files


def outside(code: str, directory: Path) -> Outcome:
    (directory / "kept.py").write_text(MODULE)
    outcome = run_plainly([python()], "main.py", code, directory)
    (directory / "main.py").unlink()
    return *outcome, found(directory)


def found(directory: Path) -> dict[str, bytes]:
    """The files that a program left, by name."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file() and path.name != STATE_FILE}


@pytest.mark.parametrize("name", [*QUIET, *NOTICED, *UNKNOWN])
def test_a_program_ends_as_under_python(
    sandboxes: Sandboxes, sandbox: BubblewrapSandbox, tmp_path: Path, name: str
) -> None:
    code = (QUIET | NOTICED | UNKNOWN)[name]
    assert inside(sandboxes, sandbox, code) == outside(code, tmp_path)


@pytest.mark.parametrize("name", QUIET)
def test_a_program_whose_end_nobody_notices_ends_early(telling: tuple[Sandboxes, BubblewrapSandbox], name: str) -> None:
    assert inside(*telling, QUIET[name])[0] == (4 if "ends the process" in name else TOLD)


@pytest.mark.parametrize("name", [*NOTICED, *UNKNOWN])
def test_a_program_whose_end_may_be_noticed_is_finalized(
    telling: tuple[Sandboxes, BubblewrapSandbox], name: str
) -> None:
    assert inside(*telling, (NOTICED | UNKNOWN)[name])[0] != TOLD


@pytest.mark.parametrize("name", NOTICED)
def test_a_program_that_ended_early_anyway_would_be_noticed(
    hasty: tuple[Sandboxes, BubblewrapSandbox], tmp_path: Path, name: str
) -> None:
    assert inside(*hasty, NOTICED[name]) != outside(NOTICED[name], tmp_path)


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_known_to_differ_still_does(
    sandboxes: Sandboxes, sandbox: BubblewrapSandbox, tmp_path: Path, name: str
) -> None:
    """If this fails, that is good news: move the program, and tell docs/languages.md."""
    assert inside(sandboxes, sandbox, DIFFERENT[name]) != outside(DIFFERENT[name], tmp_path)

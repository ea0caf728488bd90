"""A program that writes little at a time wakes nobody with each of its writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drivers.sandboxes import Sandboxes, Weakness
from tests.gvisor import needs_gvisor

WRITES = 2000
CODE = (
    f"import os, time\nfor _ in range({WRITES}):\n    os.write(1, b'x')\n    os.write(2, b'y')\n    time.sleep(0.0002)"
)
SECONDS = 0.05
"""For which output is gathered here, so that it makes no difference how busy this machine is."""

AS_IS = Weakness()
SOUND, WEAK = (Weakness(supervisor={"GATHER = 0.002": f"GATHER = {seconds}"}) for seconds in (SECONDS, 0))


@pytest.fixture(params=["bubblewrap", pytest.param("gvisor", marks=needs_gvisor)])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sandboxes(tmp_path: Path, driver: str, request: pytest.FixtureRequest) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path / "own", request.param, driver, self_tested=["python"])
    yield made
    made.stop()


@pytest.mark.parametrize("sandboxes", [SOUND, WEAK], ids=["sound", "weak"], indirect=True)
def test_small_writes_are_gathered(sandboxes: Sandboxes, request: pytest.FixtureRequest) -> None:
    result = sandboxes.run(sandboxes.make(), CODE, timeout=120)
    assert (result.stdout, result.stderr) == ("x" * WRITES, "y" * WRITES)
    gathered = 2 * result.ended.duration / SECONDS + 10  # of each stream one piece in that time
    is_sound = "sound" in request.node.callspec.id
    assert result.pieces <= gathered if is_sound else result.pieces > gathered, (result.pieces, gathered)


@pytest.mark.parametrize("sandboxes", [AS_IS], ids=["as it is"], indirect=True)
def test_what_was_written_just_before_the_end_is_there(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    for end in ("", "import os; os._exit(0)", "import os; os.kill(os.getpid(), 9)"):
        code = f"import sys\nfor n in range(30):\n    print(n, flush=True)\n    print(n, file=sys.stderr)\n{end}"
        result = sandboxes.run(sandbox, code)
        assert result.stdout == result.stderr == "".join(f"{n}\n" for n in range(30))

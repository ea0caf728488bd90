"""What programs write: little at a time wakes nobody with each write, and too much is cut off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from era.drivers import channel
from tests.drivers.sandboxes import LIMITS, Sandboxes, Weakness
from tests.gvisor import needs_gvisor

WRITES = 2000
CODE = (
    f"import os, time\nfor _ in range({WRITES}):\n    os.write(1, b'x')\n    os.write(2, b'y')\n    time.sleep(0.0002)"
)
SECONDS = 0.5
"""For which output is gathered here, so that it makes no difference how busy this machine is."""

AS_IS = Weakness()
SOUND, WEAK = (Weakness(supervisor={"GATHER = 0.002": f"GATHER = {seconds}"}) for seconds in (SECONDS, 0))


@pytest.fixture(params=["bubblewrap", pytest.param("gvisor", marks=needs_gvisor)])
def driver(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def sandboxes(tmp_path: Path, driver: str, request: pytest.FixtureRequest) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path / "own", request.param, driver)
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


UNBOUNDED = Weakness(supervisor={"size > self._room[kind]": "False"})


@pytest.mark.parametrize(
    "sandboxes", [AS_IS, UNBOUNDED], ids=["as it is", "a supervisor without a bound"], indirect=True
)
def test_the_service_holds_a_sandbox_to_the_bound_too(
    sandboxes: Sandboxes, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has taken over a supervisor gets no more output kept than a program."""
    is_bounded = "as it is" in request.node.callspec.id
    most = LIMITS.output_bytes
    code = f"import os\nfor _ in range({4 * most} >> 16): os.write(1, b'x' * 65536)"
    result = sandboxes.run(sandboxes.make(), code)
    assert len(result.stdout) == most
    assert (result.ended.sandbox_alive, result.ended.stdout_truncated) == (is_bounded, is_bounded)
    if not is_bounded:
        monkeypatch.setattr(channel, "_has_room", lambda room, size: True)
        assert len(sandboxes.run(sandboxes.make(), code).stdout) == 4 * most

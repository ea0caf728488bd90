"""What cells and processes try upon the service's helpers in a sandbox. Each attack succeeds against a weakened one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from era.languages import ipython
from tests.drivers import context_steps as steps
from tests.drivers.sandboxes import Sandboxes, Weakness


@contextmanager
def opened(directory: Path, weakness: Weakness) -> Iterator[Sandboxes]:
    sandboxes = Sandboxes(directory, weakness)
    try:
        yield sandboxes
    finally:
        sandboxes.stop()


SECRET = "what another file has"


@pytest.mark.parametrize(
    ("supervisor", "content", "problem"),
    [
        (None, None, "is a symbolic link"),
        ({"STATE_FILE, os.O_RDONLY | os.O_NOFOLLOW": "STATE_FILE, os.O_RDONLY"}, SECRET.encode(), None),
    ],
    ids=["sound", "weakened"],
)
def test_a_link_in_the_place_of_the_state_file_is_not_followed(
    tmp_path: Path, supervisor: dict[str, str] | None, content: bytes | None, problem: str | None
) -> None:
    with opened(tmp_path, Weakness(supervisor=supervisor)) as sandboxes:
        sandbox = sandboxes.make()
        attack = f"echo {SECRET} > /tmp/other; ln -sf /tmp/other .session_data.json"
        read, why, _ = sandboxes.do(sandbox, steps.state_file, [attack])
        assert (read and read.strip(), why) == (content, problem)


@pytest.mark.parametrize(
    ("supervisor", "left"),
    [(None, "None"), ({"os.environ.pop(name, None)": "pass"}, "'canary'")],
    ids=["sound", "weakened"],
)
def test_the_env_of_a_cell_is_not_there_for_the_next(
    tmp_path: Path, supervisor: dict[str, str] | None, left: str
) -> None:
    ipython.prepare()
    with opened(tmp_path, Weakness(supervisor=supervisor)) as sandboxes:
        sandbox = sandboxes.make()
        _, after = sandboxes.do(
            sandbox,
            steps.cells,
            "python",
            [{"code": "1 / 0", "env": {"TOKEN": "canary"}}, "import os\nrepr(os.environ.get('TOKEN'))"],
        )
        assert after.texts == [repr(left)]

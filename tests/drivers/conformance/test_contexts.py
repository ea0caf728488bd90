"""Contexts: interpreters that stay, in the sandboxes of every driver; and the state file beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from era.languages import ipython
from tests.drivers import context_steps as steps
from tests.drivers import process_steps


@pytest.fixture(scope="module", autouse=True)
def _staged() -> None:
    ipython.prepare()


@pytest.fixture
def live(expect_known_failures: None, sandboxes: Any, sandbox: Any) -> Iterator[Any]:
    """A sandbox that may have processes, and has none afterwards."""
    yield sandbox
    sandboxes.do(sandbox, process_steps.end_processes)


def test_a_python_context(sandboxes: Any, live: Any) -> None:
    first, second, shell, magic, error, slow, after = sandboxes.do(
        live,
        steps.cells,
        "python",
        [
            "x = 20\nprint('printed')\nopen('made.txt', 'w').write('made');",
            "x + 1",
            "!echo from a shell; echo wrong >&2",
            "%pwd",
            "1 / 0",
            {"code": "import time\ntime.sleep(60)", "timeout": 1.0},
            {
                "code": "import os\n(x, input(), os.environ.get('A'), os.environ.get('B'))",
                "stdin": "in",
                "env": {"A": "a"},
            },
        ],
    )
    assert (first.output, first.error) == ({"stdout": "printed\n", "stderr": ""}, None)
    assert second.texts == ["21"]
    assert shell.output == {"stdout": "from a shell\n", "stderr": "wrong\n"}
    assert magic.texts == ["'/workspace'"]
    assert (error.error, error.exit_code, error.cause, error.lost) == ("ZeroDivisionError", 1, "exit", None)
    assert (slow.cause, slow.exit_code, slow.error, slow.lost) == ("timeout", 124, "KeyboardInterrupt", None)
    assert after.texts == ["(20, 'in', 'a', None)"]
    assert sandboxes.run(live, "print(open('made.txt').read())").stdout == "made\n"


@pytest.mark.parametrize("language", ["node", "typescript"])
def test_a_node_context(sandboxes: Any, live: Any, language: str) -> None:
    first, second, awaited, error, slow, after = sandboxes.do(
        live,
        steps.cells,
        language,
        [
            "let x = 20; console.log('printed'); console.error('wrong')",
            "x + 1",
            "import { join } from 'node:path'\nawait Promise.resolve(join('a', 'b'))",
            "null.x",
            {"code": "while (true) {}", "timeout": 1.0},
            {"code": "[x, process.env.A, process.env.B]", "env": {"A": "a"}},
        ],
    )
    assert first.output == {"stdout": "printed\n", "stderr": "wrong\n"}
    assert (second.texts, awaited.texts) == (["21"], ["'a/b'"])
    assert (error.error, error.exit_code, error.lost) == ("TypeError", 1, None)
    assert (slow.cause, slow.lost) == ("timeout", None)
    assert after.texts == ["[ 20, 'a', undefined ]"]


def test_packages_of_contexts_are_for_contexts(sandboxes: Any, live: Any) -> None:
    """And can't be changed."""
    result = sandboxes.run(live, "import IPython")
    assert "No module named 'IPython'" in result.stderr
    [answer] = sandboxes.do(
        live,
        steps.cells,
        "python",
        ["import IPython, os\n[os.access(p, os.W_OK) for p in (IPython.__file__, os.path.dirname(IPython.__file__))]"],
    )
    assert answer.texts == ["[False, False]"]


def test_a_run_doesn_t_meet_a_context(sandboxes: Any, live: Any) -> None:
    [answer] = sandboxes.do(
        live,
        steps.cells,
        "python",
        ["import os\nsorted(open(f'/proc/{p}/comm').read() for p in os.listdir('/proc') if p.isdigit())"],
    )
    assert "python" in answer.texts[0]
    listed = sandboxes.run(live, "import os; print([p for p in os.listdir('/proc') if p.isdigit()])").stdout
    assert len(eval(listed)) <= 3


@pytest.mark.parametrize(
    ("before", "content", "problem"),
    [
        ([], b'{"a": 1}', None),
        (["rm .session_data.json"], None, None),
        (["echo [] > .session_data.json"], b"[]\n", None),
        (["ln -sf /etc/passwd .session_data.json"], None, "is a symbolic link"),
        (["rm .session_data.json; mkfifo .session_data.json"], None, "is a named pipe"),
        (["rm .session_data.json; mkdir -p .session_data.json/deep"], None, "is a directory"),
        (["ln .session_data.json second"], None, "has a second name (a hard link)"),
        (["truncate -s 100M .session_data.json"], None, "is too large: 104857600 bytes, 4194304 allowed"),
        (["chmod 0 .session_data.json; chmod 0 ."], None, "can't be opened: Permission denied"),
        (["kill -9 -1"], b'{"a": 1}', None),
        (["kill -STOP -1"], b'{"a": 1}', None),
    ],
)
def test_the_state_file_whatever_it_has_become(
    sandboxes: Any, live: Any, before: list[str], content: bytes | None, problem: str | None
) -> None:
    assert sandboxes.do(live, steps.state_file, before) == (content, problem, b'{"b": 2}')
    sandboxes.run(live, "import os\nif os.path.exists('second'): os.remove('second')")

"""`era runs` as its users type it."""

from __future__ import annotations

import httpx
import pytest

from tests.client.command import era
from tests.conftest import Server


@pytest.fixture
def session(server: Server) -> str:
    return era(server, "sessions", "create", "python", code=0).stdout.strip()


def run(client: httpx.Client, session: str, **body: object) -> str:
    """Run this by the API; the run's id."""
    answer = client.post(f"/api/sessions/{session}/run", json=body)
    answer.raise_for_status()
    return str(answer.json()["run_id"])


def rows(server: Server, session: str) -> dict[str, str]:
    """What `era runs list` shows of each run, by its id."""
    lines = era(server, "runs", "list", session, code=0).stdout.splitlines()
    return {line.split()[0]: line for line in lines}


def test_list_shows_the_first_line_and_show_the_whole_code(server: Server, client: httpx.Client, session: str) -> None:
    code = "import sys  # süß\nif sys.argv:\n\tprint(1)\n"
    several = run(client, session, code=code, args=["--unit", "two words"])
    one = run(client, session, code="print(2)\n")
    assert rows(server, session)[several].endswith("  import sys  # süß…")
    assert rows(server, session)[one].endswith("  print(2)")
    shown = era(server, "runs", "get", session, several, code=0).stdout
    assert shown.endswith(f"\ncode:\n{code}\nargs:\n--unit 'two words'\n")


def test_list_and_show_have_the_command(server: Server, client: httpx.Client, session: str) -> None:
    line = run(client, session, command="echo one; echo two")
    words = run(client, session, command=["echo", "two words"])
    assert rows(server, session)[line].endswith("  $ echo one; echo two")
    assert rows(server, session)[words].endswith("  $ echo 'two words'")
    assert era(server, "runs", "get", session, words, code=0).stdout.endswith("\ncommand:\necho 'two words'\n")


def test_code_controls_no_terminal(server: Server, client: httpx.Client, session: str) -> None:
    hostile = run(client, session, code="# \x1b]0;pwned\x07 safe\u202egpj.exe\r\npass  # \x1b[2J\x9b1m\r over")
    listed = rows(server, session)[hostile]
    shown = era(server, "runs", "get", session, hostile, code=0).stdout
    assert "# \ufffd]0;pwned\ufffd safe\ufffdgpj.exe…" in listed
    assert shown.endswith("\n# \ufffd]0;pwned\ufffd safe\ufffdgpj.exe\npass  # \ufffd[2J\ufffd1m\ufffd over\n")
    for text in (listed, shown):
        assert not set(text) & {"\x1b", "\x07", "\x9b", "\r", "\u202e"}


def test_show_says_that_code_was_cut(server: Server, client: httpx.Client, session: str) -> None:
    long = run(client, session, code="pass  # " + "x" * 70_000)
    assert rows(server, session)[long].endswith("pass  # " + "x" * 52 + "…")
    done = era(server, "runs", "get", session, long, code=0)
    assert len(done.stdout) > 60_000
    assert done.stderr == "era: the record keeps only the beginning of this\n"


def test_no_record_code_leaves_the_code_out(server: Server, session: str) -> None:
    for words in (
        ("run", "--no-record-code", "-s", session, "-"),
        ("exec", session, "--no-record-code", "echo secret"),
    ):
        era(server, *words, stdin="print('secret')", code=0)
        newest = era(server, "runs", "list", session, "-n", "1", code=0).stdout
        assert "secret" not in newest
        shown = era(server, "runs", "get", session, newest.split()[0], code=0).stdout
        assert "secret" not in shown
        assert "code:" not in shown
        assert "command:" not in shown


@pytest.mark.parametrize(
    "words",
    [("run", "--no-record-code", "--once", "-l", "py", "-"), ("exec", "app", "--no-record-code", "--process", "true")],
)
def test_no_record_code_without_a_run_of_a_session_is_refused(server: Server, words: tuple[str, ...]) -> None:
    assert "--no-record-code is" in era(server, *words, stdin="1", code=2).stderr

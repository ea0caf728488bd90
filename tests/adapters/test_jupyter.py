"""Jupyter's own client drives a kernel whose cells run in a real session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ipykernel", reason="needs ipykernel, which scripts/setup --test installs where it can")

from jupyter_client.manager import KernelManager

from era import Era
from era.adapters.jupyter import EraKernel
from era.common.run_notes import GAP
from era.sdk.answers import RunResult
from era.sdk.events import Gap, Stderr, Stdout
from tests.adapters.answers import CUT_OFF, NOTES
from tests.conftest import Server
from tests.documents import FRAMEWORKS

PATIENCE = 120.0


class Notebook:
    """A kernel and its client."""

    def __init__(self, environment: dict[str, str], manager: Any, client: Any) -> None:
        self.environment = environment
        self.manager = manager
        self.client = client

    def run(self, code: str, *, when_busy: Any = None) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
        """Run a cell: its reply, and what was published of it. `when_busy` is called once it has printed something."""
        sent = self.client.execute(code)
        published = []
        while True:
            message = self.client.get_iopub_msg(timeout=PATIENCE)
            if message["parent_header"].get("msg_id") != sent:
                continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
            published.append((message["msg_type"], message["content"]))
            if when_busy and message["msg_type"] == "stream":
                when_busy()
                when_busy = None
        reply = self.client.get_shell_msg(timeout=PATIENCE)
        while reply["parent_header"]["msg_id"] != sent:  # those to questions that were asked while it started
            reply = self.client.get_shell_msg(timeout=PATIENCE)
        return reply["content"], [
            (kind, content) for kind, content in published if kind not in ("status", "execute_input")
        ]


@pytest.fixture(scope="module")
def notebook(shared_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """One kernel for all tests, installed as users do it, with a session that has a name."""
    prefix = tmp_path_factory.mktemp("jupyter")
    environment = os.environ | {"ERA_URL": shared_server.url, "PYTHONPATH": str(FRAMEWORKS), "HOME": str(prefix)}
    environment |= {"JUPYTER_PATH": str(prefix / "share" / "jupyter"), "JUPYTER_RUNTIME_DIR": str(prefix / "runtime")}
    command = [sys.executable, "-m", "era.adapters.jupyter", "install", "--session", "desk", "--prefix", str(prefix)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", environment["JUPYTER_PATH"])
        patch.setenv("JUPYTER_RUNTIME_DIR", environment["JUPYTER_RUNTIME_DIR"])
        manager = KernelManager(kernel_name="era")
        manager.start_kernel(env=environment, stderr=subprocess.DEVNULL)
        client = manager.blocking_client()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=PATIENCE)
            yield Notebook(environment, manager, client)
        finally:
            client.stop_channels()
            manager.shutdown_kernel()
            manager.context.destroy(linger=0)
            with Era(shared_server.url) as era:
                era.sessions.delete("desk", purge=True)


def test_cells_sent_at_once_to_a_kernel_that_starts_all_run_and_one_that_was_killed_leaves_nothing(
    notebook: Notebook, shared_server: Server
) -> None:
    """Nobody waits for the kernel or for the cell before: at its first start, and where it stands in for one that was
    killed."""
    with Era(shared_server.url) as era:
        desk = era.sessions.get_or_create("python", "desk")
        before = len(desk.contexts())
        manager = KernelManager(kernel_name="era")
        manager.start_kernel(env=notebook.environment, stderr=subprocess.DEVNULL)
        client = manager.blocking_client()
        client.start_channels()
        try:
            for _ in range(2):
                sent = [client.execute(code) for code in ("import time; time.sleep(0.2); n = 6", "n", "n += 1")]
                replies: list[str] = []
                while len(replies) < len(sent):
                    message = client.get_shell_msg(timeout=PATIENCE)
                    if message["parent_header"]["msg_id"] in sent:
                        replies.append(message["content"]["status"])
                assert replies == ["ok"] * len(sent)
                manager.restart_kernel(now=True)
            assert len(desk.contexts()) == before + 1, "the second took the place of the one that was killed"
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=True)


def test_a_kernel_that_is_restarted_has_its_files_and_one_that_is_shut_down_leaves_none(
    notebook: Notebook, shared_server: Server
) -> None:
    """With a session of its own. Its variables are gone, and a restart without a cell behind it makes no difference."""
    place = Path(notebook.environment["JUPYTER_PATH"]) / "kernels" / "era" / "kernel.json"
    specification = json.loads(place.read_text())
    specification["env"]["ERA_JUPYTER_SESSION"] = ""
    own = place.parent.parent / "own"
    own.mkdir()
    (own / "kernel.json").write_text(json.dumps(specification))
    manager = KernelManager(kernel_name="own")
    manager.start_kernel(env=notebook.environment, stderr=subprocess.DEVNULL)
    client = manager.blocking_client()
    client.start_channels()
    alone = Notebook(notebook.environment, manager, client)
    with Era(shared_server.url) as era:
        before = {info.id for info in era.sessions.infos()}
        try:
            assert alone.run("n = 1; open('kept', 'w').write('here')")[0]["status"] == "ok"
            (made,) = {info.id for info in era.sessions.infos()} - before
            manager.restart_kernel()
            assert alone.run("assert open('kept').read() == 'here'")[0]["status"] == "ok"
            assert alone.run("n")[0]["ename"] == "NameError"
            manager.restart_kernel(now=True)
            assert alone.run("assert open('kept').read() == 'here'")[0]["status"] == "ok"
            assert len(era.sessions.get(made).contexts()) == 1
            manager.restart_kernel()
            assert {info.id for info in era.sessions.infos()} - before == {made}
            client.wait_for_ready(timeout=PATIENCE)
        finally:
            client.stop_channels()
            manager.shutdown_kernel()
        assert {info.id for info in era.sessions.infos()} == before


def test_cells_share_variables_and_show_things(notebook: Notebook, shared_server: Server) -> None:
    reply, published = notebook.run("import os\nn = 6\nopen('kept', 'w').write('here')\nprint('out')")
    assert reply["status"] == "ok"
    assert {(kind, content["name"]) for kind, content in published} == {("stream", "stdout")}
    assert "".join(content["text"] for _, content in published) == "out\n"
    reply, published = notebook.run("display({'a': 1})\nn * 7")
    assert [(kind, content["data"]["text/plain"]) for kind, content in published] == [
        ("display_data", "{'a': 1}"),
        ("execute_result", "42"),
    ]
    with Era(shared_server.url) as era:
        assert era.sessions.get("desk").files.text("kept") == "here"


def test_an_error_is_one(notebook: Notebook) -> None:
    reply, published = notebook.run("1/0")
    assert (reply["status"], reply["ename"], reply["evalue"]) == ("error", "ZeroDivisionError", "division by zero")
    [(kind, error)] = published
    assert kind == "error"
    assert "Cell In[" in error["traceback"][2]
    assert error["traceback"][-1] == "ZeroDivisionError: division by zero"


def test_an_error_in_a_damaged_context_is_shown_once_beside_the_note(notebook: Notebook) -> None:
    try:
        _, published = notebook.run("import sys; sys.stdout = type('Mute', (), {'write': lambda *_: 0})(); 1 / 0")
        assert [kind for kind, _ in published] == ["stream", "error"]
        assert published[0][1]["text"].startswith("era: this context is damaged: sys.stdout can't be written to.")
    finally:
        notebook.run("sys.stdout = sys.__stdout__")


def test_messages_are_in_the_order_of_the_writes(notebook: Notebook) -> None:
    code = """
import sys, traceback
from IPython.display import clear_output
print('a', end=''); handle = display('b', display_id='one'); sys.stderr.write('c'); handle.update('d')
clear_output(wait=True)
try: 1 / 0
except ZeroDivisionError: traceback.print_exc()
'e'
"""
    reply, published = notebook.run(code)
    assert reply["status"] == "ok"
    kinds = [kind for kind, _ in published]
    assert [kind for kind in kinds if kind != "stream"] == [
        "display_data", "update_display_data", "clear_output", "execute_result",
    ]  # fmt: skip
    assert kinds[:2] == ["stream", "display_data"]
    assert [content["transient"]["display_id"] for _, content in published if content.get("transient")] == ["one"] * 2
    errors = [content["text"] for kind, content in published if kind == "stream" and content["name"] == "stderr"]
    assert "".join(errors).startswith("cTraceback (most recent call last)"), (
        "one that is no error of the cell's is kept"
    )


def _ask(notebook: Notebook, sent: str) -> dict[str, Any]:
    """The content of the reply to a request."""
    reply = notebook.client.get_shell_msg(timeout=PATIENCE)
    while reply["parent_header"]["msg_id"] != sent:
        reply = notebook.client.get_shell_msg(timeout=PATIENCE)
    content: dict[str, Any] = reply["content"]
    return content


def test_completion_and_inspection_leave_no_history_or_record(notebook: Notebook, shared_server: Server) -> None:
    """Neither in IPython's history nor in the numbers of cells."""
    notebook.run("import io, sys; sys.stdout = io.StringIO(); some_name = [1]")
    try:
        code = "1\nprint(some_n)"
        reply = _ask(notebook, notebook.client.complete(code, code.index(")")))
        start, end = reply["cursor_start"], reply["cursor_end"]
        assert (reply["status"], reply["matches"], code[start:end]) == ("ok", ["some_name"], "some_n")
        reply = _ask(notebook, notebook.client.inspect("len(some_name)", 9))
        assert (reply["status"], reply["found"], list(reply["data"])) == ("ok", True, ["text/plain"])
        assert "[1]" in reply["data"]["text/plain"]
        reply = _ask(notebook, notebook.client.inspect("no_such_name"))
        assert (reply["status"], reply["found"], reply["data"]) == ("ok", False, {})
    finally:
        notebook.run("sys.stdout = sys.__stdout__")
    with Era(shared_server.url) as era:
        numbers = [context.execution_count for context in era.sessions.get("desk").contexts()]
        asked = era.sessions.get("desk").runs.list(4)[1:]  # the newest is that of the cell that gave stdout back
        assert [record.code for record in asked] == [None, None, None], "what somebody is typing is on no record"
        _, published = notebook.run("(_ii[:10], In[-3][:10], [name for name in dir() if 'query' in name])")
        assert published[-1][1]["data"]["text/plain"] == "('import io,', 'import io,', [])"
        assert max(context.execution_count for context in era.sessions.get("desk").contexts()) == max(numbers) + 1


def test_next_cell_reports_variables_that_inspection_found_lost(notebook: Notebook) -> None:
    notebook.run("import os; os._exit(3)")
    assert _ask(notebook, notebook.client.inspect("len"))["found"]
    _, published = notebook.run("1")
    [note] = [content["text"] for kind, content in published if kind == "stream"]
    assert "variables of earlier cells are gone" in note
    assert [kind for kind, _ in notebook.run("1")[1]] == ["execute_result"]


def test_history_by_last_cells_range_and_pattern(notebook: Notebook) -> None:
    first = notebook.run("a = 1")[0]["execution_count"]
    for code in ("b = 2", "a = 1"):
        notebook.run(code)

    def history(access: str, **fields: Any) -> Any:
        return _ask(notebook, notebook.client.history(hist_access_type=access, **fields))["history"]

    assert history("tail", n=2) == [[1, first + 1, "b = 2"], [1, first + 2, "a = 1"]]
    assert history("tail", n=1, output=True) == [[1, first + 2, ["a = 1", None]]]
    assert history("range", session=0, start=first, stop=first + 1) == [[1, first, "a = 1"]]
    assert history("range", session=-1, start=first, stop=first + 1) == []
    assert history("search", pattern="a = ?") == [[1, first, "a = 1"], [1, first + 2, "a = 1"]]
    assert history("search", pattern="? = ?", unique=True, n=5) == [[1, first + 1, "b = 2"], [1, first + 2, "a = 1"]]


def test_is_complete_answers_as_ipython_does(notebook: Notebook) -> None:
    notebook.run("pass")  # makes the session, which the fixture deletes
    for code, answer in [
        ("x = 1", {"status": "complete"}),
        ("%time x", {"status": "complete"}),
        ("for i in range(3):", {"status": "incomplete", "indent": "    "}),
        ("x = (1,", {"status": "incomplete", "indent": ""}),
        ("x = )", {"status": "invalid"}),
    ]:
        assert _ask(notebook, notebook.client.is_complete(code)) == answer, code


def test_a_cell_is_interrupted_and_variables_stay(notebook: Notebook) -> None:
    notebook.run("kept = 'still here'")
    endless = "import time\nprint('begun', flush=True)\nwhile True: time.sleep(0.1)"
    reply, _ = notebook.run(endless, when_busy=notebook.manager.interrupt_kernel)
    assert (reply["status"], reply["ename"]) == ("error", "KeyboardInterrupt")
    _, published = notebook.run("kept")
    assert published[-1][1]["data"]["text/plain"] == "'still here'"


class Stream(list[Any]):
    """The events of a cell, and its result."""

    result = RunResult(CUT_OFF)


class Alone(EraKernel):
    """A kernel without a client, a server and a context. Its cells all write the same."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self._held_notes = []

    def _context(self) -> Any:
        events = Stream([Stdout({"content": "out\n"}), Gap({"from": 2, "to": 3}), Stderr({"content": "err\n"})])
        self._timeout = 1.0
        return SimpleNamespace(stream=lambda code, timeout: events)

    def send_response(self, _: Any, kind: str, content: dict[str, Any], *more: Any) -> None:
        assert kind == "stream"
        self.told.append((content["name"], content["text"]))


def test_what_is_missing_is_said() -> None:
    kernel = Alone()
    assert kernel._execute("1", silent=True)["status"] == "ok"
    assert kernel.told == []
    assert kernel._execute("1", silent=False)["status"] == "ok"
    gap, *notes = (("stderr", f"{line}\n") for line in (GAP, *NOTES))
    assert kernel.told == [("stdout", "out\n"), gap, ("stderr", "err\n"), *notes]

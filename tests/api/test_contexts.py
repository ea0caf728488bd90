"""Contexts over HTTP: interpreters that stay, and that every promise of a run holds for runs in them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.event_streams import event_data
from tests.api.setups import make as make_with_setup
from tests.api.setups import settled
from tests.conftest import MakeServer, MakeSession, eventually
from tests.table import table

type Cell = Callable[..., dict[str, Any]]

CELL_KEYS = {"context", "results", "results_truncated", "error", "execution_count", "memory"}
KEPT = {"kept": True, "reason": None}
PNG = "iVBORw0KGgo"


@pytest.fixture
def cell(client: httpx.Client) -> Cell:
    """Runs code in a context; returns the answer."""

    def run(where: str, code: str | None, context: str = "main", **fields: Any) -> dict[str, Any]:
        body = {"context": context, **({} if code is None else {"code": code}), **fields}
        answer = client.post(f"/api/sessions/{where}/run", json=body)
        assert answer.status_code == 200, answer.text
        shown: dict[str, Any] = answer.json()
        assert shown.keys() >= CELL_KEYS
        return shown

    return run


def text(answer: dict[str, Any]) -> str:
    """The text of the main result."""
    [shown] = [result["data"]["text/plain"] for result in answer["results"] if result["main"]]
    return str(shown)


# -- as in any run ----------------------------------------------------------------------------------------------------


def test_variables_files_and_data_are_there_for_the_next_cell(
    client: httpx.Client, session: MakeSession, cell: Cell
) -> None:
    where = session(data={"n": 1})
    first = cell(where, "x = 41\nopen('f.txt', 'w').write('from a cell')\nprint('out')")
    assert (first["status"], first["exit_code"], first["stdout"]) == ("ok", 0, "out\n")
    assert (first["context"], first["execution_count"], first["memory"], first["error"]) == ("main", 1, KEPT, None)
    assert first["state"]["committed"] is True
    second = cell(where, "import json\ndata = json.load(open('.session_data.json'))\ndata['n'] += 1\n"
                         "json.dump(data, open('.session_data.json', 'w'))\nx + data['n']")  # fmt: skip
    assert text(second) == "43"
    assert second["data"] == {"n": 2}
    assert second["state"]["version"] == first["state"]["version"] + 1
    assert client.get(f"/api/sessions/{where}/files/f.txt").text == "from a cell"
    run = client.post(f"/api/sessions/{where}/run", json={"code": "print(open('f.txt').read())"}).json()
    assert run["stdout"] == "from a cell\n"
    assert "results" not in run
    third = cell(where, "x")
    assert (text(third), third["memory"]) == ("41", KEPT)
    assert third["state"]["version"] == second["state"]["version"]  # a cell that changes nothing makes no version


def test_env_and_secrets_are_for_one_cell(session: MakeSession, cell: Cell) -> None:
    where = session()
    code = "import os\n(os.environ.get('TOKEN'), os.environ['ERA_SESSION_ID'], os.environ.get('KEY', '')[:4])"
    secrets = {"KEY": {"value": "never shown", "hosts": ["api.example.com"]}}
    shown = text(cell(where, code, env={"TOKEN": "t", "ERA_SESSION_ID": "forged"}, secrets=secrets))
    assert shown.startswith(f"('t', '{where}', '")
    assert "neve" not in shown
    assert text(cell(where, code)) == f"(None, '{where}', '')"


def test_an_error_is_the_cell_s_and_the_context_stays(session: MakeSession, cell: Cell) -> None:
    where = session()
    answer = cell(where, "x = 1\n1 / 0")
    assert (answer["status"], answer["exit_code"], answer["memory"]) == ("failed", 1, KEPT)
    assert (answer["error"]["name"], answer["error"]["value"]) == ("ZeroDivisionError", "division by zero")
    assert answer["error"]["traceback"] in answer["stderr"]
    assert answer["state"]["committed"] is True
    assert text(cell(where, "x")) == "1"


def test_a_stream_has_events_as_they_come_and_results_at_the_end(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    body = {"code": "print('one\\n', end='')\ndisplay('shown')\n2", "context": "main"}  # one write
    with client.stream("POST", f"/api/sessions/{where}/stream", json=body) as answer:
        events = list(event_data(answer))
    assert [event["type"] for event in events] == ["stdout", "display", "result", "done"]
    assert events[0]["content"] == "one\n"
    assert [event["data"]["text/plain"] for event in events[1:3]] == ["'shown'", "2"]
    assert [result["data"]["text/plain"] for result in events[-1]["results"]] == ["'shown'", "2"]


def test_a_background_run_is_followed_and_stopped(client: httpx.Client, session: MakeSession, cell: Cell) -> None:
    where = session()
    cell(where, "x = 1")
    begun = client.post(
        f"/api/sessions/{where}/run",
        json={"code": "import time\nprint('begun')\ntime.sleep(600)", "context": "main", "background": True},
    )
    assert begun.status_code == 202
    url = f"/api/sessions/{where}/runs/{begun.json()['run_id']}"
    assert eventually(lambda: client.get(f"{url}/stdout").text == "begun\n")
    [listed] = client.get(f"/api/sessions/{where}/contexts").json()["contexts"]
    assert (listed["name"], listed["status"], listed["language"]) == ("main", "busy", "python")
    stopped = client.delete(url).json()
    assert (stopped["status"], stopped["exit_code"]) == ("killed", 130)
    record = client.get(url).json()
    assert record["error"]["name"] == "KeyboardInterrupt"
    assert record["memory"] == KEPT
    assert text(cell(where, "x")) == "1"


# -- contexts ---------------------------------------------------------------------------------------------------------


def test_contexts_of_a_session_are_apart(client: httpx.Client, session: MakeSession, cell: Cell) -> None:
    where = session()
    assert client.get(f"/api/sessions/{where}/contexts").json() == {"contexts": [], "count": 0}
    cell(where, "x = 'a'", "a")
    cell(where, "x = 'b'", "b")
    assert (text(cell(where, "x", "a")), text(cell(where, "x", "b"))) == ("'a'", "'b'")
    listed = client.get(f"/api/sessions/{where}/contexts").json()
    assert [(one["name"], one["execution_count"], one["status"]) for one in listed["contexts"]] == [
        ("a", 2, "idle"),
        ("b", 2, "idle"),
    ]
    assert listed["contexts"][0]["memory_bytes"] > 1 << 20
    assert listed["contexts"][0]["kernel"].startswith("IPython ")


def test_interrupt_restart_and_delete(client: httpx.Client, session: MakeSession, cell: Cell) -> None:
    where = session()
    url = f"/api/sessions/{where}/contexts/main"
    cell(where, "x = 1")
    assert client.post(f"{url}/interrupt").json() == {"success": True, "name": "main", "interrupted": False}
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(cell(where, "import time\nx = 2\ntime.sleep(600)")))
    thread.start()
    assert eventually(lambda: client.post(f"{url}/interrupt").json()["interrupted"])
    thread.join()
    assert (answers[0]["status"], answers[0]["exit_code"], answers[0]["memory"]) == ("killed", 130, KEPT)
    restarted = client.post(f"{url}/restart").json()
    assert (restarted["name"], restarted["execution_count"]) == ("main", 0)
    answer = cell(where, "'x' in globals()")
    assert text(answer) == "False"
    assert answer["memory"] == {"kept": False, "reason": "It was restarted on request."}
    assert cell(where, "1")["memory"] == KEPT
    assert client.delete(url).json() == {"success": True, "name": "main"}
    assert client.delete(url).status_code == 404
    assert cell(where, "1")["memory"] == KEPT  # a new one, which never had any variables


@pytest.mark.parametrize(
    ("code", "status", "exit_code", "reason"),
    [
        ("import os; os._exit(7)", "failed", 7, "The program ended the interpreter with exit code 7."),
        ("import os; os.kill(os.getpid(), 9)", "killed", 137, "Its interpreter was killed by signal 9."),
        (
            "import gc, socket, time\n"
            "next(o for o in gc.get_objects() if isinstance(o, socket.socket)).send(b'rubbish')\ntime.sleep(60)",
            "killed",
            137,
            "It was killed, since its interpreter wrote what is no message to the service.",
        ),
        pytest.param(
            "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)",
            "timeout",
            124,
            "It was killed, since a cell went on after its timeout.",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_an_interpreter_that_is_lost_takes_no_files_with_it(
    client: httpx.Client, session: MakeSession, cell: Cell, code: str, status: str, exit_code: int, reason: str
) -> None:
    where = session()
    answer = cell(where, f"open('kept.txt', 'w').write('kept');\n{code}", timeout=5 if status == "timeout" else 60)
    assert (answer["status"], answer["exit_code"]) == (status, exit_code)
    anew = "The next run in the context starts a new interpreter."
    assert answer["memory"] == {"kept": False, "reason": f"{reason} {anew}"}
    assert answer["state"]["committed"] is True
    assert client.get(f"/api/sessions/{where}/files/kept.txt").text == "kept"
    following = cell(where, "open('kept.txt').read()")
    assert (text(following), following["memory"]) == ("'kept'", {"kept": False, "reason": reason})
    assert cell(where, "1")["memory"] == KEPT


@table(
    "fields, status, code",
    [
        ({"context": "a b"}, 400, "invalid_field"),
        ({"context": ".."}, 400, "invalid_field"),
        ({"context": ""}, 400, "invalid_field"),
        ({"context": "a" * 65}, 400, "invalid_field"),
        ({"context": 1}, 400, "invalid_field"),
        ({"args": ["a"]}, 400, "invalid_field"),
        ({"atomic": True}, 400, "invalid_field"),
    ],
)
def test_what_a_cell_can_t_have_is_refused(
    client: httpx.Client, session: MakeSession, fields: dict[str, Any], status: int, code: str
) -> None:
    where = session()
    answer = client.post(f"/api/sessions/{where}/run", json={"code": "1", "context": "main", **fields})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert client.get(f"/api/sessions/{where}/runs").json()["count"] == 0


def test_languages_without_contexts_say_which_have_them(client: httpx.Client, session: MakeSession) -> None:
    where = session("deno")
    answer = client.post(f"/api/sessions/{where}/run", json={"code": "1", "context": "main"})
    assert (answer.status_code, answer.json()["code"]) == (400, "no_contexts")
    assert "python" in answer.json()["hint"]
    assert client.get(f"/api/sessions/{where}/runs").json()["count"] == 0


def test_unknown_contexts_are_404(client: httpx.Client, session: MakeSession) -> None:
    where = session()
    for method, path in (("POST", "none/interrupt"), ("POST", "none/restart"), ("DELETE", "none"), ("DELETE", "a%20b")):
        answer = client.request(method, f"/api/sessions/{where}/contexts/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "no_such_context")
    assert client.get("/api/sessions/nosuch/contexts").status_code == 404


def test_a_refused_cell_disturbs_nothing(client: httpx.Client, session: MakeSession, cell: Cell) -> None:
    where = session("node", limits={"memory_mb": 2048, "pids": 512})
    process = client.post(f"/api/sessions/{where}/processes", json={"command": "sleep 600"}).json()["process_id"]
    cell(where, "x = 41", "c0")
    for number in range(1, 16):
        cell(where, "1", f"c{number}")
    body, key = {"code": "1", "context": "more"}, {"Idempotency-Key": "more"}
    refused = client.post(f"/api/sessions/{where}/run", json=body, headers=key)
    assert (refused.status_code, refused.json()["code"]) == (409, "too_many_contexts")
    assert client.get(f"/api/sessions/{where}/processes/{process}").json()["status"] == "running"
    assert client.get(f"/api/sessions/{where}/contexts").json()["count"] == 16
    answer = cell(where, "x + 1", "c0")
    assert (text(answer), answer["memory"]) == ("42", KEPT)
    # Nothing was executed, so the key is as good as new.
    client.delete(f"/api/sessions/{where}/contexts/c1")
    again = client.post(f"/api/sessions/{where}/run", json=body, headers=key)
    assert (again.status_code, again.json()["status"]) == (200, "ok"), again.text


def test_node_and_typescript(session: MakeSession, cell: Cell) -> None:
    where = session("node")
    cell(where, "const fs = require('node:fs'); let x = 20")
    answer = cell(where, "import { join } from 'node:path'\nfs.writeFileSync('f.txt', join('a', 'b')); x + 1")
    assert (text(answer), answer["memory"], answer["execution_count"]) == ("21", KEPT, 2)
    code = "fs.readFileSync(0, 'utf8') + fs.readdirSync('/tmp')"
    assert [text(cell(where, code, stdin=given)) for given in ("in", "")] == ["'in'", "''"]
    answer = cell(where, "while (true) {}", timeout=1)
    assert (answer["status"], answer["memory"]) == ("timeout", KEPT)
    assert text(cell(where, "x")) == "20"
    where = session("typescript")
    assert text(cell(where, "enum E { A = 5 }\nconst value: number = E.A; value")) == "5"
    assert text(cell(where, "await Promise.resolve<number>(value + 1)")) == "6"


def test_a_cell_reaches_nothing_of_another_session(session: MakeSession, cell: Cell) -> None:
    """Nothing that a kernel says names a session: what it forges is its own."""
    mine, other = session(data={"mine": 1}), session(data={"other": 1})
    cell(other, "x = 'other'")
    forged = json.dumps({"error": None, "exit_code": 0, "execution_count": 9, "marked": [], "session_id": other})
    cell(
        mine,
        "import gc, socket, time\n"
        "s = next(o for o in gc.get_objects() if isinstance(o, socket.socket))\n"
        f"d = {forged.encode()!r}\ns.sendall(b'D' + len(d).to_bytes(4, 'big') + d)\ntime.sleep(0.5)",
    )
    answer = cell(other, "x")
    assert (text(answer), answer["memory"], answer["data"], answer["execution_count"]) == (
        "'other'",
        KEPT,
        {"other": 1},
        2,
    )


# -- a notebook -------------------------------------------------------------------------------------------------------

NOTEBOOK = [
    "import json, math, os\nimport matplotlib.pyplot as plt\nimport pandas as pd",
    "table = pd.DataFrame({'n': range(10)})\ntable['square'] = table.n ** 2\ntable.head(3)",
    "plt.plot(table.n, table.square)\nplt.title('Squares');",
    "table.square.mean()",
    "%time table.sum()",
    "!echo from a shell",
    "%%bash\nprintf 'a,b\\n1,2\\n' > made.csv",
    "pd.read_csv('made.csv')",
    "from IPython.display import Markdown, display\ndisplay(Markdown('**bold**'))",
    "fig, axes = plt.subplots(1, 2)\naxes[0].bar([1, 2], [3, 4]);",
    *(f"values = table.n * {n}\nvalues.max()" for n in range(10)),
    "import asyncio\nawait asyncio.sleep(0, 'awaited')",
    "def area(r):\n    return math.pi * r ** 2",
    "round(area(2), 3)",
    "data = json.load(open('.session_data.json'))\ndata['cells'] = len(In)\n"
    "json.dump(data, open('.session_data.json', 'w'))",
    "table.to_csv('table.csv')",
    "sorted(os.listdir())",
    "table.plot(x='n', y='square');",
    "_",
    "1 / 0",
    "'after the error'",
]


@pytest.mark.soak
def test_a_notebook_interrupted_restarted_and_resumed_after_the_service_was_killed(own_server: MakeServer) -> None:
    """30 cells with plots and tables; matplotlib and pandas are the session's own packages."""
    server = own_server()
    with server.client(timeout=300) as client:
        where = make_with_setup(client, {"pip": ["matplotlib", "pandas"]}, data={"title": "Squares"})
        settled(client, where)

        def cell(code: str, **fields: Any) -> dict[str, Any]:
            answer = client.post(
                f"/api/sessions/{where}/run", json={"code": code, "context": "notebook", "timeout": 120, **fields}
            )
            assert answer.status_code == 200, answer.text
            shown: dict[str, Any] = answer.json()
            return shown

        assert len(NOTEBOOK) == 30
        answers = [cell(code) for code in NOTEBOOK]
        assert [answer["execution_count"] for answer in answers] == list(range(1, 31))
        assert {answer["memory"]["kept"] for answer in answers} == {True}
        failed = [code for code, answer in zip(NOTEBOOK, answers, strict=True) if answer["error"]]
        assert failed == ["1 / 0"], [answer["stderr"] for answer in answers if answer["error"]]
        assert "<table" in answers[1]["results"][0]["data"]["text/html"]
        for plotted in (2, 9, 26):
            [figure] = [result for result in answers[plotted]["results"] if "image/png" in result["data"]]
            assert figure["data"]["image/png"].startswith(PNG)
            assert figure["main"] is False
        assert answers[5]["stdout"] == "from a shell\n"
        assert answers[8]["results"][0]["data"]["text/markdown"] == "**bold**"
        assert answers[23]["data"]["cells"] == 25

        interrupted = cell("import time\ntime.sleep(60)", timeout=1)
        assert (interrupted["status"], interrupted["memory"]["kept"]) == ("timeout", True)
        assert text(cell("len(table)")) == "10"
        client.post(f"/api/sessions/{where}/contexts/notebook/restart")
        again = cell("'table' in globals()")
        assert (text(again), again["memory"]["kept"]) == ("False", False)
        cell(NOTEBOOK[0])
        last = cell("table = pd.read_csv('table.csv')\nopen('last.txt', 'w').write('durable');")
        assert last["state"]["committed"] is True

    server.stop(9)
    server.start()
    with server.client(timeout=300) as client:
        resumed = cell_on(client, where, "(open('last.txt').read(), 'table' in globals())")
        assert text(resumed) == "('durable', False)"
        assert resumed["memory"] == {
            "kept": False,
            "reason": "The service was restarted since, and its interpreter ended with it.",
        }
        assert resumed["data"]["cells"] == 25
        assert text(cell_on(client, where, "import pandas as pd\nlen(pd.read_csv('table.csv'))")) == "10"


def cell_on(client: httpx.Client, where: str, code: str) -> dict[str, Any]:
    answer = client.post(f"/api/sessions/{where}/run", json={"code": code, "context": "notebook", "timeout": 120})
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def test_nothing_of_env_and_secrets_is_stored(own_server: MakeServer, tmp_path: Path) -> None:
    server = own_server()
    with server.client() as client:
        where = client.post("/api/sessions", json={"language": "python"}).json()["id"]
        client.post(
            f"/api/sessions/{where}/run",
            json={"code": "import os; len(os.environ['TOKEN'])", "context": "c", "env": {"TOKEN": "canary-3f1c"}},
        )
        client.post(f"/api/sessions/{where}/stop")
    assert server.stop() == 0
    assert "canary-3f1c" not in server.log
    found = [path for path in server.data_dir.rglob("*") if path.is_file() and b"canary-3f1c" in path.read_bytes()]
    assert found == []


@pytest.mark.parametrize("end", ["stop", "delete"])
def test_the_end_of_the_session_ends_a_cell_once(
    client: httpx.Client, session: MakeSession, cell: Cell, end: str
) -> None:
    where = session()
    cell(where, "x = 1")
    count = "open('count', 'a').write('x')\nprint('begun')\nimport time\ntime.sleep(600)"
    begun = client.post(f"/api/sessions/{where}/run", json={"code": count, "context": "main", "background": True})
    url = f"/api/sessions/{where}/runs/{begun.json()['run_id']}"
    assert eventually(lambda: client.get(f"{url}/stdout").text == "begun\n")
    if end == "delete":
        assert client.delete(f"/api/sessions/{where}").status_code == 200
        return
    assert client.post(f"/api/sessions/{where}/stop").status_code == 200
    record = client.get(url).json()
    assert (record["status"], record["memory"]) == ("killed", {"kept": False, "reason": "The session was stopped."})
    assert client.get(f"/api/sessions/{where}/files/count").text == "x"

"""State in two lines, in each language that has it: `era_state`."""

from __future__ import annotations

from tests.conftest import MakeSession, Run
from tests.table import table

ADD = {
    "python": "from era_state import state\nwith state() as data: data['n'] += 1",
    "node": "const { state } = require('./era_state.js'); state((data) => { data.n += 1; });",
    "typescript": "import { state } from './era_state.js';\nstate((data: { n: number }) => { data.n += 1; });",
    "deno": "import { state } from '/era/lib/era_state.mjs'; state((data: any) => { data.n += 1; });",
}
FAIL = {
    "python": "from era_state import state\nwith state() as data:\n    data['n'] = 9\n    1/0",
    "node": "const { state } = require('./era_state'); state((data) => { data.n = 9; throw 1; });",
    "typescript": "import { state } from './era_state.js';\nstate((data) => { data.n = 9; throw new Error(); });",
    "deno": "import { state } from '/era/lib/era_state.mjs'; state((data: any) => { data.n = 9; throw 1; });",
}


@table("language", ADD)
def test_what_a_block_leaves_is_kept_unless_it_fails(session: MakeSession, run: Run, language: str) -> None:
    id = session(language, data={"n": 1, "name": "süß"})
    done = run(id, ADD[language])
    assert (done["stderr"], done["data"]) == ("", {"n": 2, "name": "süß"})
    done = run(id, FAIL[language])
    assert done["exit_code"] != 0
    assert done["data"] == {"n": 2, "name": "süß"}
    assert run(id, command="ls -A")["stdout"] == ".session_data.json\n"


@table("language", ["python", "deno"])
def test_the_file_is_found_from_any_directory(session: MakeSession, run: Run, language: str) -> None:
    id = session(language, data={"n": 1})
    run(id, command="mkdir -p a/b")
    assert run(id, ADD[language], cwd="a/b")["data"] == {"n": 2}
    assert run(id, command="ls -A a/b; ls -A")["stdout"].splitlines() == [".session_data.json", "a"]


def test_processes_and_threads_lose_nothing(session: MakeSession, run: Run) -> None:
    code = """
import os, threading
from era_state import state

def work():
    for _ in range(25):
        with state() as data:
            data["n"] += 1

for _ in range(3):
    if not os.fork():
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        os._exit(0)
for _ in range(3):
    os.wait()
"""
    assert run(session("python", data={"n": 0}), code)["data"] == {"n": 150}


def test_what_is_no_json_is_refused_where_it_is_written(session: MakeSession, run: Run) -> None:
    id = session("python", data={"n": 1})
    code = """
import era_state
for value in (float("nan"), object(), {1, 2}, "\\ud800"):
    try:
        with era_state.state() as data:
            data["bad"] = value
    except (TypeError, ValueError) as error:
        print(type(error).__name__)
for value in ([], None):
    try:
        era_state.save(value)
    except TypeError as error:
        print(error)
try:
    with era_state.state(), era_state.state():
        pass
except RuntimeError as error:
    print(error)
print(era_state.load())
"""
    lines = run(id, code)["stdout"].splitlines()
    assert lines[:4] == ["ValueError", "TypeError", "TypeError", "UnicodeEncodeError"]
    assert "not list" in lines[4]
    assert "within another" in lines[6]
    assert lines[7] == "{'n': 1}"
    assert run(id, command="ls -A")["stdout"] == ".session_data.json\n"


def test_promises_are_waited_for(session: MakeSession, run: Run) -> None:
    code = """
const { state, load } = require('./era_state.js');
const wait = () => new Promise((resolve) => setTimeout(resolve, 20));
(async () => {
  console.log(await state(async (data) => { await wait(); data.n = 2; return 'done'; }));
  await state(async (data) => { data.n = 3; await wait(); throw new Error(); }).catch(() => {});
  console.log(load());
})();
"""
    assert run(session("node", data={"n": 1}), code)["stdout"] == "done\n{ n: 2 }\n"

"""What a program is, and its state and files."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from era.guest.workspace import STATE_FILE
from tests.conftest import eventually
from tests.drivers.begin_steps import begin_killed, begin_late, never_begin
from tests.drivers.conformance.helpers import says, shared, uid_of

# -- what a program is ----------------------------------------------------------------------------------------------


def test_output_on_both_streams_each_in_order(sandboxes: Any, sandbox: Any) -> None:
    code = "import sys\nfor i in range(200):\n    print('out', i)\n    print('err', i, file=sys.stderr)"
    result = sandboxes.run(sandbox, code)
    assert result.stdout.splitlines() == [f"out {i}" for i in range(200)]
    assert result.stderr.splitlines() == [f"err {i}" for i in range(200)]


@pytest.mark.parametrize(
    ("code", "exit_code", "cause"),
    [
        ("import sys; sys.exit(7)", 7, "exit"),
        ("import os; print('no flush', end=''); os._exit(3)", 3, "exit"),
        ("import os; os.kill(os.getpid(), 9)", 137, "signal"),
        ("import os; os.kill(os.getpid(), 15)", 143, "signal"),
        ("import ctypes; ctypes.string_at(0)", 139, "signal"),
    ],
)
def test_how_it_ended(sandboxes: Any, sandbox: Any, code: str, exit_code: int, cause: str) -> None:
    ended = sandboxes.run(sandbox, code).ended
    assert (ended.exit_code, ended.cause, ended.sandbox_alive) == (exit_code, cause, True)


def test_an_exception_names_the_program_s_file_only(sandboxes: Any, sandbox: Any) -> None:
    result = sandboxes.run(sandbox, "def f():\n    raise ValueError('mine')\nf()\n")
    assert result.ended.exit_code == 1
    lines = result.stderr.splitlines()
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "ValueError: mine")
    files = [line.strip() for line in lines if "File " in line]
    assert len(files) == 2
    assert all("main.py" in line for line in files)


def test_stdin_is_empty(sandboxes: Any, sandbox: Any) -> None:
    assert says(sandboxes, sandbox, "import sys; print(repr(sys.stdin.read()))") == "''\n"


def test_arguments(sandboxes: Any, sandbox: Any) -> None:
    assert says(sandboxes, sandbox, "import sys; print(sys.argv, __name__, __file__.endswith('main.py'))") == (
        "['main.py'] __main__ True\n"
    )


def test_the_working_directory(sandboxes: Any, sandbox: Any) -> None:
    assert says(sandboxes, sandbox, "import os; print(os.getcwd())") == "/workspace\n"


def test_env_is_seen_by_its_own_run_only(sandboxes: Any, sandbox: Any) -> None:
    code = "import os; print(os.environ.get('COLOUR'))"
    assert says(sandboxes, sandbox, code, env={"COLOUR": "grün"}) == "grün\n"
    assert says(sandboxes, sandbox, code) == "None\n"
    assert says(sandboxes, sandbox, code, env={"COLOUR": "red", "PYTHONHASHSEED": "0"}) == "red\n"
    assert says(sandboxes, sandbox, "import os; print(os.environ['HOME'], 'ERA_GUEST' in os.environ)") == "/tmp False\n"


def test_exit_handlers_run_and_files_are_flushed(sandboxes: Any, sandbox: Any) -> None:
    code = "import atexit\natexit.register(print, 'bye')\nf = open('unflushed', 'w')\nf.write('all of it')\nprint('hi')"
    assert says(sandboxes, sandbox, code) == "hi\nbye\n"
    assert (sandbox.workspace / "unflushed").read_text() == "all of it"


def test_unicode(sandboxes: Any, sandbox: Any) -> None:
    code = "open('żółw 🐢', 'w').write('日本'); print('żółw 🐢', open('żółw 🐢').read())"
    assert says(sandboxes, sandbox, code) == "żółw 🐢 日本\n"
    assert (sandbox.workspace / "żółw 🐢").read_text() == "日本"


def test_processes_and_threads(sandboxes: Any, sandbox: Any) -> None:
    code = """
import multiprocessing, os, subprocess, threading
def square(n):
    return n * n
if __name__ == "__main__":
    pid = os.fork()
    if pid == 0:
        os._exit(5)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    done = []
    threads = [threading.Thread(target=done.append, args=(n,)) for n in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    print(sorted(done))
    with multiprocessing.Pool(2) as pool:
        print(pool.map(square, range(4)))
    print(subprocess.run(["sh", "-c", "echo shell"], capture_output=True, text=True).stdout, end="")
"""
    assert says(sandboxes, sandbox, code) == "5\n[0, 1, 2, 3, 4, 5, 6, 7]\n[0, 1, 4, 9]\nshell\n"


def test_devices(sandboxes: Any, sandbox: Any) -> None:
    code = """
import os, subprocess
with open('/dev/null', 'w') as null: null.write('x')
subprocess.run(['true'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
print(len(open('/dev/urandom', 'rb').read(8)), open('/dev/zero', 'rb').read(2), open('/dev/null').read() == '')
try:
    with open('/dev/full', 'w') as full: full.write('x')
except OSError as error: print(error.errno)
print(os.readlink('/dev/fd'), open('/dev/stdin').read() == '')
"""
    assert says(sandboxes, sandbox, code) == "8 b'\\x00\\x00' True\n28\n/proc/self/fd True\n"


def test_sqlite(sandboxes: Any, sandbox: Any) -> None:
    code = """
import sqlite3
db = sqlite3.connect("mine.sqlite")
print(db.execute("PRAGMA journal_mode = wal").fetchone()[0])
db.execute("CREATE TABLE IF NOT EXISTS t (n)")
db.execute("INSERT INTO t VALUES (1)")
db.commit()
print(db.execute("SELECT count(*) FROM t").fetchone()[0])
db.close()
"""
    (sandbox.workspace / "mine.sqlite").unlink(missing_ok=True)
    assert says(sandboxes, sandbox, code) == "wal\n1\n"
    assert says(sandboxes, sandbox, code) == "wal\n2\n"


def test_output_before_an_exit_of_node_s_is_not_cut(sandboxes: Any) -> None:
    result = sandboxes.run(shared(sandboxes, "node"), "console.log('x'.repeat(500000)); process.exit(0)")
    assert len(result.stdout) == 500_001


# -- state and files ------------------------------------------------------------------------------------------------

STATE = "import json, os\npath = '.session_data.json'\n"


def test_the_state_goes_in_and_out(sandboxes: Any, sandbox: Any) -> None:
    code = STATE + "data = json.load(open(path)); data['n'] += 1; json.dump(data, open(path, 'w'))"
    assert json.loads(sandboxes.run(sandbox, code, state=b'{"n": 41}').ended.state) == {"n": 42}
    assert sandboxes.run(sandbox, "pass", state=b'{"as": "it was"}').ended.state == b'{"as": "it was"}'


def test_a_state_that_is_gone(sandboxes: Any, sandbox: Any) -> None:
    ended = sandboxes.run(sandbox, STATE + "os.unlink(path)", state=b'{"n": 1}').ended
    assert (ended.state, ended.state_problem) == (None, None)


@pytest.mark.parametrize("how", ["os.symlink('/etc/passwd', path)", "os.mkfifo(path)", "os.mkdir(path)"])
def test_a_state_that_can_t_be_read(sandboxes: Any, sandbox: Any, how: str) -> None:
    ended = sandboxes.run(sandbox, STATE + f"os.unlink(path); {how}").ended
    assert ended.state is None
    assert ended.state_problem


def test_files_stay_and_the_host_s_are_seen(sandboxes: Any, sandbox: Any) -> None:
    """Between runs the host may write whatever it likes: what the sandbox saw before doesn't count."""
    look = "import os\nprint(sorted(n for n in os.listdir('.') if n[0] == '_'), open('_a').read())"
    first = "open('_a', 'w').write('one'); open('_gone', 'w').close(); os.mkdir('_d')\n"
    assert says(sandboxes, sandbox, "import os\n" + first + look) == "['_a', '_d', '_gone'] one\n"
    assert (sandbox.workspace / "_a").read_text() == "one"
    assert says(sandboxes, sandbox, look) == "['_a', '_d', '_gone'] one\n"

    (sandbox.workspace / "_a").write_text("two, and longer")
    (sandbox.workspace / "_gone").unlink()
    (sandbox.workspace / "_d").rename(sandbox.workspace / "_e")
    (sandbox.workspace / "_new").write_text("new")
    (sandbox.workspace / "_e" / "below").write_text("deep")
    for path in ("_a", "_new", "_e/below"):
        os.chown(sandbox.workspace / path, sandbox.uid if sandbox.uid is not None else uid_of(sandboxes), -1)
    assert says(sandboxes, sandbox, look + "\nprint(open('_new').read(), open('_e/below').read())") == (
        "['_a', '_e', '_new'] two, and longer\nnew deep\n"
    )
    (sandbox.workspace / "_a").write_text("TWO, AND LONGER")  # the same size
    assert says(sandboxes, sandbox, "print(open('_a').read()); open('_a', 'a').write('!')") == "TWO, AND LONGER\n"
    replacement = sandbox.workspace / "_b"
    replacement.write_text("other")
    replacement.rename(sandbox.workspace / "_a")
    assert says(sandboxes, sandbox, "print(open('_a').read())") == "other\n"


def test_files_are_the_sandbox_s_own(sandboxes: Any, sandbox: Any) -> None:
    code = "import os\nopen('mine', 'w').close(); os.chmod('mine', 0o600)\nprint(os.stat('mine').st_uid == os.getuid())"
    assert says(sandboxes, sandbox, code) == "True\n"
    assert (sandbox.workspace / "mine").stat().st_uid == (sandbox.uid if sandbox.uid is not None else uid_of(sandboxes))


def test_files_given_with_a_run(sandboxes: Any, sandbox: Any) -> None:
    assert says(sandboxes, sandbox, "import given.it; print(given.it.x)", files={"given/it.py": b"x = 5"}) == "5\n"


def test_ephemeral_leaves_nothing(sandboxes: Any) -> None:
    sandbox = sandboxes.make()
    sandboxes.run(sandbox, "import os; os.makedirs('a/b'); open('a/b/c', 'w').close()", ephemeral=True)
    assert eventually(lambda: not os.listdir(sandbox.workspace))
    sandboxes.close(sandbox)


# -- when it begins -------------------------------------------------------------------------------------------------


def test_all_is_made_ready_for_a_program_that_may_not_begin_yet(sandboxes: Any, sandbox: Any) -> None:
    code = "import time; print(time.time_ns())"
    written, allowed, ended = sandboxes.do(sandbox, begin_late, code, STATE_FILE)
    assert ended.exit_code == 0
    assert int(written) > allowed


def test_a_run_killed_before_it_begins(sandboxes: Any, sandbox: Any) -> None:
    _, _, ended = sandboxes.do(sandbox, begin_killed, "import time; time.sleep(1000)", STATE_FILE)
    assert (ended.cause, ended.sandbox_alive) == ("killed", True)
    assert says(sandboxes, sandbox, "print(1)") == "1\n"


def test_a_program_that_may_never_begin(sandboxes: Any, sandbox: Any) -> None:
    assert sandboxes.do(sandbox, never_begin, "open('begun', 'w')") == "it may not"
    assert not (sandbox.workspace / "begun").exists()

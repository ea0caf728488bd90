# ruff: noqa: E501  programs are as their users write them
"""Python programs: what they see, print and exit with is what a plain interpreter gives.

The expectation is not written down here: the same file is given to the host's own interpreter, and the two must not
differ.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.plain_interpreter import outcome, python, run_plainly
from tests.conftest import MakeSession, Run
from tests.table import table

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
        print(method, queue.get(timeout=60))
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


@pytest.fixture
def empty_session(session: MakeSession) -> str:
    """A session whose runs find no files of each other, without internet, which may need additional variables."""
    return session(persistent=False, allowInternetAccess=False)


@table("name", PYTHON)
def test_a_python_program_does_what_python_does_with_it(
    empty_session: str, run: Run, host_directory: Path, name: str
) -> None:
    code = PYTHON[name]
    expected = run_plainly([python()], "main.py", code, host_directory)
    assert outcome(run(empty_session, code)) == expected


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


@table(
    "env, code",
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
)
def test_variables_of_python_work(
    session: MakeSession, run: Run, host_directory: Path, env: dict[str, str], code: str
) -> None:
    where = session()
    expected = run_plainly([python()], "main.py", code, host_directory, **env)
    unset = run(where, code)
    answer = run(where, code, env=env)
    assert outcome(answer) == expected
    if "PYTHONPATH" not in env and "LC_ALL" not in env:
        assert outcome(unset) != expected
    assert outcome(run(where, code))[0] == unset["exit_code"]

# ruff: noqa: E501  programs are as their users write them
"""Python programs that leave something behind for the interpreter to finalize, or nothing."""

from __future__ import annotations

LOUD = """
class Loud:
    def __init__(self, name): self.name = name
    def __del__(self): print('gone', self.name, flush=True)
"""
"""Defines a class whose objects say when they go."""

MODULE = f"""
{LOUD}
held = Loud('held by a module')
file = open('of-a-module', 'w')
file.write('not flushed')
"""
"""A module of the session, `kept`."""

QUIET = {
    "nothing": "",
    "print": "print(1)",
    "print without a newline": "print('é', end='')",
    "the state file": """
import json
with open('.session_data.json') as file: data = json.load(file)
data['n'] = 1
with open('.session_data.json', 'w') as file: json.dump(data, file)
print(data)
""",
    "usual modules": "import argparse, asyncio, collections, csv, dataclasses, datetime, decimal, enum, functools, glob, hashlib, http.client, io, itertools, logging, pathlib, random, re, shutil, socket, sqlite3, ssl, statistics, subprocess, tempfile, textwrap, threading, typing, unittest, urllib.request, uuid, zipfile, zoneinfo",
    "classes": "import abc, dataclasses, enum, typing\nclass A(abc.ABC):\n    def f(self): return super()\nclass B(A): pass\n@dataclasses.dataclass\nclass C:\n    x: int = 1\nclass E(enum.Enum): X = 1\nclass N(typing.NamedTuple): x: int\nkept = [B(), C(), E.X, N(1)]; kept.append(kept)",
    "a deleted object": LOUD + "a = Loud('at once'); del a; print('end')",
    "an exception that was handled": "try: 1 / 0\nexcept ZeroDivisionError as error: kept = error\nprint(kept)",
    "exit handlers": """
import atexit
@atexit.register
def first(): print('registered first, called last')
atexit.register(print, 'registered last, called first')
print('end')
""",
    "an exit handler that registers another": "import atexit\natexit.register(lambda: atexit.register(print, 'from within'))\natexit.register(lambda: print('last'))",
    "an exit handler that raises": "import atexit\natexit.register(print, 'the next one')\n@atexit.register\ndef boom(): raise ValueError('at exit')",
    "an exit handler that exits": "import atexit, sys\natexit.register(print, 'the next one')\natexit.register(sys.exit, 3)",
    "an exit handler that ends the process": "import atexit, os\natexit.register(os._exit, 4)\nprint('not flushed')",
    "an exit handler that was removed": "import atexit\natexit.register(print, 'never')\natexit.unregister(print)",
    "an exit handler that reads __file__": "import atexit\n@atexit.register\ndef f(): print(__name__, __file__)",
    "exit handlers run by hand": "import atexit\natexit.register(print, 'once')\natexit._run_exitfuncs()\nprint('end', atexit._ncallbacks())",
    "an exit handler that counts handlers": "import atexit\natexit.register(lambda: print(atexit._ncallbacks()))",
    "an exit handler of threading": "import threading, atexit\natexit.register(print, 'atexit')\nthreading._register_atexit(print, 'threading')",
    "an exit handler that collects garbage": "import atexit, gc\natexit.register(lambda: print(gc.collect() >= 0))",
    "an exit handler that writes a file": "import atexit\natexit.register(lambda: open('late', 'w').write('x'))",
    "a thread that goes on": "import threading, time\ndef late(): time.sleep(0.05); print('late')\nthreading.Thread(target=late).start()\nprint('end')",
    "a thread that registers an exit handler": "import threading, time, atexit\ndef late(): time.sleep(0.05); atexit.register(print, 'from a thread')\nthreading.Thread(target=late).start()",
    "a daemon thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(9), print('never')), daemon=True).start()\nprint('end')",
    "a daemon thread that prints": "import threading, time\ndef spin():\n    while True: time.sleep(0.001)\nthreading.Thread(target=spin, daemon=True).start()\nprint('end')",
    "a thread in C": "import _thread, time\n_thread.start_new_thread(time.sleep, (9,))\nprint('end')",
    "thread locals": "import threading\nlocal = threading.local(); local.x = [1]\nt = threading.Thread(target=lambda: setattr(local, 'x', 2)); t.start(); t.join(); print(local.x)",
    "an executor that was closed": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(2) as pool: print(list(pool.map(str, range(3))))",
    "asyncio.run": "import asyncio\nasync def main():\n    await asyncio.gather(asyncio.sleep(0), asyncio.to_thread(print, 'in a thread'))\n    async with asyncio.TaskGroup() as group: group.create_task(asyncio.sleep(0))\nasyncio.run(main())",
    "weakref.finalize": "import weakref\nclass A: pass\na = A()\nweakref.finalize(a, print, 'finalizer 1')\nweakref.finalize(a, print, 'finalizer 2')",
    "collections of weak references": "import weakref\nclass A: pass\na = A()\nd, e, s = weakref.WeakValueDictionary(a=a), weakref.WeakKeyDictionary({a: 1}), weakref.WeakSet([a])",
    "a temporary directory in a with": "import tempfile, os\nwith tempfile.TemporaryDirectory(dir='.') as d: print(os.path.isdir(d))",
    "logging": "import logging\nlogging.basicConfig(filename='log', level=10)\nlogging.warning('one'); logging.getLogger('a.b').error('two')",
    "logging to stderr": "import logging\nlogging.warning('one'); logging.getLogger('a').addHandler(logging.StreamHandler()); logging.getLogger('a').error('two')",
    "files in memory": "import io\na, b, c = io.StringIO('x'), io.BytesIO(b'x'), io.StringIO(); c.write('y')",
    "a socket that was closed": "import socket\na, b = socket.socketpair(); a.sendall(b'x'); print(b.recv(1)); a.close(); b.close(); del a, b",
    "a program that was waited for": "import subprocess\nprint(subprocess.run(['echo', 'a'], capture_output=True, text=True).stdout)",
    "a forked child": "import os, sys\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nprint('parent' if pid else 'child')",
    "an object held by an exit handler": LOUD + "import atexit\natexit.register(lambda a: None, Loud('in atexit'))",
    "a temporary directory left to weakref.finalize": "import tempfile, os\nd = tempfile.TemporaryDirectory(dir='.'); print(len(os.listdir()))",
    "a database that was closed and forgotten": "import sqlite3\ndb = sqlite3.connect('data.db'); db.execute('CREATE TABLE t (n)'); db.close(); del db",
    "a generator that is done": "g = (x for x in 'ab'); print(list(g)); del g",
    "sys.exitfunc": "import sys\nsys.exitfunc = lambda: print('of Python 2')",
    "faulthandler": "import faulthandler\nfaulthandler.enable()\nprint(1)",
    "a name of ours": "import gc, os\nos._exit = gc.get_objects = lambda *_: print('called')\nprint('end')",
    "builtins replaced": "import builtins\nbuiltins.len = builtins.map = builtins.id = builtins.type = lambda *_: print('called')",
    "modules forgotten": "import sys\nsys.modules.clear()",
    "a recursion at its limit": "import sys\nsys.setrecursionlimit(40)\nprint('end')",
    "many objects": "kept = [{'n': [n]} for n in range(20_000)]; print(len(kept))",
}  # fmt: skip
"""Whose finalizing nobody can notice, after exit handlers and flushing."""

NOTICED = {
    "an object in the globals": LOUD + "a = Loud('global')\nprint('end')",
    "objects in the globals": LOUD + "b = Loud('b'); a = Loud('a'); _c = Loud('_c'); __d = Loud('__d'); e = [Loud('in a list')]\nprint('end')",
    "an object that uses a function": "def say(x): print(x)\nclass A:\n    def __del__(self): say('gone')\na = A()",
    "an object that uses modules": "import os, json\nclass A:\n    def __del__(self): print(os.getcwd() is not None, json.dumps(1))\na = A()",
    "an object that imports": "class A:\n    def __del__(self):\n        try: import string, fractions; print('imported')\n        except BaseException as e: print(type(e).__name__, e)\na = A()\ndef f(): return a",
    "an object that asks what is going on": "import sys\nclass A:\n    def __del__(self): print(sys.is_finalizing(), sys.meta_path is None, sys.path)\na = A()",
    "an object that raises": "class A:\n    def __del__(self): raise ValueError('in __del__')\na = A()",
    "an object that starts a thread": "import threading\nclass A:\n    def __del__(self):\n        try: threading.Thread(target=print).start()\n        except RuntimeError as e: print(e)\na = A()",
    "an object that prints to stderr": "import sys\nclass A:\n    def __del__(self, err=sys.stderr): err.write('gone\\n')\na = A()",
    "an object in a cycle": LOUD + "a = Loud('cycle'); a.self = a",
    "an object in a garbage cycle": LOUD + "a = Loud('garbage cycle'); a.self = a; del a; print('end')",
    "an object in a closure": LOUD + "def make():\n    a = Loud('closure')\n    return lambda: a\nf = make()",
    "an object as a default": LOUD + "def f(a=Loud('default')): pass",
    "an object in a class": LOUD + "class B: a = Loud('class attribute')",
    "an object in a property of a function": LOUD + "def f(): pass\nf.a = Loud('function attribute')",
    "an object on a preloaded module": LOUD + "import json\njson.a = Loud('on json')",
    "an object on another module": LOUD + "import fractions\nfractions.a = Loud('on fractions')",
    "an object in builtins": LOUD + "import builtins\nbuiltins.a = Loud('in builtins')",
    "an object in sys.modules": LOUD + "import sys\nsys.modules['a'] = Loud('as a module')",
    "an object in an exception": LOUD + "def f():\n    a = Loud('in a frame'); 1 / 0\ntry: f()\nexcept ZeroDivisionError as e: kept = e",
    "an object in a cache": LOUD + "import functools\n@functools.lru_cache\ndef f(n): return Loud(f'cached {n}')\nf(1); f(2)",
    "an object in a partial": LOUD + "import functools\np = functools.partial(print, Loud('partial'))",
    "an object of a module": "import kept",
    "an object of a module that is forgotten": "import kept, sys\ndel sys.modules['kept'], kept",
    "an object without a dictionary": "class A:\n    __slots__ = ()\n    def __del__(self): print('gone')\na = A()",
    "an object with slots": "class A:\n    __slots__ = ('x',)\n    def __del__(self): print('gone', self.x)\na = A(); a.x = 1",
    "an object that is a number": "class A(int):\n    def __del__(self): print('gone', int(self))\na = A(3)",
    "an object whose class got a __del__ later": "class A: pass\na = A()\nA.__del__ = lambda self: print('gone')",
    "a class whose metaclass has a __del__": "class M(type):\n    def __del__(cls): print('class gone')\nclass A(metaclass=M): pass",
    "a weak reference with a builtin": "import weakref\nclass A: pass\na = A()\nr = weakref.ref(a, print)",
    "a generator": "def g():\n    try: yield 1\n    finally: print('closed')\ni = g(); next(i)",
    "a generator as a context": "import contextlib\n@contextlib.contextmanager\ndef c():\n    try: yield\n    finally: print('left')\nx = c(); x.__enter__()",
    "a coroutine": "async def c(): pass\nx = c()",
    "a task of a loop left open": "import asyncio\nasync def forever():\n    try: await asyncio.sleep(99)\n    finally: print('cancelled')\nloop = asyncio.new_event_loop(); t = loop.create_task(forever()); loop.run_until_complete(asyncio.sleep(0.01))",
    "a future's exception": "import asyncio\nloop = asyncio.new_event_loop(); f = loop.create_future(); f.set_exception(ValueError('nobody asked'))",
    "two files that aren't flushed": "a = open('a', 'w'); a.write('a'); b = open('b', 'wb'); b.write(b'b')\nprint('end')",
    "two files with one name": "a = open('a', 'w'); b = open('a', 'a'); a.write('first'); b.write('second')",
    "a file without a name": "import tempfile, os\nf = tempfile.NamedTemporaryFile('w', dir='.', delete=False); os.rename(f.name, 'tmp'); f.write('x')",
    "a file that can't be flushed": "f = open('/dev/full', 'w'); f.write('x')\nprint('end')",
    "a file whose descriptor is closed": "import os\nf = open('out', 'w'); f.write('x'); os.close(f.fileno())\nprint('end')",
    "a file with a close of its own": "f = open('out', 'w'); f.close = lambda: print('closing')",
    "a file of a class of its own": "import io\nclass F(io.FileIO):\n    def close(self): print('closing'); super().close()\nf = F('out', 'w')",
    "a file in memory that can't be closed": "import io\nb = io.BytesIO(b'x'); v = b.getbuffer(); b.v = v",
    "a text file over one in memory": "import io\nclass B(io.BytesIO):\n    def close(self): print(self.getvalue()); super().close()\nf = io.TextIOWrapper(B()); f.write('x')",
    "a compressed file": "import gzip\nf = gzip.GzipFile('out.gz', 'w', mtime=0); f.write(b'x' * 100)",
    "an archive": "import zipfile\nz = zipfile.ZipFile('a.zip', 'w'); z.writestr(zipfile.ZipInfo('a'), 'content')",
    "a shelf": "import shelve\ns = shelve.open('shelf'); s['a'] = [1]",
    "a temporary file": "import tempfile, os\nf = tempfile.NamedTemporaryFile(dir='.'); print(len(os.listdir()))",
    "a database left open": "import sqlite3\ndb = sqlite3.connect('data.db'); db.execute('PRAGMA journal_mode=WAL'); db.execute('CREATE TABLE t (n)'); db.execute('INSERT INTO t VALUES (1)'); db.commit()",
    "warnings of what is left open": "import warnings, socket\nwarnings.simplefilter('always')\nf = open('.session_data.json'); s = socket.socket()",
    "warnings as errors": "import warnings, os\nwarnings.simplefilter('error')\nf = open('.session_data.json'); s = os.scandir('/')",
    "stdout written around": "import sys, io\nsys.stdout.write('kept back'); sys.stdout = io.StringIO()",
    "stdout's descriptor closed": "import os\nprint('x', end=''); os.close(1)",
    "stdout's pipe broken": "import os\nr, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)\nprint('x', end='')",
    "stdout full": "import os\nf = os.open('/dev/full', os.O_WRONLY); os.dup2(f, 1)\nprint('x', end='')",
    "stderr full": "import os, sys\nf = os.open('/dev/full', os.O_WRONLY); os.dup2(f, 2)\nsys.stderr.write('x')",
    "stdout detached": "import sys\nkept = sys.stdout.detach(); kept.write(b'x')",
    "C's own buffer": "import ctypes\nlibc = ctypes.CDLL(None); libc.printf(b'by C\\n')\nprint('by Python')",
    "C's own exit handler": "import ctypes, os\nlibc = ctypes.CDLL(None)\n@ctypes.CFUNCTYPE(None)\ndef f(): os.write(1, b'atexit of C\\n')\nlibc.on_exit.argtypes = [ctypes.c_void_p, ctypes.c_void_p]\nlibc.puts(b'buffered')",
    "shared memory": "from multiprocessing import shared_memory\nm = shared_memory.SharedMemory('era-exits', create=True, size=10)",
}  # fmt: skip
"""Whose finalizing can be noticed."""

UNKNOWN = {
    "one file that isn't flushed": "file = open('out', 'w'); file.write('é' * 100)\nprint('end')",
    "one binary file that isn't flushed": "file = open('out', 'wb'); file.write(b'x' * 100)",
    "one file of /dev/stdout": "file = open('/dev/stdout', 'w'); file.write('file\\n')\nprint('print')",
    "one file to be read": "file = open('.session_data.json'); print(file.read())",
    "files to be read": "files = [open('.session_data.json'), open('.session_data.json', 'rb'), open('.session_data.json', 'rb', buffering=0)]",
    "ignored warnings": "import warnings\nwarnings.filterwarnings('ignore')\nfile = open('.session_data.json')",
    "stdout wrapped": "import sys, io\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='latin-1', errors='replace'); print('é☃')",
    "a database that was closed": "import sqlite3\ndb = sqlite3.connect('data.db'); db.execute('PRAGMA journal_mode=WAL'); db.execute('CREATE TABLE t (n)'); db.commit(); db.close()",
    "an object in sys": LOUD + "import sys\nsys.a = Loud('in sys')",
    "an object in a context variable": LOUD + "import contextvars\nvar = contextvars.ContextVar('v'); var.set(Loud('context variable'))",
    "an object held by a daemon thread": LOUD + "import threading, time\ndef f(a): time.sleep(9)\nthreading.Thread(target=f, args=(Loud('in a thread'),), daemon=True).start()\ntime.sleep(0.05)\nkept = Loud('kept')",
    "an object of the collector": LOUD + "import gc\na = Loud('frozen'); gc.freeze()",
    "an object, collection off": LOUD + "import gc\ngc.disable()\na = Loud('not collected'); a.a = a",
    "a weak reference": "import weakref\nclass A: pass\na = A()\nr = weakref.ref(a, lambda r: print('callback'))",
    "weak references": "import weakref\nclass A: pass\na = A()\nr = [weakref.ref(a, lambda r, n=n: print('callback', n)) for n in range(3)]",
    "a proxy": "import weakref\nclass A: pass\na = A()\nr = weakref.proxy(a, lambda r: print('callback'))",
    "an asynchronous generator": "import asyncio\nasync def g():\n    try: yield 1\n    finally: print('closed')\nasync def main():\n    global i\n    i = g(); await anext(i)\nasyncio.run(main())\nj = g()",
    "stdout replaced": "import sys, io\nclass Out(io.StringIO):\n    def flush(self): sys.__stdout__.write('flushed\\n')\nsys.stdout = Out()",
    "stdout closed": "import os, sys\nprint('x', end=''); sys.stdout.close()",
    "stdout with a flush of its own": "import sys\nflush = sys.stdout.flush\nsys.stdout.flush = lambda: (flush(), sys.stderr.write('flushed\\n'))",
    "hooks of the collector": "import gc\ngc.callbacks.append(lambda phase, info: print(phase, flush=True))",
    "messages of the collector": "import gc\ngc.set_debug(gc.DEBUG_SAVEALL)\na = []; a.append(a); del a",
    "a hook of auditing": "import sys, os\ndef hook(event, args, write=os.write):\n    if event.startswith(('gc.', 'cpython.', 'sys._getframe')): write(1, event.encode() + b'\\n')\nsys.addaudithook(hook)",
    "a profile": "import sys, os\nsys.setprofile(lambda frame, event, arg, write=os.write: event == 'call' and write(1, frame.f_code.co_name.encode() + b'\\n'))",
    "a trace": "import sys, os, threading\nsys.settrace(lambda frame, event, arg, write=os.write: write(1, frame.f_code.co_name.encode() + b'\\n') and None)",
    "monitoring": "import sys\nm = sys.monitoring; m.use_tool_id(3, 'tool')\nm.register_callback(3, m.events.PY_START, lambda code, offset: print(code.co_name, flush=True)); m.set_events(3, m.events.PY_START)",
    "an unfinished pool": "import multiprocessing\nif __name__ == '__main__':\n    pool = multiprocessing.Pool(1); print(pool.apply(abs, (-1,)))",
    "processes": "import multiprocessing, os\nif __name__ == '__main__':\n    lock = multiprocessing.Lock(); p = multiprocessing.Process(target=print, args=('child',)); p.start(); p.join(); d = multiprocessing.Process(target=print, daemon=True)",
    "sys.exit": "import sys\nprint('x'); sys.exit(3)",
    "sys.exit with a handler": LOUD + "import sys, atexit\natexit.register(print, 'handler'); a = Loud('a'); sys.exit('message')",
    "an exit in the program run once more": "import sys\nif 'again' not in globals():\n    again = True; exec(sys._getframe().f_code); raise SystemExit(5)",
    "an exit after running in a thread": "import sys, _thread, time\nif 'again' not in globals():\n    again = True; _thread.start_new_thread(exec, (sys._getframe().f_code, globals())); time.sleep(0.1); raise SystemExit(6)",
    "an exception": LOUD + "a = Loud('a'); f = open('out', 'w'); f.write('x')\n1 / 0",
    "a signal": LOUD + "import os\na = Loud('never'); os.kill(os.getpid(), 15)",
    "os._exit": LOUD + "import os\na = Loud('never'); print('not flushed', end=''); os._exit(7)",
    "KeyboardInterrupt": LOUD + "a = Loud('a'); raise KeyboardInterrupt",
    "an object in a thread local": LOUD + "import threading\nlocal = threading.local(); local.a = Loud('thread local')",
    "a child not waited for": "import subprocess\np = subprocess.Popen(['sleep', '0.1'])",
    "subinterpreters": "import _interpreters\ni = _interpreters.create(); _interpreters.run_string(i, 'print(1)')",
}  # fmt: skip
"""Whose finalizing might be noticed for all that we know, or which don't end by returning."""

DIFFERENT = {
    "an object in os.environ's class": LOUD + "import os\ntype(os.environ).a = Loud('on a class')",
    "an object of a preloaded class": "import string\nstring.Formatter.__del__ = lambda self: print('gone')\na = string.Formatter()",
}  # fmt: skip
"""What we do in another way than Python, with what is printed. docs/languages.md has the reason."""

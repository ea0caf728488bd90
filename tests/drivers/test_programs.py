"""Ordinary programs work in a sandbox: a filter of system calls is easily too narrow."""

from __future__ import annotations

import os
import textwrap

import pytest

from era.core.models import Language
from tests.drivers.sandboxes import Sandboxes

ROOT = os.geteuid() == 0

PYTHON = {
    "multiprocessing": """
        import multiprocessing
        from multiprocessing import shared_memory
        def square(n): return n * n
        if __name__ == '__main__':
            for method in ('fork', 'spawn', 'forkserver'):
                context = multiprocessing.get_context(method)
                with context.Pool(2) as pool: assert pool.map(square, range(5)) == [0, 1, 4, 9, 16]
                queue, lock = context.Queue(), context.Lock()
                with lock: queue.put(1)
                assert queue.get() == 1
            memory = shared_memory.SharedMemory(create=True, size=100)
            memory.close(); memory.unlink()
    """,
    "subprocesses": """
        import os, subprocess, sys
        assert subprocess.run(['echo', 'a'], capture_output=True).stdout == b'a\\n'
        assert subprocess.run('cat | tr a b', shell=True, input=b'a', capture_output=True).stdout == b'b'
        assert subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True).stdout == b'1\\n'
        pid = os.posix_spawn('/bin/true', ['true'], {})
        with open('script', 'w') as file: file.write('#!/bin/sh\\nexit 7')
        os.chmod('script', 0o755)
        assert subprocess.run(['./script']).returncode == 7
        fd = os.memfd_create('program')
        os.write(fd, open('/bin/true', 'rb').read())
        assert subprocess.run([f'/proc/self/fd/{fd}'], pass_fds=[fd]).returncode == 0
        child = subprocess.Popen(['sleep', '60'])
        watch = os.pidfd_open(child.pid)
        import signal
        signal.pidfd_send_signal(watch, signal.SIGTERM)
        assert child.wait() == -15
    """,
    "asyncio": """
        import asyncio, socket
        async def main():
            child = await asyncio.create_subprocess_exec('cat', stdin=-1, stdout=-1)
            assert (await child.communicate(b'through'))[0] == b'through'
            async def greet(reader, writer): writer.write(b'hello'); writer.close()
            server = await asyncio.start_server(greet, '127.0.0.1', 0)
            reader, _ = await asyncio.open_connection(*server.sockets[0].getsockname())
            assert await reader.read() == b'hello'
            for path in ('/tmp/socket', '\\0abstract'):
                server = await asyncio.start_unix_server(greet, path)
                reader, _ = await asyncio.open_unix_connection(path)
                assert await reader.read() == b'hello'
            assert await asyncio.to_thread(lambda: 5) == 5
            assert await asyncio.get_running_loop().getaddrinfo('localhost', 80)
        asyncio.run(main())
        assert ('lo' in dict(map(reversed, socket.if_nameindex())))
        a, b = socket.socketpair(); socket.send_fds(a, [b'x'], [0]); socket.recv_fds(b, 1, 1)
        udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); udp.bind(('::1', 0))
    """,
    "threads": """
        import signal, threading, time
        found = []
        threads = [threading.Thread(target=found.append, args=(n,)) for n in range(20)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert sorted(found) == list(range(20))
        def woken(*_): raise TimeoutError
        signal.signal(signal.SIGALRM, woken)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        try: time.sleep(5); raise AssertionError
        except TimeoutError: pass
        signal.pthread_kill(threading.get_ident(), 0)
        thread = threading.Thread(target=time.sleep, args=(0.1,)); thread.start()
        signal.pthread_kill(thread.ident, signal.SIGWINCH)
    """,
    "sqlite": """
        import sqlite3
        for path in ('data.db', '/tmp/data.db', '/dev/shm/data.db'):
            first, second = sqlite3.connect(path), sqlite3.connect(path)
            assert first.execute('PRAGMA journal_mode = WAL').fetchone() == ('wal',)
            first.execute('CREATE TABLE t (n)')
            with first: first.execute('INSERT INTO t VALUES (1)')
            assert second.execute('SELECT n FROM t').fetchall() == [(1,)]
            first.execute('VACUUM'); first.close(); second.close()
    """,
    "memory": """
        import ctypes, mmap, os
        with open('mapped', 'w+b') as file:
            file.truncate(8192)
            with mmap.mmap(file.fileno(), 8192) as pages:
                pages[:4] = b'abcd'; pages.flush(); pages.madvise(mmap.MADV_WILLNEED)
        assert open('mapped', 'rb').read(4) == b'abcd'
        code = mmap.mmap(-1, 4096, prot=7); code[:1] = b'\\xc3'; code.resize(8192)
        libc = ctypes.CDLL(None)
        compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
        array = (ctypes.c_int * 3)(3, 1, 2)
        libc.qsort(array, 3, 4, compare(lambda a, b: a[0] - b[0]))
        assert list(array) == [1, 2, 3]
        assert len(os.getrandom(8)) == 8 and len(os.sched_getaffinity(0)) >= 1
    """,
    "files": """
        import fcntl, os, shutil, tempfile
        with open('a', 'wb') as file: file.write(b'content')
        source, target = os.open('a', os.O_RDONLY), os.open('b', os.O_RDWR | os.O_CREAT, 0o644)
        assert os.sendfile(target, source, 0, 7) == 7
        assert os.copy_file_range(source, target, 7, 0) == 7
        read, write = os.pipe()
        assert os.splice(source, write, 7, offset_src=0) == 7
        os.mkdir('one'); os.mkdir('two')
        os.rename('a', 'one/a'); os.rename('one/a', 'two/a'); os.rename('two', 'one/two')
        os.link('one/two/a', 'linked'); os.symlink('linked', 'soft'); os.mkfifo('fifo'); os.truncate('linked', 3)
        shutil.copytree('one', '/tmp/tree'); shutil.move('/tmp/tree', '/workspace/tree'); os.replace('b', 'tree/b')
        os.chmod('linked', 0o600); os.utime('linked', (1, 1)); os.chown('linked', os.getuid(), -1)
        for where in ('.', '/tmp', '/dev/shm'):
            with tempfile.TemporaryFile(dir=where) as file: file.write(b'x'); file.flush(); os.fsync(file.fileno())
        nameless = os.open('/workspace', os.O_TMPFILE | os.O_WRONLY, 0o644)
        top = os.open('/', os.O_RDONLY)
        os.link(f'/proc/self/fd/{nameless}', 'named', src_dir_fd=top, follow_symlinks=True)
        fcntl.flock(target, fcntl.LOCK_EX); fcntl.lockf(target, fcntl.LOCK_EX)
        try: os.setxattr('linked', 'user.note', b'1')
        except OSError as problem: assert problem.errno == 95
        os.posix_fallocate(target, 0, 4096); os.sync()
        assert {'usr', 'workspace', 'tmp'} <= set(os.listdir('/'))
        shutil.rmtree('tree')
    """,
    "devices and /proc": """
        import os, pty, termios, time
        assert open('/dev/null', 'wb').write(b'x') == 1
        assert len(open('/dev/urandom', 'rb').read(4)) == 4 and open('/dev/zero', 'rb').read(2) == bytes(2)
        with open('/dev/stdout', 'w') as out: pass
        master, slave = pty.openpty()
        termios.tcgetattr(slave); os.get_terminal_size(slave)
        pid, fd = pty.fork()
        if pid == 0: os.write(1, b'in a terminal'); os._exit(0)
        assert b'in a terminal' in os.read(fd, 100)
        for name, value in (('oom_score_adj', '1000'), ('comm', 'renamed'), ('coredump_filter', '0')):
            with open(f'/proc/self/{name}', 'w') as file: file.write(value)
        for path in ('meminfo', 'self/maps', 'self/status', 'sys/kernel/pid_max', 'sys/vm/overcommit_memory'):
            assert open(f'/proc/{path}').read()
        assert os.readlink('/proc/self/exe')
    """,
}

NODE = {
    "workers": """
        const { Worker, isMainThread } = require('node:worker_threads');
        const code = `const { parentPort } = require('node:worker_threads');
          parentPort.postMessage(new Int32Array(new SharedArrayBuffer(8)).length)`;
        const answers = [1, 2, 3].map(() => new Promise((done, fail) =>
          new Worker(code, { eval: true }).on('message', done).on('error', fail)));
        Promise.all(answers).then((all) => { if (all.join() !== '2,2,2') throw new Error(all); });
    """,
    "compiled code": """
        let sum = 0;
        const add = (a, b) => a + b;
        for (let i = 0; i < 5e7; i++) sum = add(sum, i % 7) | 0;
        if (sum !== 149999997) throw new Error(`sum ${sum}`);
        const bytes = Buffer.from('0061736d0100000001070160027f7f017f03020100070701036164640000' +
          '0a09010700200020016a0b', 'hex');
        if (new WebAssembly.Instance(new WebAssembly.Module(bytes)).exports.add(2, 3) !== 5) throw new Error('wasm');
    """,
    "processes, files and sockets": """
        const { execSync, fork, spawnSync } = require('node:child_process');
        const assert = require('node:assert');
        const fs = require('node:fs');
        const http = require('node:http');
        const os = require('node:os');
        assert.equal(execSync('echo a').toString(), 'a\\n');
        assert.equal(spawnSync(process.execPath, ['-p', '6*7']).stdout.toString(), '42\\n');
        fs.writeFileSync('child.cjs', 'process.on("message", (m) => { process.send(m + 1); process.disconnect(); })');
        const child = fork('child.cjs');
        child.send(1);
        child.on('message', (answer) => assert.equal(answer, 2));
        fs.mkdirSync('deep/er', { recursive: true });
        fs.cpSync('child.cjs', 'deep/er/copy.cjs');
        fs.renameSync('deep/er/copy.cjs', '/workspace/moved.cjs');
        fs.rmSync('deep', { recursive: true });
        const watcher = fs.watch('.', () => watcher.close());
        fs.writeFileSync('seen', '');
        assert.ok(os.networkInterfaces().lo && os.cpus().length);
        require('node:crypto').scryptSync('a', 'b', 32);
        require('node:zlib').brotliCompressSync('a'.repeat(1000));
        require('node:dns').lookup('localhost', (problem) => assert.ifError(problem));
        const server = http.createServer((_, answer) => answer.end('hello')).listen(0, '127.0.0.1', async () => {
          const answer = await fetch(`http://127.0.0.1:${server.address().port}`);
          assert.equal(await answer.text(), 'hello');
          server.close();
          server.closeAllConnections();
        });
    """,
}

TYPESCRIPT = """
    import { Worker } from 'node:worker_threads';
    enum Colour { Red = 3, Green }
    const worker: Worker = new Worker(`require('node:worker_threads').parentPort.postMessage(4)`, { eval: true });
    worker.on('message', (answer: number) => { if (answer !== Colour.Green) throw new Error(`${answer}`); });
"""

PROGRAMS: list[tuple[Language, str]] = [
    *(("python", code) for code in PYTHON.values()),
    *(("node", code) for code in NODE.values()),
    ("typescript", TYPESCRIPT),
]
NAMES = [*(f"python {name}" for name in PYTHON), *(f"node {name}" for name in NODE), "typescript"]


@pytest.mark.parametrize(("language", "code"), PROGRAMS, ids=NAMES)
def test_programs_work(sandboxes: Sandboxes, language: Language, code: str) -> None:
    if not ROOT and "worker_threads" in code:
        pytest.skip("V8 reserves more for a worker than an ordinary user's limit of private data lets it have")
    sandbox = sandboxes.make(language)
    result = sandboxes.run(sandbox, textwrap.dedent(code))
    sandboxes.close(sandbox)
    assert (result.ended.exit_code, result.stdout, result.stderr) == (0, "", "")


def test_no_name_in_the_working_directory_keeps_a_program_from_starting(sandboxes: Sandboxes) -> None:
    """Programs import modules from there, so all names are checked, also links."""
    sandbox = sandboxes.make()
    makes = """
import os
for target in ('loop', '/proc/1/root/x', '/proc/1/cwd', 'nowhere', '/' + 'x' * 300, '/dev/null/x'):
    os.symlink(target, str(len(os.listdir())) if target != 'loop' else 'loop')
os.mkdir('closed', 0)
open(b'\\xff\\xfe.py', 'w').close()
"""
    assert sandboxes.run(sandbox, makes).ended.exit_code == 0
    result = sandboxes.run(sandbox, "import os; print(len(os.listdir()))")
    assert (result.stdout, result.stderr) == ("10\n", "")


def test_a_closed_working_directory_is_opened_again(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    assert (
        sandboxes.run(sandbox, "import os; os.chmod('.', 0)").ended.state_problem
        == "can't be opened: Permission denied"
    )
    assert sandboxes.run(sandbox, "print('well')").stdout == "well\n"

"""The modules that programs have for state and storage, with real interpreters and without a sandbox."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from era.guest import workspace
from era.languages.python import base_executable
from tests.core.interpreters import GUEST, node_command

DATA = ".session_data.json"


def says(code: str, folder: Path, *command: str, **environment: str) -> str:
    """What a program in `folder` writes."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [*command, code],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(GUEST / "lib"), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def python(code: str, folder: Path, **environment: str) -> str:
    return says(code, folder, str(base_executable()), "-c", **environment)


def node(code: str, folder: Path) -> dict[str, object]:
    """The state that a program leaves."""
    client = f"const client = require({json.dumps(str(GUEST / 'lib/era_state.mjs'))});\n"
    says(client + code, folder, node_command()[0], "-e")
    assert [path.name for path in folder.iterdir()] == [DATA]
    left: dict[str, object] = json.loads((folder / DATA).read_text())
    return left


def test_the_lock_ends_with_its_block_though_a_child_has_it(tmp_path: Path) -> None:
    """And not before, though a child leaves the block."""
    code = """
import fcntl, os
from era_state import state
def is_free():
    directory = os.open('.', os.O_RDONLY)
    try: fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError: return False
    finally: os.close(directory)
    return True
read, write = os.pipe()
with state() as data:
    if not (waits := os.fork()):
        os.close(write); os.read(read, 1); os._exit(0)
    if leaves := os.fork():
        os.waitpid(leaves, 0)
        print(is_free(), flush=True)
if not leaves: os._exit(0)
print(is_free(), flush=True)
os.close(write)
os.waitpid(waits, 0)
"""
    assert python(code, tmp_path) == "False\nTrue\n"


def test_a_call_that_had_no_answer_in_time_is_not_made_again(tmp_path: Path) -> None:
    """On a connection that was used before."""
    asked: list[bytes] = []
    answered = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"success":true}'

    def serve(connection: socket.socket) -> None:
        with connection:
            while request := connection.recv(1 << 16):
                asked.append(request.split()[0])
                if len(asked) == 1:
                    connection.send(answered)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,)).start()

    code = """
import era_storage
era_storage._SILENT_SECONDS = 0.5
print(era_storage.kv.delete('app', 'k'))
try: era_storage.kv.delete('app', 'k')
except era_storage.StorageError as error: print(error)
"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            said = python(code, tmp_path, ERA_STORAGE_URL=url)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
    assert said == "True\nThe storage can't be reached: timed out.\n"
    assert asked == [b"DELETE", b"DELETE"]


def test_calls_in_node_whose_promises_are_waited_for_come_one_after_the_other(tmp_path: Path) -> None:
    code = """
const wait = () => new Promise((resolve) => setTimeout(resolve, 20));
const add = client.state(async (data) => { await wait(); data.n = (data.n ?? 0) + 1; });
const fails = client.state(async (data) => { await wait(); data.n = 9; throw new Error(); }).catch(() => {});
const more = client.state((data) => { data.n += 10; return 'done'; });
(async () => {
  if ((await more) !== 'done') throw new Error('not what it returns');
  await client.state(async (data) => { await wait(); data.n += 100; });
  if (client.state((data) => { data.n += 1000; return data.n; }) !== 1111) throw new Error('nothing is waited for');
  for (const inner of [() => client.state(() => {}), async () => { await wait(); client.state(() => {}); }]) {
    let problem;
    try { await client.state(inner); } catch (error) { problem = error; }
    if (!/within another/.test(problem?.message)) throw new Error('it would wait for itself');
  }
})();
"""
    assert node(code, tmp_path / "state") == {"n": 1111}


def test_threads_of_node_do_not_get_in_each_others_way(tmp_path: Path) -> None:
    code = """
const { Worker } = require('node:worker_threads');
const work = `
  const { save } = require(${JSON.stringify(require.resolve(FILE))});
  for (let n = 0; n < 300; n += 1) save({ n });
`;
for (let n = 0; n < 3; n += 1) new Worker(work, { eval: true }).on('error', (error) => { throw error; });
"""
    path = json.dumps(str(GUEST / "lib/era_state.mjs"))
    assert node(code.replace("FILE", path), tmp_path / "state") == {"n": 299}


def test_a_state_file_that_grows_while_it_is_read_is_read_up_to_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / DATA).write_bytes(b"x" * 1000)
    fstat, limit = os.fstat, 2 * workspace.CHUNK

    def grows(fd: int) -> os.stat_result:
        """As a process beside the run may write just after it was looked at."""
        seen = fstat(fd)
        with open(DATA, "ab") as file:
            file.write(b"x" * 10 * workspace.CHUNK)
        return seen

    monkeypatch.setattr(os, "fstat", grows)
    content, problem = workspace.read_state(limit)
    assert content is None
    assert problem is not None
    assert problem.startswith("is too large: ")

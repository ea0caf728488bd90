"""The storage's client of Node, with the real Node and a storage of the test's own."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.core.interpreters import GUEST, node_command

CLIENT = GUEST / "lib" / "era_storage.js"


class Storage:
    """It takes what is put, and answers nothing to whoever gets something."""

    def __init__(self) -> None:
        self.put: list[bytes] = []
        self.gets = 0
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            if head.startswith(b"GET"):
                self.gets += 1
                await reader.read()  # until the client hangs up
                break
            (size,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            body: dict[str, Any] = json.loads(await reader.readexactly(int(size.partition(b":")[2])))
            self.put.append(base64.b64decode(body.get("content", "")))
            told = b'{"success":true,"results":[]}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))
        writer.close()


@asynccontextmanager
async def serving() -> AsyncIterator[Storage]:
    storage = Storage()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await storage.answer(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        storage.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield storage


async def says(storage: Storage, code: str, folder: Path) -> str:
    """What a program writes that has the client's classes."""
    program = folder / "program.cjs"
    program.write_text(f"const client = () => require({json.dumps(str(CLIENT))});\n{code}")
    process = await asyncio.create_subprocess_exec(
        node_command()[0], str(program), env={"ERA_STORAGE_URL": storage.url}, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(30):
            written, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0
    return written.decode()


async def test_the_bytes_of_a_view_are_stored(tmp_path: Path) -> None:
    code = """
const { R2Storage } = client();
const inner = new Uint8Array([9, 1, 2, 3, 4, 9]).buffer;
const all = [
  new Float32Array([1.5, 300]), new Uint16Array([1, 300]), new DataView(inner, 1, 4), new Uint8Array(inner, 1, 2),
  inner, Buffer.from('b'), 'é', [1, 255],
];
(async () => { for (const each of all) console.log(await R2Storage.put('app', 'k', each)); })();
"""
    async with serving() as storage:
        assert await says(storage, code, tmp_path) == "true\n" * 8
        assert storage.put == [
            b"\x00\x00\xc0\x3f\x00\x00\x96\x43",
            b"\x01\x00\x2c\x01",
            b"\x01\x02\x03\x04",
            b"\x01\x02",
            b"\x09\x01\x02\x03\x04\x09",
            b"b",
            "é".encode(),
            b"\x01\xff",
        ]


async def test_a_storage_that_says_nothing_is_not_waited_for_without_bound(tmp_path: Path) -> None:
    """Neither on a new connection nor on one that was used before."""
    code = """
const http = require('node:http');
http.Agent = class extends http.Agent {
  constructor(options) {
    if (options.timeout !== 60000) throw new Error('it is not the bound of Python');
    super({ ...options, timeout: 300 });
  }
};
const { KVStorage, R2Storage } = client();
const get = () => KVStorage.get('app', 'k').catch((error) => console.log(error.name, error.code, error.message));
get().then(() => R2Storage.put('app', 'k', '1')).then(get);
"""
    async with serving() as storage:
        told = "StorageError unreachable The storage can't be reached: it said nothing for 60 seconds.\n"
        assert await says(storage, code, tmp_path) == told * 2
        assert storage.gets == 2, "it may have done what was asked"


async def test_a_connection_that_was_idle_is_let_go_of(tmp_path: Path) -> None:
    """However the time has gone by; also where a call mustn't be made twice, and with the earlier versions of Node 24,
    in which a request hears of its connection's errors only from the next tick on."""
    code = """
const { ClientRequest } = require('node:http');
const { onSocket } = ClientRequest.prototype;
ClientRequest.prototype.onSocket = function later(...given) {
  process.nextTick(() => onSocket.apply(this, given));
};
const { D1Storage, R2Storage } = client();
const wait = () => new Promise((resolve) => setTimeout(resolve, 2500));
const work = () => { for (const end = Date.now() + 2500; Date.now() < end; ); };
(async () => {
  for (const idle of [() => 0, wait, work, wait]) {
    await idle();
    console.log(await R2Storage.put('app', 'k', '1'));
    if (idle === wait) await wait();
    console.log(await D1Storage.query('app', 'SELECT 1'));
  }
})();
"""
    async with serving() as storage:
        assert await says(storage, code, tmp_path) == "true\n[]\n" * 4
        assert len(storage.put) == 8

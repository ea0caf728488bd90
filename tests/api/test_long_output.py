"""Output that is long is answered as what is short is, and takes no memory of the service's."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from era.api.routing import streaming
from era.core.execution.run_messages import Collected, RunResult
from era.core.execution.spooled_output import SpooledOutput
from era.core.models import StateOutcome
from era.wire.runs import execute_answer, run_answer
from tests.conftest import MakeServer, Server
from tests.gvisor import BOTH_KINDS
from tests.hostile.served import ForkedServer
from tests.soaking import soak_the_rest

MIB = 1 << 20
SIZE = 10 * MIB
LOUD = f"import os\nfor _ in range({SIZE} >> 16): os.write(1, b'\\x01' * 65536)"
"""Each of these bytes is six of JSON."""

OUTPUTS = {
    "text": "é😀".encode() * 30_000,
    "what needs escaping": b'\x01\x00"\\\n\x7f' * 40_000,
    "no text": bytes(range(256)) * 1000,
    "a sequence that is cut off": b"x" * 200_000 + "😀".encode()[:3],
    "nothing": b"",
}


@pytest.mark.parametrize("shown", [run_answer, partial(execute_answer, language="python")])
@pytest.mark.parametrize("which", OUTPUTS)
async def test_a_long_answer_is_the_short_one_s(
    shown: Callable[..., dict[str, Any]], which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def answer() -> bytes:
        stdout, stderr = SpooledOutput(tmp_path), SpooledOutput(tmp_path)
        await stdout.append(OUTPUTS[which])
        await stderr.append(b'"stdout":""')
        state = StateOutcome(1, committed=True)
        data = {"stdout": "", "text": "é"}
        result = RunResult("run_1", "s", "ok", 0, 0.1, data, False, False, state)
        response = await streaming.run_response(Collected(result, stdout, stderr), shown)
        if isinstance(response, streaming.ClosingResponse):
            return b"".join([bytes(piece) async for piece in response.body_iterator])  # type: ignore[arg-type]
        return bytes(response.body)

    monkeypatch.setattr(streaming, "_SMALL", 1 << 30)
    short = await answer()
    monkeypatch.setattr(streaming, "_SMALL", -1)
    assert await answer() == short
    assert json.loads(short)["stdout"] == OUTPUTS[which].decode(errors="replace")


def answers(server: Server, path: str, how_many: int, kind: str) -> None:
    """Have so many sessions print at a time, and read their answers."""

    def one(number: int) -> None:
        with server.client(timeout=120) as client:
            client.post("/api/sessions", json={"language": "python", "session_id": f"s{number}", "isolation": kind})
            of_session = {"language": "python", "isolation": kind}
            body = {"code": LOUD, "timeout": 60} | (of_session if "execute" in path else {})
            length = 0
            with client.stream("POST", path.format(f"s{number}"), json=body) as answer:
                assert answer.status_code == 200
                for piece in answer.iter_raw():
                    length += len(piece)
            assert length > 6 * SIZE

    with ThreadPoolExecutor(how_many) as callers:
        list(callers.map(one, range(how_many)))


@pytest.mark.parametrize("path", soak_the_rest(["/api/sessions/{}/run", "/api/sessions/{}/stream", "/api/execute"], 1))
@pytest.mark.parametrize("weakness", soak_the_rest([None, "outputs in memory"], 1))
@pytest.mark.parametrize("kind", BOTH_KINDS)
def test_memory_stays_flat_whatever_runs_print(
    own_server: MakeServer, tmp_path: Path, path: str, weakness: str | None, kind: str
) -> None:
    server = ForkedServer(tmp_path / "data", named_weakness=weakness).start() if weakness else own_server()
    try:
        with server.client() as client:  # so that all is loaded that a run needs
            client.post("/api/execute", json={"language": "python", "code": "print('x' * 100_000)"})
        before = server.reset_peak()
        answers(server, path, 4, kind)
        grown = server.peak_resident_bytes - before
        assert grown < 40 * MIB if weakness is None else grown > 100 * MIB, f"{grown >> 20} MiB"
    finally:
        server.stop()


@pytest.mark.parametrize("weakness", soak_the_rest([None, "outputs in memory"], 1))
def test_slow_readers_public_calls_and_records_take_no_memory(
    own_server: MakeServer, tmp_path: Path, weakness: str | None
) -> None:
    server = ForkedServer(tmp_path / "data", named_weakness=weakness).start() if weakness else own_server()
    grown: dict[str, int] = {}
    at_first = before = peak = 0

    def note(step: str) -> None:
        """Note how much memory a step took besides what there was at its begin."""
        nonlocal before, peak
        peak = max(peak, server.peak_resident_bytes)
        grown[step] = server.peak_resident_bytes - before
        client.get("/health")  # so that the answer before is done with
        before = server.reset_peak()

    try:
        with server.client(timeout=120) as client:
            client.post("/api/sessions", json={"language": "python", "session_id": "s", "allowPublicAccess": True})
            client.post("/api/sessions/s/run", json={"code": "print('x' * 100_000)"})
            assert client.put("/api/sessions/s/code", json={"code": LOUD}).status_code == 200
            client.get("/proxy/s/80/")
            at_first = peak = before = server.reset_peak()
            with client.stream("POST", "/api/sessions/s/stream", json={"code": LOUD}) as late:
                wait_for_turn(server)  # it has ended, and nobody has read what it wrote
                note("slow reader")
                lines = [line for line in late.iter_lines() if line.startswith("data:")]
            assert sum(len(json.loads(line[5:]).get("content", "")) for line in lines) == SIZE
            del lines
            note("the same, read late")
            answer = client.get("/proxy/s/80/")
            assert (answer.status_code, answer.content) == (200, b"\x01" * SIZE)
            assert answer.headers["content-type"].startswith("text/plain")
            assert answer.headers["content-length"] == str(SIZE)
            note("public call")
            run_id = answer.headers["X-Era-Run"]
            url = f"/api/sessions/s/runs/{run_id}/stdout"
            with ExitStack() as answers:
                records = [answers.enter_context(client.stream("GET", url)) for _ in range(16)]
                assert records[-1].read() == b"\x01" * SIZE
            note("records")
            part = client.get(url, headers={"Range": f"bytes={SIZE - 5}-"})
            assert (part.status_code, part.content) == (206, b"\x01" * 5)
            assert part.headers["content-range"] == f"bytes {SIZE - 5}-{SIZE - 1}/{SIZE}"
            key = {"Idempotency-Key": "k"}
            first = client.post("/api/sessions/s/run", json={"code": LOUD}, headers=key)
            note("run")
            again = client.post("/api/sessions/s/run", json={"code": LOUD}, headers=key)
            assert again.headers["Idempotent-Replay"] == "true"
            assert again.content == first.content
            note("replay")
        if weakness:
            del grown["the same, read late"]
            assert min(grown.values()) > SIZE // 2, grown
        else:
            assert grown["slow reader"] < 30 * MIB, grown
            assert peak - at_first < 50 * MIB, grown
    finally:
        server.stop()


def wait_for_turn(server: Server) -> None:
    """Wait until a session's run has ended, by a run that comes after it."""
    with server.client() as other:
        assert other.post("/api/sessions/s/run", json={"code": "print(1)"}).json()["stdout"] == "1\n"

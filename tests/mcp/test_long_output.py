"""Programs that print much and are run by tools: of what they print no more is in memory than is shown."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.hostile.served import ForkedServer
from tests.soaking import soak_the_rest

MIB = 1 << 20
LOUD = "import os\nfor _ in range({mib} << 4): os.write(1, b'\\x01' * 65536)"
CALLERS = 4


@pytest.mark.parametrize("mib", soak_the_rest([5, 10], 1))
@pytest.mark.parametrize("weakness", soak_the_rest([None, "outputs in memory"], 1))
def test_memory_stays_flat_whatever_tools_print(tmp_path: Path, weakness: str | None, mib: int) -> None:
    """It grows by less than what they print, all of which would take more: JSON writes a byte of it in six."""
    most, loud = CALLERS * mib * MIB, LOUD.format(mib=mib)
    server = ForkedServer(tmp_path / "data", named_weakness=weakness).start()

    def call(code: str) -> str:
        params = {"name": "era_python", "arguments": {"code": code}}
        with server.client(timeout=200) as client:
            answer = client.post("/mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})
            return str(answer.json()["result"]["content"][0]["text"])

    try:
        assert call("print(1)") == "1"
        before = server.reset_peak()
        with ThreadPoolExecutor(CALLERS) as callers:
            for text in callers.map(call, [loud] * CALLERS):
                assert "characters are left out here" in text
        grown = server.peak_resident_bytes - before
        assert grown < most if weakness is None else grown > most, f"{grown >> 20} MiB"
    finally:
        server.stop()

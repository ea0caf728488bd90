# ruff: noqa: E501  programs are as their users write them
"""The output of runs: capped, whole and in order."""

from __future__ import annotations

import textwrap
from typing import Any

from tests.conftest import MakeServer, MakeSession, Run
from tests.table import table

CAP = 1 << 20


def test_output_is_capped_and_the_servers_memory_stays_flat(own_server: MakeServer) -> None:
    server = own_server(weakness=f"from era.server import bounds; bounds._OUTPUT_BYTES = {CAP}")
    with server.client() as client:
        client.post("/api/sessions", json={"language": "python", "session_id": "loud"})

        def run(code: str, **fields: Any) -> dict[str, Any]:
            answer = client.post("/api/sessions/loud/run", json={"code": code, **fields})
            assert answer.status_code == 200, answer.text
            body: dict[str, Any] = answer.json()
            return body

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
        before = server.peak_resident_bytes
        far_too_much = (
            "import os, time\npiece = b'x' * 65536\nfor _ in range(2000): os.write(1, piece); os.write(2, piece)"
        )
        answer = run(far_too_much + "\ntime.sleep(60)", timeout=5)
        assert lengths(answer) == (CAP, True, CAP, True)
        assert (answer["exit_code"], answer["status"]) == (124, "timeout")
        assert server.peak_resident_bytes - before < 48 << 20
        assert run("print('fine')")["stdout"] == "fine\n"


@table("language, code", [
        ("python", "import sys\nfor n in range(200_000): sys.stdout.write(f'{n}\\n')"),
        ("node", "let s = ''; for (let n = 0; n < 200000; n++) s += n + '\\n'; process.stdout.write(s);"),
        ("typescript", "for (let n: number = 0; n < 200000; n += 1000) { let s: string = ''; for (let m = n; m < n + 1000; m++) s += m + '\\n'; process.stdout.write(s); }"),
    ])  # fmt: skip
def test_output_is_whole_and_in_order(session: MakeSession, run: Run, language: str, code: str) -> None:
    answer = run(session(language), textwrap.dedent(code))
    assert answer["stdout"] == "".join(f"{n}\n" for n in range(200_000))
    assert not answer["stdout_truncated"]

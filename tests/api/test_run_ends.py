"""How runs end: by a signal, at their deadline, or killed after it."""

from __future__ import annotations

import math
import time

import httpx
import pytest

from tests.conftest import MakeSession, Run, at_best
from tests.soaking import soak_the_rest
from tests.table import table


@table("signal, exit_code", [("SIGKILL", 137), ("SIGTERM", 143), ("SIGSEGV", 139), ("SIGABRT", 134), ("SIGHUP", 129)])
@table("language", ["python", "node"])
def test_death_by_a_signal_is_reported(
    session: MakeSession, run: Run, language: str, signal: str, exit_code: int
) -> None:
    code = {
        "python": f"import os, signal, time; os.kill(os.getpid(), signal.{signal}); time.sleep(5)",
        "node": f"process.kill(process.pid, '{signal}'); setTimeout(() => 0, 5000);",
    }[language]
    answer = run(session(language), code)
    assert (answer["exit_code"], answer["status"]) == (exit_code, "killed")
    assert answer["state"]["committed"]


@pytest.mark.parametrize("env", soak_the_rest([{}, {"PYTHONHASHSEED": "0"}], 1), ids=["warm", "cold"])
def test_output_printed_before_the_deadline_is_returned_without_a_flush(
    session: MakeSession, run: Run, env: dict[str, str]
) -> None:
    answer = run(session(), "import time; print('so far'); time.sleep(60)", env=env, timeout=5)
    assert (answer["status"], answer["stdout"]) == ("timeout", "so far\n")


SAVE_THEN_HANG = {
    "python": """
import json, time
with open('.session_data.json', 'w') as f: json.dump({'saved': 1}, f)
open('note', 'w').write('kept')
print('so far')
while True: time.sleep(1)
""",
    "node": """
require('fs').writeFileSync('.session_data.json', '{"saved": 1}');
require('fs').writeFileSync('note', 'kept');
console.log('so far');
while (true) {}
""",
    "typescript": """
import fs from 'fs';
fs.writeFileSync('.session_data.json', '{"saved": 1}');
fs.writeFileSync('note', 'kept');
console.log('so far');
setInterval((): void => {}, 1000);
""",
}


@pytest.mark.parametrize("language", ["python", "node", "typescript"])
def test_a_timeout_keeps_output_and_files_written_before(
    client: httpx.Client, session: MakeSession, run: Run, language: str
) -> None:
    def run_and_hang() -> float:
        where = session(language)
        began = time.monotonic()
        answer = run(where, SAVE_THEN_HANG[language], timeout=0.6)
        waited = time.monotonic() - began
        assert 0.6 <= float(answer["duration"].removesuffix("s")) <= waited
        assert (answer["exit_code"], answer["status"]) == (124, "timeout")
        if answer["stdout"]:  # or a busy machine had not yet let it begin
            assert answer["stdout"] == "so far\n"
            assert (answer["data"], answer["state"]["committed"]) == ({"saved": 1}, True)
            files = client.get(f"/api/sessions/{where}?include=files").json()["files"]
            assert [file["path"] for file in files] == ["note"]
            return waited
        return math.inf

    assert at_best(2.2, run_and_hang) < 2.2


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

    def clean_up() -> float:
        answer = run(session(language), code, timeout=0.5)
        assert (answer["exit_code"], answer["status"]) == (124, "timeout")
        if not answer["stdout"]:  # a busy machine had not yet let it say what it does at SIGTERM
            return math.inf
        assert (answer["stdout"], answer["data"]) == ("cleaning up 15\n", {"clean": True})
        return float(answer["duration"].removesuffix("s"))

    assert at_best(1.9, clean_up) < 1.9


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

    def ignore() -> float:
        answer = run(session(), code, timeout=0.4)
        assert (answer["exit_code"], answer["status"]) == (124, "timeout")
        if answer["stdout"] != "True\n" * 8:  # a busy machine had not yet let all of them ignore it
            return math.inf
        duration = float(answer["duration"].removesuffix("s"))
        assert duration >= 2.3
        return duration

    assert at_best(3.5, ignore) < 3.5

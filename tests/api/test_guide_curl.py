# ruff: noqa: E501  programs are as their users write them
"""The users' guide as typed into a shell: curl, nested quotes, JSON escaped by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.api.guide import SHELF
from tests.conftest import MakeSession, Server


def shell(server: Server, script: str, tmp_path: Path) -> list[Any]:
    """Run a user's shell script; returns each line of its output parsed as JSON. `pick KEY` stands for `jq .KEY`."""
    pick = (
        f"pick() {{ {sys.executable} -c "
        "'import json, sys; print(json.dumps(json.load(sys.stdin)[sys.argv[1]]))' \"$1\"; }\n"
    )
    done = subprocess.run(
        ["bash", "-euc", pick + script],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "ERA": server.url},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_curl_creates_runs_and_extracts_data(server: Server, tmp_path: Path) -> None:
    created, ran, data = shell(
        server,
        r"""
curl -sS -X POST $ERA/api/sessions \
  -H "Content-Type: application/json" \
  -d '{
    "language": "python",
    "session_id": "shelf-demo",
    "persistent": true,
    "data": {
      "visits": 0,
      "readers": ["mina", "otto"],
      "shelf": {
        "colour": "green",
        "room_for": 40
      }
    }
  }'
echo
curl -sS -X POST $ERA/api/sessions/shelf-demo/run \
  -H "Content-Type: application/json" \
  -d '{
    "code": "import json\nwith open(\".session_data.json\", \"r\") as f: data=json.load(f)\ndata[\"visits\"]+=1\nwith open(\".session_data.json\", \"w\") as f: json.dump(data, f)"
  }'
echo
curl -sS -X POST $ERA/api/sessions/shelf-demo/run \
  -H "Content-Type: application/json" \
  -d '{
    "code": "import json\nwith open(\".session_data.json\", \"r\") as f: data=json.load(f)\ndata[\"visits\"]+=1\nwith open(\".session_data.json\", \"w\") as f: json.dump(data, f)"
  }' | pick data
""",
        tmp_path,
    )
    assert (created["id"], created["session_id"], created["data"]) == ("shelf-demo", "shelf-demo", SHELF)
    assert {"exit_code", "stdout", "stderr", "session_id", "data"} <= ran.keys()
    assert (ran["exit_code"], ran["stdout"], ran["stderr"], ran["session_id"]) == (0, "", "", "shelf-demo")
    assert (ran["data"]["visits"], data["visits"], data["readers"]) == (1, 2, ["mina", "otto"])


def test_curl_counts_in_a_session_named_by_a_shell_variable(server: Server, tmp_path: Path) -> None:
    count = r"""
curl -sS -X POST $ERA/api/sessions/$SESSION_ID/run \
  -H "Content-Type: application/json" \
  -d '{
    "code": "import json; from datetime import datetime; data = json.load(open(\".session_data.json\")); data[\"laps\"] += 1; data[\"at\"].append(datetime.now().isoformat()); json.dump(data, open(\".session_data.json\", \"w\")); print(f\"Laps: {data[\"laps\"]}\")"
  }'
echo
"""
    created, first, second = shell(
        server,
        r"""
SESSION_ID="laps-$(date +%s)"
curl -sS -X POST $ERA/api/sessions \
  -H "Content-Type: application/json" \
  -d '{
    "language": "python",
    "session_id": "'$SESSION_ID'",
    "persistent": true,
    "data": {
      "laps": 0,
      "at": []
    }
  }'
echo
"""
        + count
        + count,
        tmp_path,
    )
    assert re.fullmatch(r"laps-\d+", created["id"])
    assert [(answer["exit_code"], answer["stdout"]) for answer in (first, second)] == [
        (0, "Laps: 1\n"),
        (0, "Laps: 2\n"),
    ]
    assert (second["data"]["laps"], len(second["data"]["at"])) == (2, 2)


def test_curl_passes_env(server: Server, session: MakeSession, tmp_path: Path) -> None:
    session(session_id="with-env")
    (answer,) = shell(
        server,
        r"""
curl -sS -X POST $ERA/api/sessions/with-env/run \
  -H "Content-Type: application/json" \
  -d '{
    "code": "import os; print(f\"Key: {os.environ.get(\"KEY\")}\"); print(f\"Loud: {os.environ.get(\"LOUD\")}\")",
    "env": {
      "KEY": "k-12345",
      "LOUD": "true",
      "TRIES": "3"
    }
  }'
""",
        tmp_path,
    )
    assert answer["stdout"] == "Key: k-12345\nLoud: true\n"


def test_curl_reads_metadata_and_settings_back(server: Server, tmp_path: Path) -> None:
    labels, internet = shell(
        server,
        r"""
curl -sS -X POST $ERA/api/sessions \
  -H "Content-Type: application/json" \
  -d '{
    "language": "python",
    "session_id": "labelled",
    "persistent": true,
    "allowInternetAccess": true,
    "metadata": {
      "stage": "live",
      "team": "maps",
      "cost_center": "c-1"
    }
  }' > /dev/null
curl -sS $ERA/api/sessions/labelled | pick metadata
curl -sS $ERA/api/sessions/labelled | pick allowInternetAccess
""",
        tmp_path,
    )
    assert labels == {"stage": "live", "team": "maps", "cost_center": "c-1"}
    assert internet is True

"""Programs that sessions store to answer public calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

type Publish = Callable[..., str]

SEEN = """\
import json, os
names = [name for name in os.environ if name.startswith(("ERA_HTTP", "ERA_REQUEST", "ERA_PROXY"))]
print(json.dumps({"body": {name: os.environ[name] for name in names}}))
"""

COUNTER = """\
import json
data = json.load(open(".session_data.json"))
data["calls"] = data.get("calls", 0) + 1
json.dump(data, open(".session_data.json", "w"))
open("calls.txt", "a").write("x")
print(json.dumps({"status": 201, "headers": {"X-Calls": data["calls"]}, "body": data}))
"""


def printing(answer: Any) -> str:
    """A Python program that prints `answer` as JSON."""
    return f"import json; print(json.dumps({answer!r}))"

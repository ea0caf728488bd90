"""Programs everybody writes, in the shape of the users' guide: state machines, rate limits, caches, recovery."""

from __future__ import annotations

from typing import Any

from tests.api.guide import LANGUAGES
from tests.conftest import MakeSession, Run
from tests.table import table

STATE_MACHINE = """
const fs = require('fs');
const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
if (!data.state) {
  data.state = 'parked';
  data.log = [];
}
const allowed = {
  'parked': ['driving'],
  'driving': ['arrived', 'broken'],
  'arrived': ['parked'],
  'broken': ['parked', 'driving']
};
function go(next) {
  if (!allowed[data.state].includes(next)) {
    throw new Error(`No way: ${data.state} -> ${next}`);
  }
  data.log.push({ from: data.state, to: next, at: new Date().toISOString() });
  data.state = next;
}
const event = process.env.EVENT || 'leave';
if (event === 'leave' && data.state === 'parked') {
  go('driving');
  console.log('On the road');
} else if (event === 'arrive' && data.state === 'driving') {
  go('arrived');
  console.log('There');
} else if (event === 'reset') {
  go('parked');
  console.log('Back');
}
fs.writeFileSync('.session_data.json', JSON.stringify(data, null, 2));
console.log(`State: ${data.state}`);
"""


def test_a_state_machine_is_driven_by_the_env_of_each_run(session: MakeSession, run: Run) -> None:
    where = session("node")
    steps = [
        ({}, "On the road\nState: driving\n"),
        ({"EVENT": "leave"}, "State: driving\n"),
        ({"EVENT": "arrive"}, "There\nState: arrived\n"),
        ({"EVENT": "reset"}, "Back\nState: parked\n"),
    ]
    for env, output in steps:
        answer = run(where, STATE_MACHINE, env=env)
        assert (answer["exit_code"], answer["stdout"]) == (0, output)
    before = answer["data"]
    assert [(step["from"], step["to"]) for step in before["log"]] == [
        ("parked", "driving"),
        ("driving", "arrived"),
        ("arrived", "parked"),
    ]
    refused = run(where, STATE_MACHINE, env={"EVENT": "reset"})
    assert (refused["exit_code"], refused["status"], refused["data"]) == (1, "failed", before)
    assert "Error: No way: parked -> parked" in refused["stderr"]


RATE_LIMIT = """
import json
import time
from datetime import datetime
with open('.session_data.json', 'r') as f:
    data = json.load(f)
if 'calls' not in data:
    data['calls'] = []
now = time.time()
recent = [c for c in data['calls'] if now - c < 60]
if len(recent) >= 3:
    print("Too many calls, come back later.")
    exit(1)
data['calls'].append(now)
data['calls'] = data['calls'][-100:]
with open('.session_data.json', 'w') as f:
    json.dump(data, f)
print(f"Call number {len(recent) + 1}")
"""


def test_a_rate_limiter_lets_so_many_calls_through_and_then_exits_with_1(session: MakeSession, run: Run) -> None:
    where = session()
    for call in (1, 2, 3):
        answer = run(where, RATE_LIMIT)
        assert (answer["exit_code"], answer["stdout"]) == (0, f"Call number {call}\n")
    refused = run(where, RATE_LIMIT)
    assert (refused["exit_code"], refused["status"]) == (1, "failed")
    assert (refused["stdout"], refused["stderr"]) == ("Too many calls, come back later.\n", "")
    assert refused["data"] == answer["data"]
    assert refused["state"]["committed"]


CACHE = """
import json
import time
with open('.session_data.json', 'r') as f:
    data = json.load(f)
if 'cache' not in data:
    data['cache'] = {}
def fetch(url):
    return {'name': url.upper()}
def cached_or_fetched(url, ttl=300):
    now = time.time()
    if url in data['cache']:
        cached = data['cache'][url]
        if now - cached['stored'] < ttl:
            print(f"Hit for {url}")
            return cached['value']
    print(f"Miss for {url}")
    result = fetch(url)
    data['cache'][url] = {
        'value': result,
        'stored': now
    }
    return result
result = cached_or_fetched('isbn:1', ttl=600)
print(f"Title: {result['name']}")
with open('.session_data.json', 'w') as f:
    json.dump(data, f)
"""


def test_a_cache_in_the_data_misses_once(session: MakeSession, run: Run) -> None:
    where = session()
    outputs = [run(where, CACHE)["stdout"] for _ in range(3)]
    assert outputs == ["Miss for isbn:1\nTitle: ISBN:1\n", *["Hit for isbn:1\nTitle: ISBN:1\n"] * 2]


@table(
    "data, printed",
    [
        ({}, "0 []\n"),
        ({"visits": "many", "readers": 7}, "0 []\n"),
        ({"visits": 3, "readers": ["mina"]}, "3 ['mina']\n"),
    ],
)
def test_a_program_can_use_defaults_and_check_types(
    session: MakeSession, run: Run, data: dict[str, Any], printed: str
) -> None:
    code = """
import json
with open('.session_data.json', 'r') as f:
    data = json.load(f)
visits = data.get('visits', 0)
readers = data.get('readers', [])
if not isinstance(visits, int):
    visits = 0
if not isinstance(readers, list):
    readers = []
print(visits, readers)
"""
    assert run(session(data=data), code)["stdout"] == printed


RECOVER = {
    "python": """
import json, os
SPOIL
try:
    with open('.session_data.json', 'r') as f:
        data = json.load(f)
except (OSError, ValueError) as error:
    print('defaults:', type(error).__name__)
    data = {'fresh': True}
with open('.session_data.json', 'w') as f:
    json.dump(data, f)
""",
    "node": """
const fs = require('fs');
SPOIL
let data = {};
try {
  const content = fs.readFileSync('.session_data.json', 'utf8');
  data = JSON.parse(content);
} catch (error) {
  console.log('defaults:', error.code || error.name);
  data = {fresh: true};
}
fs.writeFileSync('.session_data.json', JSON.stringify(data));
""",
}

RECOVER["typescript"] = (
    RECOVER["node"]
    .replace("const fs = require('fs');", "import * as fs from 'fs';")
    .replace("let data", "let data: { fresh?: boolean }")
    .replace("(error)", "(error: any)")
)

MISSING = {"python": "os.remove('.session_data.json')", "node": "fs.unlinkSync('.session_data.json');"}

CORRUPT = {
    "python": "open('.session_data.json', 'w').write('{oh')",
    "node": "fs.writeFileSync('.session_data.json', '{oh');",
}


@table("language", LANGUAGES)
@table(
    "spoil, python_error, node_error",
    [(MISSING, "FileNotFoundError", "ENOENT"), (CORRUPT, "JSONDecodeError", "SyntaxError")],
)
def test_a_program_recovers_from_a_missing_or_corrupt_file(
    session: MakeSession, run: Run, language: str, spoil: dict[str, str], python_error: str, node_error: str
) -> None:
    spoiling = spoil.get(language, spoil["node"])
    answer = run(session(language, data={"old": 1}), RECOVER[language].replace("SPOIL", spoiling))
    error = python_error if language == "python" else node_error
    assert (answer["stdout"], answer["stderr"]) == (f"defaults: {error}\n", "")
    assert (answer["data"], answer["state"]["committed"]) == ({"fresh": True}, True)


def test_an_async_function_of_node_saves_what_it_waited_for(session: MakeSession, run: Run) -> None:
    code = """
const fs = require('fs');
const fetched = () => new Promise((resolve) => setTimeout(() => resolve({ data: { name: 'Ada' } }), 20));
async function main() {
  const response = await fetched();
  console.log('Name:', response.data.name);
  const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
  data.last = response.data;
  fs.writeFileSync('.session_data.json', JSON.stringify(data, null, 2));
}
main().catch(console.error);
"""
    answer = run(session("node"), code)
    assert (answer["stdout"], answer["data"]) == ("Name: Ada\n", {"last": {"name": "Ada"}})

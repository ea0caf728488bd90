# ruff: noqa: E501  programs are as their users write them
"""What users learn first: data, metadata, environment, and the programs everybody writes with them.

Each program here has the shape of one from the users' guide, quoting included: one-liners, nested quotes in f-strings,
JSON escaped by hand for a shell.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import Run, Server

type MakeSession = Callable[..., str]

LANGUAGES = ("python", "node", "typescript")
SHELF: dict[str, Any] = {"visits": 0, "readers": ["mina", "otto"], "shelf": {"colour": "green", "room_for": 40}}

READ = {
    "python": """
import json
# what is on the shelf?
with open('.session_data.json', 'r') as f:
    data = json.load(f)
visits = data.get('visits', 0)
readers = data.get('readers', [])
print(f"Visits: {visits}")
print(f"Readers: {readers}")
print(f"Colour: {data['shelf']['colour']}")
""",
    "node": """
const fs = require('fs');
const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
console.log('Visits:', data.visits);
console.log('Readers:', data.readers);
console.log('Colour:', data.shelf.colour);
""",
    "typescript": """
import * as fs from 'fs';
interface Shelf {
  visits: number;
  readers: string[];
  shelf: {
    colour: string;
    room_for: number;
  };
  closed_at?: string;
}
const data: Shelf = JSON.parse(
  fs.readFileSync('.session_data.json', 'utf8')
);
console.log('Visits:', data.visits);
console.log('Readers:', data.readers);
console.log('Colour:', data.shelf.colour);
""",
}

UPDATE = {
    "python": """
import json
with open('.session_data.json', 'r') as f:
    data = json.load(f)
data['visits'] = data.get('visits', 0) + 1
data['readers'].append('zoë')
data['closed_at'] = '2031-05-06'
with open('.session_data.json', 'w') as f:
    json.dump(data, f, indent=2)
print(f"Visits now: {data['visits']}")
""",
    "node": """
const fs = require('fs');
const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
data.visits = (data.visits || 0) + 1;
data.readers.push('zoë');
data.closed_at = '2031-05-06';
fs.writeFileSync('.session_data.json', JSON.stringify(data, null, 2));
console.log(`Visits now: ${data.visits}`);
""",
    "typescript": """
import * as fs from 'fs';
interface Shelf { visits: number; readers: string[]; closed_at?: string }
const data: Shelf = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
data.visits = (data.visits || 0) + 1;
data.readers.push('zoë');
data.closed_at = '2031-05-06';
fs.writeFileSync('.session_data.json', JSON.stringify(data, null, 2));
console.log(`Visits now: ${data.visits}`);
""",
}

SHOW_VARIABLES = {
    "python": "import os\nfor name in NAMES: print(os.environ.get(name))",
    "node": "for (const name of NAMES) console.log(process.env[name] ?? 'None');",
    "typescript": "const names: string[] = NAMES;\nfor (const name of names) console.log(process.env[name] ?? 'None');",
}


def show(language: str, *names: str) -> str:
    return SHOW_VARIABLES[language].replace("NAMES", json.dumps(names))


# -- data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_program_reads_the_data_the_session_was_created_with(session: MakeSession, run: Run, language: str) -> None:
    answer = run(session(language, data=SHELF), READ[language])
    readers = "['mina', 'otto']" if language == "python" else "[ 'mina', 'otto' ]"
    assert answer["stdout"] == f"Visits: 0\nReaders: {readers}\nColour: green\n"
    assert (answer["exit_code"], answer["stderr"], answer["data"]) == (0, "", SHELF)


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_a_program_writes_is_the_data_of_the_answer_the_session_and_the_next_run(
    client: httpx.Client, session: MakeSession, run: Run, language: str
) -> None:
    where = session(language, data=SHELF)
    answer = run(where, UPDATE[language])
    changed = {**SHELF, "visits": 1, "readers": ["mina", "otto", "zoë"], "closed_at": "2031-05-06"}
    assert (answer["stdout"], answer["stderr"], answer["data"]) == ("Visits now: 1\n", "", changed)
    assert client.get(f"/api/sessions/{where}").json()["data"] == changed
    again = run(where, UPDATE[language])
    assert (again["stdout"], again["data"]["readers"]) == ("Visits now: 2\n", ["mina", "otto", "zoë", "zoë"])


def test_the_state_file_is_indented_json_in_the_working_directory(session: MakeSession, run: Run) -> None:
    data = {"name": "Ærø", "items": [1, {"deep": True}], "none": None}
    answer = run(session(data=data), "print(open('.session_data.json', encoding='utf-8').read(), end='')")
    assert answer["stdout"] == json.dumps(data, indent=2, ensure_ascii=False)


def test_changing_only_a_variable_changes_no_data(session: MakeSession, run: Run) -> None:
    where = session(data={"visits": 1})
    assert run(where, "import json; data = json.load(open('.session_data.json')); data['visits'] = 99")["data"] == {
        "visits": 1
    }


def test_a_one_line_counter_with_nested_quotes_counts_twice(session: MakeSession, run: Run) -> None:
    where = session(data={"laps": 0, "at": []})
    code = (
        'import json; from datetime import datetime; data = json.load(open(".session_data.json")); '
        'data["laps"] += 1; data["at"].append(datetime.now().isoformat()); '
        'json.dump(data, open(".session_data.json", "w")); print(f"Laps: {data["laps"]}")'
    )
    for lap in (1, 2):
        answer = run(where, code)
        assert (answer["exit_code"], answer["stdout"], answer["data"]["laps"]) == (0, f"Laps: {lap}\n", lap)
    assert len(answer["data"]["at"]) == 2
    assert answer["data"]["at"] == sorted(answer["data"]["at"])


# -- metadata ---------------------------------------------------------------------------------------------------

SEARCH = r"""
import hashlib, os, re
found = []
def search(where, content):
    for match in re.finditer(rb'PREFIX([0-9a-f]{32})', content):
        if hashlib.sha256(match[1]).hexdigest() == 'DIGEST':
            found.append(where)
for root in ('/workspace', '/tmp', '/dev/shm', '/etc', '/era', '/run', '/home', '/var', '/opt', '/mnt', '/srv'):
    for directory, _, names in os.walk(root):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and os.path.getsize(path) < 1 << 20:
                try: search(path, open(path, 'rb').read())
                except OSError: pass
looked = 0
for pid in filter(str.isdigit, os.listdir('/proc')):
    for name in ('environ', 'cmdline'):
        try: search(f'/proc/{pid}/{name}', open(f'/proc/{pid}/{name}', 'rb').read())
        except OSError: pass
with open('/proc/self/maps') as maps, open('/proc/self/mem', 'rb', buffering=0) as memory:
    for line in maps:
        span, permissions, *rest = line.split()
        if permissions.startswith('rw') and '[v' not in line:
            start, end = (int(part, 16) for part in span.split('-'))
            memory.seek(start)
            content = memory.read(end - start)
            looked += len(content)
            search(f'memory {line}', content)
assert looked > 1 << 20, looked
print(sorted(found))
"""


def canary() -> tuple[str, str]:
    """A secret, and a Python program that finds it in files, environments and memory without itself holding it."""
    secret = secrets.token_hex(16)
    program = SEARCH.replace("PREFIX", "kan[a]ry-").replace("DIGEST", hashlib.sha256(secret.encode()).hexdigest())
    return f"kanary-{secret}", program


def test_metadata_comes_back_and_is_never_visible_inside(client: httpx.Client, session: MakeSession, run: Run) -> None:
    secret, search = canary()
    labels = {"stage": "beta", "owner": {"team": "maps", "ids": [1, 2.5, None]}, "token": secret}
    where = session(metadata=labels, data={"n": 1})
    assert client.get(f"/api/sessions/{where}").json()["metadata"] == labels
    answer = run(where, search)
    assert (answer["stdout"], answer["stderr"]) == ("[]\n", "")
    assert answer["data"] == {"n": 1}
    assert "memory" in run(where, search, env={"SEEN": secret})["stdout"], "the search finds nothing at all"
    run(where, "import os; open('seen', 'w').write(os.environ['SEEN'])", env={"SEEN": secret})
    assert run(where, search)["stdout"] == "['/workspace/seen']\n", "the search finds nothing at all"


# -- environment ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
def test_env_is_seen_by_its_run_only(session: MakeSession, run: Run, language: str) -> None:
    where = session(language)
    code = show(language, "COLOUR", "EMPTY", "ODD")
    env = {"COLOUR": "blue", "EMPTY": "", "ODD": "a=b \"c\" 'd' $e\n\té"}
    assert run(where, code, env=env)["stdout"] == "\n".join([*env.values(), ""])
    assert run(where, code)["stdout"] == "None\nNone\nNone\n"


def test_an_env_value_is_in_no_later_run_no_answer_no_file_and_no_log(
    server: Server, client: httpx.Client, session: MakeSession, run: Run
) -> None:
    secret, search = canary()
    where = session()
    told = run(where, "import os, time; print(len(os.environ['KEY']))", env={"KEY": secret})
    assert told["stdout"] == f"{len(secret)}\n"
    assert run(where, search)["stdout"] == "[]\n"
    client.put(f"/api/sessions/{where}/code", json={"code": "1"})
    answers = [
        json.dumps(told),
        *(client.get(path).text for path in ("/api/sessions", f"/api/sessions/{where}?include=files", "/health")),
        client.patch(f"/api/sessions/{where}", json={"data": {}}).text,
        client.get("/metrics").text,
        server.log,
    ]
    assert [answer for answer in answers if secret in answer] == []
    holding = [
        str(path)
        for path in server.data_dir.rglob("*")
        if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes()
    ]
    assert holding == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_five_variables_tell_a_program_where_it_is_and_win_over_the_callers(
    client: httpx.Client, session: MakeSession, run: Run, language: str
) -> None:
    where = session(language, session_id=f"about-{language}")
    names = ("ERA_SESSION", "ERA_SESSION_ID", "ERA_LANGUAGE", "ERA_BASE_URL", "ERA_PROXY_URL", "ERA_OTHER")
    base = str(client.base_url).rstrip("/")
    expected = ["true", where, language, base, f"{base}/proxy/{where}"]
    forged = dict.fromkeys(names, "forged")
    assert run(where, show(language, *names))["stdout"].splitlines() == [*expected, "None"]
    assert run(where, show(language, *names), env=forged)["stdout"].splitlines() == [*expected, "forged"]


# -- programs everybody writes ----------------------------------------------------------------------------------

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


def test_a_bounded_list_stays_bounded(session: MakeSession, run: Run) -> None:
    where = session(data={"recent": list(range(98))})
    code = """
import json
with open('.session_data.json') as f:
    data = json.load(f)
data['recent'].append('new')
data['recent'] = data.get('recent', [])[-100:]
with open('.session_data.json', 'w') as f:
    json.dump(data, f)
"""
    sizes = [len(run(where, code)["data"]["recent"]) for _ in range(4)]
    assert sizes == [99, 100, 100, 100]


@pytest.mark.parametrize(
    ("data", "printed"),
    [
        ({}, "0 []\n"),
        ({"visits": "many", "readers": 7}, "0 []\n"),
        ({"visits": 3, "readers": ["mina"]}, "3 ['mina']\n"),
    ],
)
def test_a_program_can_do_with_defaults_and_check_types(
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


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(
    ("spoil", "python_error", "node_error"),
    [(MISSING, "FileNotFoundError", "ENOENT"), (CORRUPT, "JSONDecodeError", "SyntaxError")],
    ids=["missing", "corrupt"],
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


def test_an_async_function_of_typescript_saves_what_it_waited_for(session: MakeSession, run: Run) -> None:
    code = """
import * as fs from 'fs';
interface Person {
  name: string;
  books: number;
}
async function get<T>(url: string): Promise<{ data: T }> {
  return { data: JSON.parse(`{"name": "${url}", "books": 3}`) as T };
}
async function main(name: string): Promise<void> {
  const response = await get<Person>(
    `people/${name}`
  );
  console.log('Books:', response.data.books);
  const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
  data.person = response.data;
  fs.writeFileSync('.session_data.json', JSON.stringify(data, null, 2));
}
main('ada').catch(console.error);
"""
    answer = run(session("typescript"), code)
    assert (answer["stdout"], answer["stderr"]) == ("Books: 3\n", "")
    assert answer["data"] == {"person": {"name": "people/ada", "books": 3}}


# -- as typed into a shell --------------------------------------------------------------------------------------


def shell(server: Server, script: str, tmp_path: Path) -> list[Any]:
    """What each line of output of a user's shell script is as JSON. `pick KEY` stands for `jq .KEY`."""
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

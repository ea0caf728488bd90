"""What users learn first: data, metadata and environment variables.

Each program of these tests has the shape of one from the users' guide, quoting included.
"""

from __future__ import annotations

import hashlib
import json
import secrets

import httpx

from tests.api.guide import LANGUAGES, SHELF
from tests.conftest import MakeSession, Run, Server
from tests.table import table

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
    """A program that prints these variables, a line each."""
    return SHOW_VARIABLES[language].replace("NAMES", json.dumps(names))


@table("language", LANGUAGES)
def test_a_program_reads_the_data_the_session_was_created_with(session: MakeSession, run: Run, language: str) -> None:
    answer = run(session(language, data=SHELF), READ[language])
    readers = "['mina', 'otto']" if language == "python" else "[ 'mina', 'otto' ]"
    assert answer["stdout"] == f"Visits: 0\nReaders: {readers}\nColour: green\n"
    assert (answer["exit_code"], answer["stderr"], answer["data"]) == (0, "", SHELF)


@table("language", LANGUAGES)
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
    """A secret, and a Python program that finds it in files, environments and memory without holding it itself."""
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


@table("language", LANGUAGES)
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
    outcome = run(where, "import os, time; print(len(os.environ['KEY']))", env={"KEY": secret})
    assert outcome["stdout"] == f"{len(secret)}\n"
    assert run(where, search)["stdout"] == "[]\n"
    client.put(f"/api/sessions/{where}/code", json={"code": "1"})
    answers = [
        json.dumps(outcome),
        *(client.get(path).text for path in ("/api/sessions", f"/api/sessions/{where}?include=files", "/health")),
        client.patch(f"/api/sessions/{where}", json={"data": {}}).text,
        client.get("/metrics").text,
        server.log,
    ]
    assert [answer for answer in answers if secret in answer] == []
    holding = [
        str(path)
        for path in server.data_dir.parent.rglob("*")  # of each host, and what they share
        if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes()
    ]
    assert holding == []


@table("language", LANGUAGES)
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

"""What users do in a day, a function for each feature: it uses the feature in a session of its own, and asserts what
it gets. For the soak, which calls them at random, many at a time."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx

from era import Era, Session
from era.sdk.events import ProcessOutput
from tests.conftest import Server, eventually

KEY = "the-operators-key-of-the-soak"
APPEND = {
    "python": "open('log', 'a').write('x'); print(open('log').read(), end='')",
    "node": "const fs = require('fs'); fs.appendFileSync('log', 'x'); process.stdout.write(fs.readFileSync('log'))",
    "typescript": "import * as fs from 'node:fs'; fs.appendFileSync('log', 'x');\n"
    "process.stdout.write(fs.readFileSync('log') as Uint8Array)",
    "deno": "Deno.writeTextFileSync('log', 'x', {append: true}); console.log(Deno.readTextFileSync('log'))",
    "shell": "printf x >> log; cat log",
    "go": """package main
import ("fmt"; "os")
func main() {
	file, _ := os.OpenFile("log", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	file.WriteString("x"); file.Close()
	all, _ := os.ReadFile("log"); fmt.Print(string(all))
}""",
}
"""Programs that add a letter to a file and print it, by language."""

ANSWERS = "import json, os; open('got', 'a').write('x'); print(json.dumps({'status': 200, 'body': 'thanks'}))"
BAD = {
    "raises": ("raise SystemExit(3)", 60, {"failed"}),
    "aborts": ("import os; os.abort()", 60, {"killed"}),
    "never ends": ("while True: pass", 0.5, {"timeout"}),
    "takes all memory": ("held = [bytearray(b'x') * (1 << 20) for _ in range(1000)]", 60, {"oom", "failed"}),
    "fills its disk": ("for n in range(50): open(f'{n}', 'wb').write(bytes(1 << 20))", 60, {"disk_full"}),
    "leaves a daemon": ("import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)", 60, {"ok"}),
}
"""Programs that misbehave: their code, timeout in seconds, and the statuses that they may end with."""

LIMITS = {"memory_mb": 128, "pids": 64, "disk_mb": 16}
_PATIENCE_SECONDS = 120.0


@dataclass
class Day:
    """A server, and what its clients saw of it."""

    server: Server
    requests: Counter[str] = field(default_factory=Counter)
    """The ids of answered requests."""

    failed: dict[str, int] = field(default_factory=dict)
    """The status of those that the server refused or failed, by id."""

    runs: set[str] = field(default_factory=set)
    used: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    live: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(2))
    """An owner alone gets three live sessions of the six that there may be."""

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return self.server.client(headers=headers, event_hooks={"response": [self._note]}, timeout=180)

    def _note(self, answer: httpx.Response) -> None:
        with self.lock:
            request = answer.headers["X-Request-Id"]
            self.requests[request] += 1
            if answer.status_code >= 400:
                self.failed[request] = answer.status_code

    def use(self, name: str, seed: int) -> None:
        """Use one feature."""
        with self.client() as http, Era(self.server.url, api_key=KEY) as era:
            FEATURES[name](Visit(self, http, era, random.Random(seed)))
        with self.lock:
            self.used[name] += 1


@dataclass
class Visit:
    """One use of one feature."""

    day: Day
    http: httpx.Client
    era: Era
    chance: random.Random

    def call(self, method: str, path: str, expect: int = 200, **options: Any) -> httpx.Response:
        """Make a call; a server that says when to come back is asked again then."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            answer = self.http.request(method, path, **options)
            if answer.status_code == expect:
                return answer
            wait = answer.headers.get("Retry-After")
            told = (method, path, answer.status_code, answer.text)
            assert answer.status_code in (429, 503), told
            assert wait, told
            assert time.monotonic() < deadline, told
            time.sleep(min(float(wait), 5))

    def make(self, language: str = "python", **fields: Any) -> str:
        """Create a session, whose programs may take long: beside 40 others' processes, a first compiling took 33 s."""
        name = f"s{uuid4().hex[:12]}"
        long = {"default_timeout": _PATIENCE_SECONDS}
        body = {"language": language, "session_id": name, "limits": LIMITS, **long, **fields}
        self.call("POST", "/api/sessions", 201, json=body)
        return f"/api/sessions/{name}"

    def run(self, where: str, code: str, **fields: Any) -> dict[str, Any]:
        body: dict[str, Any] = self.call("POST", f"{where}/run", json={"code": code, **fields}).json()
        with self.day.lock:
            self.day.runs.add(body["run_id"])
        return body

    def remove(self, where: str) -> None:
        """Delete a session: for good, to be restored before, or by leaving it to its ttl."""
        match self.chance.randrange(3):
            case 0:
                self.call("DELETE", f"{where}?purge=true")
            case 1:
                self.call("DELETE", where)
                self.call("POST", f"{where}/restore")
                self.call("DELETE", where)
            case _:
                self.call("PATCH", where, json={"ttl": 1})


def runs_of(language: str) -> Callable[[Visit], None]:
    def runs(visit: Visit) -> None:
        where = visit.make(language)
        for count in range(1, 4):
            answer = visit.run(where, APPEND[language])
            assert (answer["status"], answer["stdout"].strip()) == ("ok", "x" * count), answer
        visit.remove(where)

    return runs


def bad_programs(visit: Visit) -> None:
    where = visit.make()
    for kind in visit.chance.sample(list(BAD), 2):
        code, timeout, statuses = BAD[kind]
        answer = visit.run(where, code, timeout=timeout, atomic=True)
        assert answer["status"] in statuses, (kind, answer)
    assert visit.run(where, APPEND["python"])["stdout"] == "x"
    visit.remove(where)


def bad_calls(visit: Visit) -> None:
    where = visit.make()
    visit.call("POST", f"{where}/run", 400, json={"code": 7})
    visit.call("GET", f"{where}/files/none", 404)
    visit.call("POST", f"{where}/rollback", 404, json={"version": 99})
    visit.call("GET", "/api/sessions/nobodys-session", 404)
    visit.call("POST", "/api/webhooks", 400, json={"url": "http://127.0.0.1/"})
    visit.call("GET", "/api/sessions", 401, headers={"Authorization": "Bearer wrong"})
    visit.remove(where)


def versions(visit: Visit) -> None:
    where = visit.make(data={"n": 0})
    for _ in range(3):
        visit.run(where, APPEND["python"])
    current = visit.call("GET", where).json()["version"]
    visit.call("PUT", f"{where}/versions/{current}/name", json={"name": "good"})
    visit.call("POST", f"{where}/rollback", json={"version": current - 1})
    assert visit.call("GET", f"{where}/files/log").text == "xx"
    assert visit.call("GET", f"{where}/versions/{current}/diff").is_success
    copy = visit.call("POST", f"{where}/duplicate", 201, json={}).json()["id"]
    assert visit.run(f"/api/sessions/{copy}", APPEND["python"])["stdout"] == "xxx"
    visit.remove(f"/api/sessions/{copy}")
    visit.remove(where)


def files(visit: Visit) -> None:
    where = visit.make()
    content = visit.chance.randbytes(visit.chance.choice([10, 100_000, 3_000_000]))
    visit.call("PUT", f"{where}/files/a/b.bin", content=content)
    assert visit.run(where, "import os; print(os.path.getsize('a/b.bin'))")["stdout"] == f"{len(content)}\n"
    visit.call("POST", f"{where}/move", json={"from": "a/b.bin", "to": "c.bin"})
    assert visit.call("GET", f"{where}/files/c.bin").content == content
    assert visit.call("GET", f"{where}/archive").is_success
    visit.call("DELETE", f"{where}/files/c.bin")
    visit.remove(where)


def long_output(visit: Visit) -> None:
    where = visit.make()
    answer = visit.run(where, "print('y' * 300_000)")
    assert visit.call("GET", f"{where}/runs/{answer['run_id']}/stdout").text == "y" * 300_000 + "\n"
    visit.remove(where)


def background(visit: Visit) -> None:
    where = visit.make()
    begun = visit.call("POST", f"{where}/run", 202, json={"code": APPEND["python"], "background": True}).json()[
        "run_id"
    ]
    record = eventually(lambda: _ended(visit.call("GET", f"{where}/runs/{begun}").json()), _PATIENCE_SECONDS)
    assert record["status"] == "ok", record
    visit.day.runs.add(begun)
    visit.remove(where)


def _ended(record: dict[str, Any]) -> dict[str, Any] | None:
    return record if record["status"] not in ("running", "waiting", "queued") else None


def execute(visit: Visit) -> None:
    body = {"language": "python", "code": "print(open('a').read())", "files": {"a": "one"}}
    answer = visit.call("POST", "/api/execute", json=body).json()
    assert answer["stdout"] == "one\n", answer


@contextmanager
def live_session(visit: Visit) -> Iterator[Session]:
    """A session that may be live within the block."""
    with visit.day.live:
        where = visit.make()
        yield visit.era.sessions.get(where.rpartition("/")[2])
        visit.call("POST", f"{where}/stop")
    visit.remove(where)


def contexts(visit: Visit) -> None:
    with live_session(visit) as session:
        context = session.context()
        for count in range(3):
            assert context.run(f"x = {count} if {count} == 0 else x + 1\nprint(x)").stdout == f"{count}\n"
        assert context.run("1 / 0").status == "failed"


def processes(visit: Visit) -> None:
    with live_session(visit) as session:
        process = session.process("cat > typed; echo done", stdin=True)
        process.write("hello")
        process.close_stdin()
        assert process.wait().exit_code == 0
        assert session.files.text("typed") == "hello"
        session.checkpoint()


def terminals(visit: Visit) -> None:
    with live_session(visit) as session:
        terminal = session.terminal()
        terminal.write("echo $((6 * 7))0 && exit\n")
        shown = b"".join(event.data for event in terminal.events() if isinstance(event, ProcessOutput))
        assert b"420" in shown, shown


def setups(visit: Visit) -> None:
    where = visit.make(setup={"commands": ["echo set-up > made"], "envs": {"WORD": "one"}})
    answer = visit.run(where, "import os; print(open('made').read(), os.environ['WORD'])")
    assert answer["stdout"] == "set-up\n one\n", answer
    visit.remove(where)


def inbox(visit: Visit) -> None:
    where = visit.make()
    visit.call("PUT", f"{where}/inbox", json={})
    visit.call("PUT", f"{where}/code", json={"code": ANSWERS})
    public = where.replace("/api/sessions/", "/proxy/") + "/inbox"
    for _ in range(2):
        visit.call("POST", public, 202, content=b"news")

    def seen() -> Any:
        return visit.call("GET", f"{where}/inbox").json()

    assert eventually(lambda: seen()["deliveries"]["done"] == 2, _PATIENCE_SECONDS), seen()
    assert visit.call("GET", f"{where}/files/got").text == "xx"
    visit.remove(where)


def public_url(visit: Visit) -> None:
    where = visit.make()
    visit.call("PUT", f"{where}/code", json={"code": "print('hello')"})
    assert "hello" in visit.call("GET", where.replace("/api/sessions/", "/proxy/") + "/80").text
    visit.remove(where)


def storage(visit: Visit) -> None:
    name = f"n{uuid4().hex[:8]}"
    visit.call("PUT", f"/api/storage/kv/{name}/k", json={"value": "v" * 100_000})
    assert visit.call("GET", f"/api/storage/kv/{name}/k").json()["value"] == "v" * 100_000
    visit.call("POST", f"/api/storage/d1/{name}/exec", json={"sql": "CREATE TABLE t (x); INSERT INTO t VALUES (42)"})
    rows = visit.call("POST", f"/api/storage/d1/{name}/query", json={"sql": "SELECT x FROM t"}).json()["results"]
    assert rows == [{"x": 42}]
    where = visit.make()
    code = f"from era_storage import kv; kv.set('{name}', 'p', 'program'); print(kv.get('{name}', 'k')[:2])"
    assert visit.run(where, code)["stdout"] == "vv\n"
    for kind in ("kv", "d1"):
        visit.call("DELETE", f"/api/storage/{kind}/{name}")
    visit.remove(where)


def capsules(visit: Visit) -> None:
    where = visit.make(data={"n": 7})
    visit.run(where, APPEND["python"])
    packed = b"".join(visit.era.sessions.get(where.rpartition("/")[2]).export_pieces())
    there = visit.era.sessions.import_(packed, id=f"i{uuid4().hex[:12]}")
    assert visit.run(f"/api/sessions/{there.id}", APPEND["python"])["stdout"] == "xx"
    visit.remove(f"/api/sessions/{there.id}")
    visit.remove(where)


def keys(visit: Visit) -> None:
    body = {"owner": f"o{visit.chance.randrange(5)}", "scopes": ["read", "run", "write"]}
    key = visit.call("POST", "/api/keys", 201, json=body).json()
    headers = {"Authorization": f"Bearer {key['key']}"}
    name = visit.call("POST", "/api/sessions", 201, json={"language": "python"}, headers=headers).json()["id"]
    visit.call("GET", f"/api/sessions/{name}", 404)
    visit.call("DELETE", f"/api/sessions/{name}?purge=true", headers=headers)
    visit.call("DELETE", f"/api/keys/{key['id']}")
    assert visit.call("GET", "/api/audit", params={"limit": 5}).json()["entries"]


def webhooks(visit: Visit) -> None:
    made = visit.call("POST", "/api/webhooks", 201, json={"url": "http://203.0.113.7/era"}).json()["id"]
    where = visit.make()
    assert visit.call("GET", f"/api/webhooks/{made}/deliveries").json()["count"] >= 1
    visit.call("DELETE", f"/api/webhooks/{made}")
    visit.remove(where)


def watched(visit: Visit) -> None:
    for path in ("/health", "/ready", "/metrics", "/api/usage", "/api/quotas", "/api/sessions", "/"):
        visit.call("GET", path)


FEATURES: dict[str, Callable[[Visit], None]] = {
    **{f"runs of {language}": runs_of(language) for language in APPEND},
    **{
        each.__name__: each
        for each in (
            bad_programs,
            bad_calls,
            versions,
            files,
            long_output,
            background,
            execute,
            contexts,
            processes,
            terminals,
            setups,
            inbox,
            public_url,
            storage,
            capsules,
            keys,
            webhooks,
            watched,
        )
    },
}

"""Move what a server of an older checkout keeps into a new data directory: see scripts/move-data.

The old checkout's server serves the old data, and this one's server the new, both on loopback and for nobody else.
Sessions go over as capsules, keys and objects by the storage API; SQL databases are copied as files once the old server
has ended. What no API shows (digests of keys, secrets of inboxes, quotas) is read from the old database by the old
checkout's Python, and written last, so that no quota or webhook is in force meanwhile.

Each step leaves out what is there already, so a move that was interrupted goes on where it is repeated.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from sqlalchemy import insert, select, update

from era.core.models import DEFAULT_OWNER
from era.operation.backup import copy_database
from era.store import place
from era.store.engine import dialects
from era.store.engine.tables import api_keys, inboxes, owners, sessions, webhooks

MARK = "moving-from"
"""The file of the new data directory that names the old one, until all is moved."""

LOGS = ("moving-old.log", "moving-new.log")
"""The logs of both servers in the new data directory, until all is moved."""

TEMPORARY = "made by scripts/move-data, which deletes it"
"""The description of the keys that a move makes to act for owners."""

WEBHOOK_KEY = "webhook-key"
"""The file that the secrets of webhooks are derived from. Those of links and sites stay behind: both name sessions by
numbers, which are others in the new database, so an old address would lead to another session."""

START_SECONDS, STOP_SECONDS, CALL_SECONDS, SHOWN_EACH_SECONDS = 600, 120, 3600, 2
TRIES = 5
PR_SET_PDEATHSIG = 1

READ = """
import json, os, sys
from sqlalchemy import create_engine, func, select
from era.store.engine import tables as t

url = f"sqlite:///{sys.argv[1]}/era.sqlite"
try:
    from pathlib import Path
    from era.store import place
    url = place.rows_url(Path(sys.argv[1]), os.environ.get("ERA_DATABASE_URL"))
except ImportError:  # a checkout without PostgreSQL
    pass
s, present = t.sessions, t.sessions.c.deleted_at.is_(None)
with create_engine(url.replace("postgresql:", "postgresql+psycopg:", 1)).connect() as connection:
    def rows(statement):
        return [dict(row._mapping) for row in connection.execute(statement)]

    def named(name):
        table = t.metadata.tables.get(name)
        return [] if table is None else rows(select(table))

    found = {name: named(name) for name in ("api_keys", "owners", "webhooks")}
    found["sessions"] = rows(select(s.c.key, s.c.owner, s.c.id, s.c.api_key_id).where(present))
    found["inboxes"] = named("inboxes")
    places = {row["owner"] for name in ("sessions", "api_keys", "owners", "webhooks") for row in found[name]}
    places |= {row["owner"] for row in rows(select(t.storage_items.c.owner).distinct())}
    found["every_owner"] = sorted(places)
    left = {
        "deliveries": "deliveries to inboxes", "webhook_notices": "deliveries to webhooks", "usage": "rows of usage",
        "audit": "entries of the audit log", "processes": "records of processes",
    }
    found["left"] = {
        name: connection.execute(select(func.count()).select_from(t.metadata.tables[table])).scalar()
        for table, name in left.items() if table in t.metadata.tables
    }
    found["left"]["deleted sessions"] = connection.execute(
        select(func.count()).select_from(s).where(~present)
    ).scalar()
print(json.dumps(found))
"""
"""The program that reads, by the old code, the rows that no API shows."""


class Problem(Exception):
    """A reason why nothing can be moved."""


@dataclass(slots=True)
class Report:
    """What was moved, was there already, and could not be moved."""

    moved: Counter[str] = field(default_factory=Counter)
    there: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    """Why, by what."""

    shown_at: float = 0.0

    def progress(self, text: str) -> None:
        """Show how far the move is, not too often."""
        if time.monotonic() > self.shown_at + SHOWN_EACH_SECONDS:
            self.shown_at = time.monotonic()
            print(f"  {text}", flush=True)

    def show(self, left: Mapping[str, int]) -> None:
        """Print the counts. `left` has how many there are of kinds that are never moved."""
        for kind in sorted(self.moved | self.there):
            there = f" ({self.there[kind]} more were there already)" if self.there[kind] else ""
            print(f"moved      {self.moved[kind]} {kind}{there}")
        for name, count in left.items():
            if count:
                print(f"left       {count} {name}")
        print("left       addresses of sites and signed links: sessions get new ones")
        for name, why in self.failed.items():
            print(f"FAILED     {name}: {why}")


class Api:
    """Calls of a server for one owner. Raises Problem for what it refuses."""

    def __init__(self, url: str, key: str) -> None:
        self._client = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=CALL_SECONDS, trust_env=False
        )

    def __call__(self, method: str, path: str, **options: Any) -> Any:
        """The answer's JSON. What may be tried again is."""
        for _ in range(TRIES):
            answer = self._client.request(method, path, **options)
            if answer.status_code not in (429, 503):
                break
            time.sleep(float(answer.headers.get("Retry-After", "1")))
        if answer.is_error:
            raise Problem(_reason(answer))
        return answer.json()

    def pages(self, path: str, name: str) -> Iterator[Any]:
        """All items of a paged list."""
        cursor = ""
        while True:
            page = self("GET", path, params={"limit": "100"} | ({"cursor": cursor} if cursor else {}))
            yield from page[name]
            cursor = page.get("next_cursor") or ""
            if not cursor:
                return

    @contextmanager
    def downloading(self, path: str) -> Iterator[Iterator[bytes]]:
        """The body of an answer, in pieces."""
        with self._client.stream("GET", path) as answer:
            if answer.is_error:
                answer.read()
                raise Problem(_reason(answer))
            yield answer.iter_bytes()

    def close(self) -> None:
        self._client.close()


def _reason(answer: httpx.Response) -> str:
    try:
        return f"{answer.status_code} {answer.json()['error']}"
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.text[:200]}"


def _environment(prefix: str, data: Path) -> dict[str, str]:
    """The environment of a server: the settings whose names begin with this prefix. It is alone and on loopback."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ERA_", "OLD_ERA_"))}
    settings = {
        name.removeprefix("OLD_"): value for name, value in os.environ.items() if name.startswith(f"{prefix}ERA_")
    }
    return environment | settings | {"ERA_DATA_DIR": str(data), "ERA_HOST": "127.0.0.1", "ERA_PORT": "0"}


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@contextmanager
def _served(command: list[str], environment: dict[str, str], log_path: Path) -> Iterator[tuple[str, str]]:
    """The URL of a server, and the operator's key, until the block ends. Raises Problem where it doesn't start."""
    key = secrets.token_urlsafe(32)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment | {"ERA_API_KEY": key}, stdout=log, stderr=log, preexec_fn=_end_with_parent
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (found := re.search(r"http://127\.0\.0\.1:[1-9]\d*", log_path.read_text(errors="replace"))):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise Problem(f"{command[0]} doesn't serve: {log_path.read_text(errors='replace').strip()}")
                time.sleep(0.1)
            yield found[0], key
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


@contextmanager
def _acting(url: str, operator_key: str, owner: str) -> Iterator[Api]:
    """Calls for an owner, with a key that is there until the block ends."""
    operator = Api(url, operator_key)
    try:
        for key in operator("GET", "/api/keys")["keys"]:
            if key["description"] == TEMPORARY:
                operator("DELETE", f"/api/keys/{key['id']}")
        if owner == DEFAULT_OWNER:
            yield operator
            return
        made = operator("POST", "/api/keys", json={"owner": owner, "description": TEMPORARY})
        api = Api(url, made["key"])
        try:
            yield api
        finally:
            api.close()
            operator("DELETE", f"/api/keys/{made['id']}")
    finally:
        operator.close()


def _items(api: Api, kind: str) -> list[str]:
    """The paths of all items in an owner's storage, of this kind."""
    paths: list[str] = []
    while True:
        page = api("GET", "/api/resources/list", params={"type": kind, "limit": "1000", "offset": str(len(paths))})
        paths += [
            f"/api/storage/{kind}/{quote(item['namespace'], safe='')}/{quote(item['key'], safe='')}"
            for item in page["resources"]
        ]
        if not page["has_more"]:
            return paths


def _move_storage(owner: str, old: Api, new: Api, report: Report) -> None:
    for kind, name in (("kv", "keys of KV"), ("r2", "objects of R2")):
        there, paths = set(_items(new, kind)), _items(old, kind)
        for number, path in enumerate(paths):
            report.progress(f"{owner}: {name}, {number} of {len(paths)}")
            if path in there:
                report.there[name] += 1
                continue
            try:
                found = old("GET", path)
                metadata = found.get("metadata") if kind == "kv" else found.get("customMetadata")
                content = {"value": found["value"]} if kind == "kv" else {"content": found["content"]}
                new("PUT", path, json=content | ({"metadata": metadata} if metadata else {}))
                report.moved[name] += 1
            except (Problem, httpx.HTTPError) as problem:
                report.failed[f"{owner}: {path}"] = str(problem)


def _move_sessions(owner: str, old: Api, new: Api, report: Report) -> None:
    there = {session["id"] for session in new.pages("/api/sessions", "sessions")}
    ids = [session["id"] for session in old.pages("/api/sessions", "sessions")]
    for number, session_id in enumerate(reversed(ids)):  # the oldest first, so that lists keep their order
        report.progress(f"{owner}: sessions, {number} of {len(ids)}")
        if session_id in there:
            report.there["sessions"] += 1
            continue
        try:
            with old.downloading(f"/api/sessions/{quote(session_id, safe='')}/capsule") as pieces:
                headers = {"Content-Type": "application/x-tar"}
                new("POST", "/api/sessions/import", params={"public": "true"}, headers=headers, content=pieces)
            report.moved["sessions"] += 1
        except (Problem, httpx.HTTPError) as problem:
            report.failed[f"{owner}: session {session_id}"] = str(problem)


def _copy_databases(old_data: Path, new_data: Path, report: Report) -> None:
    """Copy programs' SQL databases, page by page. Both servers have ended."""
    for source in sorted((old_data / "storage/sql").glob("*/*.sqlite")):
        target = new_data / source.relative_to(old_data)
        if target.exists():
            report.there["SQL databases"] += 1
            continue
        draft = new_data / "moving.sqlite"
        draft.unlink(missing_ok=True)
        try:
            copy_database(source, draft)
        except Exception as error:
            report.failed[str(source)] = str(error)
            continue
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft.rename(target)
        report.moved["SQL databases"] += 1


def _write_rows(url: str, found: Mapping[str, Any], report: Report) -> None:
    """Store the rows that no API shows, all in one transaction: digests of keys, quotas, webhooks and inboxes."""
    engine = dialects.connect(url).writer
    kept = [row for row in found["api_keys"] if row["description"] != TEMPORARY]
    with engine.begin() as connection:
        are_present = select(sessions).where(sessions.c.deleted_at.is_(None))
        keys = {(row.owner, row.id): row.key for row in connection.execute(are_present)}
        for session in found["sessions"]:
            if (key := keys.get((session["owner"], session["id"]))) is not None:
                made_with = {"api_key_id": session["api_key_id"]}
                connection.execute(update(sessions).where(sessions.c.key == key).values(made_with))
        of_old = {session["key"]: keys.get((session["owner"], session["id"])) for session in found["sessions"]}
        settings = [
            row | {"session_key": of_old[row["session_key"]]}
            for row in found["inboxes"]
            if of_old.get(row["session_key"]) is not None
        ]
        for name, table, column, rows in (
            ("API keys", api_keys, "id", kept),
            ("quotas of owners", owners, "owner", found["owners"]),
            ("webhooks", webhooks, "id", found["webhooks"]),
            ("inboxes", inboxes, "session_key", settings),
        ):
            there = set(connection.execute(select(table.c[column])).scalars())
            for row in rows:
                if row[column] in there:
                    report.there[name] += 1
                else:
                    connection.execute(insert(table).values({each: row[each] for each in row if each in table.c}))
                    report.moved[name] += 1
    engine.dispose()


def _begin(old_data: Path, new_data: Path) -> None:
    """Take the new data directory for this move. Raises Problem where it is used for something else."""
    if not (old_data / "era.sqlite").is_file() and not (old_data / place.NOTE).is_file():
        raise Problem(f"{old_data} is no data directory.")
    mark = new_data / MARK
    if mark.is_file() and mark.read_text() == str(old_data):
        print("Going on with what was begun.")
        return
    if new_data.exists() and any(new_data.iterdir()):
        raise Problem(f"{new_data} has something in it already: name a new directory.")
    new_data.mkdir(mode=0o700, parents=True, exist_ok=True)
    mark.write_text(str(old_data))
    if (old_data / WEBHOOK_KEY).exists():
        shutil.copy2(old_data / WEBHOOK_KEY, new_data / WEBHOOK_KEY)


def move(old_checkout: Path, old_data: Path, new_data: Path) -> bool:
    """Move everything that can be moved, and print what was; whether that was everything. Raises Problem."""
    python, command = old_checkout / ".venv/bin/python", old_checkout / ".venv/bin/era"
    if not command.exists():
        raise Problem(f"{old_checkout} has no .venv/bin/era: run `make setup` there.")
    _begin(old_data, new_data)
    report = Report()
    old_environment, new_environment = _environment("OLD_", old_data), _environment("", new_data)
    with ExitStack() as both:
        print(f"Starting the server of {old_checkout} on {old_data}, and this one on {new_data}.", flush=True)
        old_url, old_key = both.enter_context(_served([str(command), "serve"], old_environment, new_data / LOGS[0]))
        new_command = [sys.executable, "-m", "era.client.cli", "serve"]
        new_url, new_key = both.enter_context(_served(new_command, new_environment, new_data / LOGS[1]))
        done = subprocess.run(
            [python, "-c", READ, old_data], env=old_environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Problem(f"The old rows can't be read: {done.stderr.strip()}")
        found = json.loads(done.stdout)
        for owner in found["every_owner"]:
            with _acting(old_url, old_key, owner) as old, _acting(new_url, new_key, owner) as new:
                _move_storage(owner, old, new, report)
                _move_sessions(owner, old, new, report)
    _copy_databases(old_data, new_data, report)
    _write_rows(place.rows_url(new_data, new_environment.get("ERA_DATABASE_URL")), found, report)
    report.show(found["left"])
    if not report.failed:
        for name in (*LOGS, MARK):
            (new_data / name).unlink()
    return not report.failed


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: scripts/move-data OLD_CHECKOUT OLD_DATA NEW_DATA")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        is_complete = move(*(Path(name).resolve() for name in sys.argv[1:]))
    except Problem as problem:
        raise SystemExit(f"move-data: {problem}") from None
    if not is_complete:
        raise SystemExit("move-data: not everything was moved; what FAILED is tried again when you repeat this.")
    print("Everything was moved. Start the new server on it, and keep the old data until you have looked.")


if __name__ == "__main__":
    main()

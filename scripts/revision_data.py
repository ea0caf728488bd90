#!/usr/bin/env python3
"""revision_data.py [REVISION...]: make tests/operation/revisions/REVISION.json, for each revision of the schema or
those named: what a server wrote whose newest migration that was.

The last commit with that revision is checked out aside and serves with its own code, and with the present packages
besides those that only old ones need. It is called over HTTP for all that the tests look at, as far as it knows of it;
then its database is written down as SQL, and its blobs beside that. `answers` is what it said itself of what it has. As
root, in a checkout with its history.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = "src/era/store/migrations/versions"
TARGET = ROOT / "tests/operation/revisions"
OPERATOR = "open sesame"
OLD_PACKAGES = ("cyclopts",)
PROGRAM = """
import json
with open(".session_data.json") as file:
    data = json.load(file)
data["n"] = data.get("n", 0) + 1
with open(".session_data.json", "w") as file:
    json.dump(data, file)
with open("runs.txt", "a") as file:
    file.write("run %d\\n" % data["n"])
print("n is", data["n"])
"""


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def commits() -> dict[str, str]:
    """The last commit with each revision as its newest, of those whose migrations are the present ones so far."""
    found: dict[str, str] = {}
    present = sorted(path.name for path in (ROOT / VERSIONS).glob("0*.py"))
    for commit in git("rev-list", "--date-order", "HEAD").split():
        listed = git("ls-tree", "--name-only", commit, f"{VERSIONS}/").split()
        names = sorted(name.rpartition("/")[2] for name in listed if name.rpartition("/")[2].startswith("0"))
        if names and names == present[: len(names)]:
            found.setdefault(names[-1][:4], commit)
    return found


def install_old_packages(directory: str) -> None:
    """What some of these commits import that the present one doesn't, into a directory."""
    uv = shutil.which("uv") or str(ROOT / ".tools/bin/uv")
    command = [uv, "pip", "install", "-q", "--python", sys.executable, "--target", directory, *OLD_PACKAGES]
    subprocess.run(command, check=True)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """The tree of a commit, in a directory of its own."""
    with tempfile.TemporaryDirectory(prefix="era-revision-") as directory:
        archive = subprocess.Popen(
            ["git", "archive", commit, "src", "pyproject.toml"], cwd=ROOT, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", directory], stdin=archive.stdout, check=True)
        archive.wait()
        os.chmod(directory, 0o755)  # noqa: S103 (users of sandboxes read what is mounted of it)
        yield Path(directory)


@contextmanager
def served(tree: Path, data_dir: Path, packages: str) -> Iterator[str]:
    """The URL of a server of that tree, which ends with the block."""
    [(module, function)] = re.findall(r'^era = "([\w.]+):(\w+)"', (tree / "pyproject.toml").read_text(), re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ERA_")}
    environment |= {"PYTHONPATH": f"{tree / 'src'}:{packages}", "ERA_API_KEY": OPERATOR, "ERA_PORT": "0"}
    environment |= {"ERA_DATA_DIR": str(data_dir), "ERA_ISOLATION": "bubblewrap"}
    log = data_dir.with_suffix(".log")
    start = f"import sys; sys.argv = ['era', 'serve']; from {module} import {function}; sys.exit({function}())"
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-c", start], env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 180
        while not (found := re.search(r"http://127\.0\.0\.1:[1-9]\d*", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"it does not serve:\n{log.read_text()}")
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)


class Calls:
    """Calls of a server that may not know what is asked for."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.answers: dict[str, Any] = {}

    def call(self, method: str, path: str, body: Any = None, key: str = OPERATOR) -> Any:
        """The answer: JSON, or text; None where the server knows no such call."""
        content = {"content": body} if isinstance(body, str) else {"json": body} if body is not None else {}
        headers = {"Authorization": f"Bearer {key}"}
        answer = httpx.request(method, self._url + path, headers=headers, timeout=120, **content)
        if answer.status_code in (404, 405):
            return None
        if answer.is_error:
            raise SystemExit(f"{method} {path}: {answer.status_code} {answer.text}")
        return answer.json() if answer.text[:1] in ("{", "[") else answer.text

    def keep(self, path: str, key: str = OPERATOR) -> None:
        """Remember what it answers to a GET, if anything."""
        if (answer := self.call("GET", path, key=key)) is not None:
            self.answers[path] = answer


def use(calls: Calls) -> None:
    """Have a server keep some of everything."""
    call = calls.call
    where = "/api/sessions/kept"
    made = {"language": "python", "session_id": "kept", "data": {"n": 0, "who": "é"}, "metadata": {"team": "red"}}
    call("POST", "/api/sessions", {**made, "allowPublicAccess": True})
    call("PUT", f"{where}/files/notes/first.txt", "one\ntwo\n")
    call("PUT", f"{where}/files/large.txt", "line of a file that is a blob by itself\n" * 100)
    for _ in range(2):
        call("POST", f"{where}/run", {"code": PROGRAM})
    call("PUT", f"{where}/versions/4/name", {"name": "good"})
    call("PUT", f"{where}/code", {"code": PROGRAM})
    if call("PUT", f"{where}/inbox", {}) is not None:
        call("POST", "/proxy/kept/inbox/news", "what came in")
        for _ in range(300):
            if [each["status"] for each in call("GET", f"{where}/inbox/deliveries")["deliveries"]] == ["done"]:
                break
            time.sleep(0.2)
    call("PUT", "/api/storage/kv/app/color", {"value": "green"})
    call("PUT", "/api/storage/r2/app/object.txt", {"content": base64.b64encode(b"an object\n" * 50).decode()})
    call("POST", "/api/webhooks", {"url": "http://203.0.113.7/era"})
    call("POST", "/api/sessions", {"language": "python", "session_id": "gone", "data": {"n": 1}})
    call("DELETE", "/api/sessions/gone")
    key = call("POST", "/api/keys", {"owner": "ada", "description": "of ada"})
    if key is not None:
        calls.answers["key"] = key["key"]
        call("POST", "/api/sessions", {"language": "python", "session_id": "own", "data": {"n": 7}}, key["key"])
        calls.keep("/api/sessions/own", key["key"])
    for path in ("", "/files", "/versions", "/versions/1", "/runs", "/code", "/inbox", "/inbox/deliveries"):
        calls.keep(where + path)
    for path in ("notes/first.txt", "large.txt", "runs.txt"):
        calls.keep(f"{where}/files/{path}")
    calls.keep(f"{where}/versions/2/files/notes/first.txt")
    for run in calls.answers.get(f"{where}/runs", {}).get("runs", ()):
        calls.keep(f"{where}/runs/{run['run_id']}/stdout")
    for path in ("/api/storage/kv/app/color", "/api/storage/r2/app/object.txt", "/api/webhooks"):
        calls.keep(path)


def written_down(data_dir: Path) -> dict[str, Any]:
    """The database of a server that has ended, as SQL, and its blobs, as text where they are."""
    with closing(sqlite3.connect(data_dir / "era.sqlite")) as connection:
        sql = list(connection.iterdump())
    blobs = {}
    for path in sorted((data_dir / "blobs").glob("*/*")):
        if path.is_file() and re.fullmatch(r"[0-9a-f]{64}", path.name):
            content: Any = {"base64": base64.b64encode(path.read_bytes()).decode()}
            with suppress(UnicodeDecodeError):
                content = path.read_text("utf-8")
            blobs[path.name] = content
    return {"sql": sql, "blobs": blobs}


def main() -> None:
    found = commits()
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="era-packages-") as packages:
        install_old_packages(packages)
        for revision in sys.argv[1:] or sorted(found):
            with checked_out(found[revision]) as tree:
                data_dir = tree / "data"
                with served(tree, data_dir, packages) as url:
                    calls = Calls(url)
                    use(calls)
                kept = {"commit": found[revision], "answers": calls.answers, **written_down(data_dir)}
            text = json.dumps(kept, indent=1, ensure_ascii=False)
            (TARGET / f"{revision}.json").write_text(text + "\n")
            print(revision, found[revision][:8], len(calls.answers), "answers", len(text), "bytes", flush=True)


if __name__ == "__main__":
    main()

"""What earlier revisions of the schema left, as their own programs wrote it: the present one migrates it, and all that
they answered is still there. `revisions` has a file of each; scripts/revision_data.py makes them."""

from __future__ import annotations

import base64
import json
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Boolean, MetaData, inspect, text

from era.operation.check import check
from era.operation.server_data import ServerData
from era.store import migrations
from tests.client.command import era
from tests.conftest import Server, eventually
from tests.owners import mine
from tests.store.rows import engine_of, make_at_revision, opened

REVISIONS = sorted(Path(__file__).with_name("revisions").glob("*.json"))
MIGRATIONS = Path(migrations.__file__).with_name("versions")
SERVED = {REVISIONS[0].stem, REVISIONS[-1].stem}
"""Those that are served in every run of the tests, and migrated in PostgreSQL. With the others only a soak does more
than to migrate them in SQLite: the first of these passes all later migrations, too."""

OPERATOR = "open sesame"
KEPT = "/api/sessions/kept"

type Json = dict[str, Any]


def put_back(revision: Path, directory: Path) -> Json:
    """Make the data directory that a server of this revision left; what it had answered, by path."""
    kept: Json = json.loads(revision.read_text())
    directory.mkdir(mode=0o700)
    with closing(sqlite3.connect(directory / "era.sqlite")) as connection:
        connection.executescript("\n".join(kept["sql"]))
    for digest, content in kept["blobs"].items():
        path = directory / "blobs" / digest[:2] / digest
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else base64.b64decode(content["base64"]))
    answers: Json = kept["answers"]
    return answers


def copy_rows(source: str, target: str) -> None:
    """Fill the tables of a PostgreSQL database with the rows of an SQLite one of the same revision."""
    tables, reading, writing = MetaData(), engine_of(source), engine_of(target)
    tables.reflect(writing)
    with reading.connect() as old, writing.begin() as new:
        for table in tables.sorted_tables:
            if table.name == "alembic_version":
                continue
            flags = {column.name for column in table.columns if isinstance(column.type, Boolean)}
            for row in old.execute(text(f'SELECT * FROM "{table.name}"')).mappings():
                values = {
                    name: bool(value) if name in flags and value is not None else value for name, value in row.items()
                }
                new.execute(table.insert().values(values))
            key = table.autoincrement_column
            if key is not None and not isinstance(key.type, Boolean):
                sequence = f"pg_get_serial_sequence('{table.name}', '{key.name}')"
                new.execute(text(f"SELECT setval({sequence}, max({key.name})) FROM {table.name} HAVING count(*) > 0"))
    reading.dispose()
    writing.dispose()


def test_each_revision_has_its_data() -> None:
    """All but the newest, whose data are made before the next one is added."""
    names = sorted(path.name[:4] for path in MIGRATIONS.glob("[0-9]*.py"))
    assert len(names) > 20
    assert set(names[:-1]) <= {path.stem for path in REVISIONS}


@pytest.mark.parametrize(
    ("revision", "database"),
    [
        *(pytest.param(path, "sqlite", id=f"{path.stem}-sqlite") for path in REVISIONS),
        *(
            pytest.param(
                path, "postgresql", id=f"{path.stem}-postgresql", marks=[] if path.stem in SERVED else pytest.mark.soak
            )
            for path in REVISIONS
        ),
    ],
)
async def test_its_rows_are_migrated(
    revision: Path, database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    directory = tmp_path / "data"
    answers = put_back(revision, directory)
    url = f"sqlite:///{directory}/era.sqlite"
    if database == "postgresql":
        target = str(request.getfixturevalue("empty_postgres_url"))
        make_at_revision(target, revision.stem)
        copy_rows(url, target)
        (directory / "era.sqlite").unlink()
        url = target
    async with opened(url) as store:
        session = await store.session(mine("kept"))
        old = answers[KEPT]
        assert (session.version, json.loads(session.data)["n"]) == (old["version"], old["data"]["n"])
        assert session.metadata == {"team": "red"}
        versions = await store.versions(mine("kept"), limit=100, before=None)
        told = answers.get(f"{KEPT}/versions", {"versions": [{"version": old["version"]}]})["versions"]
        assert [version.n for version in versions] == [version["version"] for version in told]
        runs = answers.get(f"{KEPT}/runs", {"runs": []})["runs"]
        records = await store.runs(session.key, 100)
        assert {(run.code, str(run.invocation)) for run in records} == {(None, "{}")}
        assert session.record_code
        found = [run.id for run in records]
        assert len(found) >= 2
        assert not runs or found == [run["run_id"] for run in runs]
    engine = engine_of(url)
    assert "webhooks" in inspect(engine).get_table_names()
    engine.dispose()
    if database == "sqlite":
        assert check(ServerData(directory), lambda _: lambda _: None).problems == []


@pytest.mark.parametrize(
    "revision",
    [path if path.stem in SERVED else pytest.param(path, marks=pytest.mark.soak) for path in REVISIONS],
    ids=[path.stem for path in REVISIONS],
)
def test_its_sessions_go_on(revision: Path, tmp_path: Path) -> None:
    answers = put_back(revision, tmp_path / "data")
    server = Server(tmp_path / "data", {"ERA_API_KEY": OPERATOR}).start()
    with ExitStack() as closed:
        closed.callback(server.stop)

        def calling(key: str) -> httpx.Client:
            return closed.enter_context(server.client(headers={"Authorization": f"Bearer {key}"}))

        client = calling(OPERATOR)
        files = {path: answer for path, answer in answers.items() if "/files/" in path or path.endswith("/stdout")}
        assert {path: client.get(path).text for path in files} == files
        session = client.get(KEPT).json()
        assert {name: session[name] for name in ("created_at", "version")} == {
            name: answers[KEPT][name] for name in ("created_at", "version")
        }
        code = client.get(f"{KEPT}/code").json()["code"]
        n = answers[KEPT]["data"]["n"] + 1
        assert client.post(f"{KEPT}/run", json={"code": code}).json()["stdout"] == f"n is {n}\n"
        newest, before = client.get(f"{KEPT}/runs").json()["runs"][:2]
        assert (newest["code"], before["code"], before["code_truncated"]) == (code[:200], None, False)
        assert client.get(f"{KEPT}/files/runs.txt").text == "".join(f"run {each}\n" for each in range(1, n + 1))
        for path in ("/api/storage/kv/app/color", "/api/storage/r2/app/object.txt"):
            if path in answers:
                assert client.get(path).json().items() >= answers[path].items()
        if "key" in answers:
            ada = calling(answers["key"])
            assert ada.get("/api/sessions/own").json()["data"] == {"n": 7}
            assert ada.get(KEPT).status_code == 404
        if f"{KEPT}/inbox" in answers:
            assert client.post("/proxy/kept/inbox/more").status_code == 202
            assert eventually(lambda: client.get(f"{KEPT}/inbox").json()["deliveries"]["done"] == 2)
        assert client.post("/api/sessions", json={"language": "python", "session_id": "new"}).status_code == 201
    era(None, "check", "--data-dir", tmp_path / "data", code=0)

"""Collections of garbage that come early, as the disk fills: they remove what nothing names, and nothing else."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests.api.live import ended, start
from tests.capsules import packed
from tests.conftest import MakeServer, Server, eventually
from tests.soaking import soak_the_rest

pytestmark = pytest.mark.one_host("a cluster collects once an hour, however much is written")

BEFORE_EACH_ROW = """
import asyncio, functools
from era import app
from era.core.operation import garbage
from era.core.trees import snapshots
from era.store.metadata import SqlStore
from era.store.storage_items import StorageItemRows

snapshots.SHORT_GRACE_SECONDS = 0.25
given = []

async def keep(snapshots, store, pins, *_):
    given.append((snapshots, store, pins))

def collecting(real):
    @functools.wraps(real)
    async def commit(self, *args, **named):
        await asyncio.sleep(0.5)
        await garbage.collect_unneeded(*given[0])
        return await real(self, *args, **named)
    return commit

app.collect_garbage = keep
for name in ("commit", "end_run", "end_setup", "load"):
    setattr(SqlStore, name, collecting(getattr(SqlStore, name)))
StorageItemRows.put_item = collecting(StorageItemRows.put_item)
"""
"""Garbage is collected each time that a row is about to name what was put more than the grace period ago."""

UNTOLD = """
from contextlib import nullcontext
from era.store.blobs.blobs import LocalBlobs
LocalBlobs.naming = lambda self: nullcontext()
"""
"""The store isn't told that a row will name what is put."""


def is_there(answer: httpx.Response, content: bytes) -> bool:
    return answer.status_code == 200 and answer.content == content


def a_run(client: httpx.Client, session: str) -> bool:
    client.post(f"{session}/run", json={"code": "open('run', 'w').write('of a run')"})
    return is_there(client.get(f"{session}/files/run"), b"of a run")


def an_output(client: httpx.Client, session: str) -> bool:
    ran = client.post(f"{session}/run", json={"code": "print('x' * 99_999)"})
    return is_there(client.get(f"{session}/runs/{ran.json().get('run_id')}/stdout"), b"x" * 99_999 + b"\n")


def an_upload(client: httpx.Client, session: str) -> bool:
    content = os.urandom(3 << 20)
    client.put(f"{session}/files/upload", content=content)
    return is_there(client.get(f"{session}/files/upload"), content)


def a_directory(client: httpx.Client, session: str) -> bool:
    client.post(f"{session}/mkdir", json={"path": "a/directory"})
    return client.get(f"{session}/stat/a/directory").status_code == 200


def an_archive(client: httpx.Client, session: str) -> bool:
    archive = packed([("of an archive", b"its content")])
    client.put(f"{session}/archive", content=archive, headers={"Content-Type": "application/x-tar"})
    return is_there(client.get(f"{session}/files/of an archive"), b"its content")


def a_value(client: httpx.Client, session: str) -> bool:
    client.put("/api/storage/kv/names/key", json={"value": "v" * 99_999})
    return b"vvv" in client.get("/api/storage/kv/names/key").content


def a_setup(client: httpx.Client, session: str) -> bool:
    client.patch(session, json={"setup": {"commands": ["printf set > up"]}})
    assert eventually(lambda: client.get(session).json()["setup_status"] not in ("pending", "running"))
    return is_there(client.get(f"{session}/files/up"), b"set")


def a_live_session(client: httpx.Client, session: str) -> bool:
    where = session.rpartition("/")[2]
    started = start(client, where, "printf it > process; read go", stdin=True)
    assert eventually(lambda: client.get(f"{session}/files/process").content == b"it")
    client.put(f"{session}/files/put", content=b"while it goes on")
    client.post(f"{session}/run", json={"code": "open('ran', 'w').write('beside it')"})
    client.post(f"{session}/processes/{started}/stdin", content=b"\n")
    ended(client, where, started)
    client.post(f"{session}/stop")
    found = [client.get(f"{session}/files/{name}") for name in ("process", "put", "ran")]
    return all(map(is_there, found, (b"it", b"while it goes on", b"beside it")))


def a_capsule(client: httpx.Client, session: str) -> bool:
    capsule = client.get(f"{session}/capsule").content
    client.delete(f"{session}?purge=true")
    client.post("/api/sessions/import", content=capsule, headers={"Content-Type": "application/x-tar"})
    return is_there(client.get(f"{session}/files/before"), b"all that")


WAYS: tuple[Callable[[httpx.Client, str], bool], ...] = (
    a_run,
    an_output,
    an_upload,
    a_directory,
    an_archive,
    a_value,
    a_setup,
    a_live_session,
    a_capsule,
)
"""What puts content, and commits a row that names it: each returns whether it is there."""


@pytest.mark.parametrize("untold", soak_the_rest([False, True], [False]))
def test_what_a_row_is_about_to_name_stays(own_server: MakeServer, untold: bool) -> None:
    server = own_server(weakness=BEFORE_EACH_ROW + UNTOLD * untold)
    kept = {}
    with server.client(timeout=120) as client:
        for way in WAYS:
            session = f"/api/sessions/{way.__name__}"
            client.post("/api/sessions", json={"language": "python", "session_id": way.__name__})
            if way is a_capsule:
                client.put(f"{session}/files/before", content=b"all that")
            kept[way.__name__] = False
            with suppress(*[AssertionError] * untold):
                kept[way.__name__] = way(client, session)
    assert kept == {way.__name__: not untold for way in WAYS}


SOON = """
from era.core.operation import garbage
from era.core.trees import snapshots
from era.store.blobs import blobs

snapshots.SHORT_GRACE_SECONDS = 1.0
garbage._MARGIN_SECONDS = 3.0
garbage._AGAIN_SECONDS = 1.0
garbage._LOOK_SECONDS = 0.1
"""
ALMOST_FULL = f"""{SOON}
from era.core.sessions import expiry
expiry._TRIMMED_EVERY = 1
blobs._LEAST_GARBAGE, blobs._MOST_GARBAGE = 1 << 18, 4 << 20
"""
"""The service takes the disk for almost full, and looks at it often."""

PIECE = 1 << 20
HISTORY = 4 << 20
ROOM = HISTORY + (4 << 20) + 4 * PIECE
"""What versions name, what garbage there may be, and some pieces."""


def stored_bytes(server: Server) -> int:
    found = 0
    for directory, _, names in os.walk(server.content_dir / "blobs"):
        for name in names:
            with suppress(FileNotFoundError):
                found += os.stat(Path(directory) / name).st_size
    return found


def refuse_uploads(client: httpx.Client, session: str) -> None:
    """Uploads that a session has no room for, with what it has."""
    client.put(f"{session}/files/first", content=os.urandom(3 << 19)).raise_for_status()
    for _ in range(30):
        assert client.put(f"{session}/files/second", content=os.urandom(PIECE)).status_code == 413


def drop_versions(client: httpx.Client, session: str) -> None:
    for _ in range(30):
        ran = client.post(f"{session}/run", json={"code": f"import os; open('f', 'wb').write(os.urandom({PIECE}))"})
        assert ran.json()["state"]["committed"]


def purge_sessions(client: httpx.Client, session: str, query: str = "?purge=true") -> None:
    for _ in range(30):
        other = {"language": "python", "session_id": "other"}
        client.post("/api/sessions", json=other).raise_for_status()
        client.put("/api/sessions/other/files/f", content=os.urandom(PIECE)).raise_for_status()
        client.delete(f"/api/sessions/other{query}").raise_for_status()


def delete_sessions(client: httpx.Client, session: str) -> None:
    """So that they could be restored, of an owner with a quota."""
    client.patch("/api/owners/default", json={"quotas": {"disk_mb": 3}}).raise_for_status()
    purge_sessions(client, session, query="")
    client.post("/api/sessions/other/restore").raise_for_status()


@pytest.mark.parametrize(
    "make_garbage", soak_the_rest([drop_versions, refuse_uploads, purge_sessions, delete_sessions], 1)
)
@pytest.mark.parametrize("is_watched", soak_the_rest([True, False], 1))
def test_what_nothing_names_takes_a_bounded_room(
    own_server: MakeServer, make_garbage: Callable[[httpx.Client, str], None], is_watched: bool
) -> None:
    weakness = ALMOST_FULL if is_watched else SOON  # with the bounds of real disks
    server = own_server(weakness=weakness, history_mb=str(HISTORY >> 20))
    with server.client() as client:
        body = {"language": "python", "session_id": "s", "limits": {"disk_mb": 2}}
        client.post("/api/sessions", json=body).raise_for_status()
        make_garbage(client, "/api/sessions/s")
        if is_watched:
            assert eventually(lambda: stored_bytes(server) < ROOM)
        assert (stored_bytes(server) < ROOM) == is_watched
        before = client.get("/api/sessions/s/files").json()["files"]
        assert all(client.get(f"/api/sessions/s/files/{file['path']}").is_success for file in before)


CONSTANTLY = f"""{SOON}
garbage._PERIOD_SECONDS = 0.2
"""
UNPINNED = """
from era.core.files import archives
archives.finalize = lambda archive, release, pin: release(pin)
"""


@pytest.mark.parametrize("unpinned", soak_the_rest([False, True], 1))
def test_an_archive_is_whole_however_slowly_it_is_downloaded(own_server: MakeServer, unpinned: bool) -> None:
    server = own_server(weakness=CONSTANTLY + UNPINNED * unpinned)
    with server.client() as client:
        for name in ("s", "other"):
            client.post("/api/sessions", json={"language": "python", "session_id": name}).raise_for_status()
        for n in range(24):  # more than connections hold
            client.put(f"/api/sessions/s/files/{n}", content=os.urandom(PIECE)).raise_for_status()
        client.put("/api/sessions/other/files/f", content=os.urandom(PIECE)).raise_for_status()
        before = stored_bytes(server)
        got = 0
        try:
            with client.stream("GET", "/api/sessions/s/archive?format=tar") as answer:
                pieces = answer.iter_raw()
                got += len(next(pieces))
                for name in ("s", "other"):
                    client.delete(f"/api/sessions/{name}?purge=true").raise_for_status()
                assert eventually(lambda: stored_bytes(server) <= before - PIECE)  # what the other one had is gone
                time.sleep(1)  # and then that collection has ended
                got += sum(map(len, pieces))
        except httpx.TransportError:
            assert unpinned
        assert (got > 24 * PIECE) == (not unpinned)
        assert eventually(lambda: stored_bytes(server) == 0), "and afterwards nothing keeps it"

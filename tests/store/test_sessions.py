"""Rows of sessions: created, copied, listed, changed."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest

from era.core.metadata import SessionChange, SessionFilter
from era.core.models import DEFAULT_OWNER, EMPTY, NewCopy, Snapshot, StoredCode
from era.errors import Conflict, EraError, NotFound
from era.store.metadata import SqlStore
from tests.owners import mine
from tests.store.rows import ended, new


async def test_create_read_change_delete(store: SqlStore) -> None:
    created = await store.create_session(new("a", data='{"n": 1}', metadata={"who": "me"}))
    assert created.version == 1
    assert created.snapshot == EMPTY
    assert created.last_run_at is None
    assert await store.session(mine("a")) == created

    changed = await store.change_session(mine("a"), SessionChange(default_timeout=5.0, allow_public=True))
    assert (changed.default_timeout, changed.allow_public, changed.version) == (5.0, True, 1)
    assert changed.data == created.data
    changed = await store.change_session(mine("a"), SessionChange(data="{}", metadata={"who": "you"}))
    assert (changed.data, changed.version, changed.metadata) == ("{}", 2, {"who": "you"})
    assert changed.updated_at >= created.updated_at

    await store.store_code(mine("a"), StoredCode("print(1)", None, 7))
    assert (await store.session(mine("a"))).stored == StoredCode("print(1)", None, 7)

    assert (await store.delete_session(mine("a"))).version == 2
    again = await store.create_session(new("a"))
    assert again.key > created.key
    assert again.stored is None


async def test_calls_to_a_missing_session_raise_not_found(store: SqlStore) -> None:
    for call in (
        store.session(mine("a")),
        store.change_session(mine("a"), SessionChange(data="{}")),
        store.store_code(mine("a"), StoredCode("", None, 1)),
        store.delete_session(mine("a")),
        store.begin_run(mine("a"), "r"),
    ):
        with pytest.raises(NotFound, match="'a'"):
            await call


async def test_two_creates_of_one_id_are_one_session(store: SqlStore) -> None:
    results = await asyncio.gather(*(store.create_session(new("a")) for _ in range(2)), return_exceptions=True)
    conflicts = [result for result in results if isinstance(result, BaseException)]
    assert [(type(error), str(error)) for error in conflicts] == [(Conflict, "Session 'a' already exists.")]
    assert len(await store.sessions(SessionFilter(DEFAULT_OWNER))) == 1


async def test_a_duplicate_has_content_and_settings(store: SqlStore) -> None:
    source = await store.create_session(new("a", data='{"n": 1}', metadata={"who": "me"}, ttl=60))
    await store.store_code(mine("a"), StoredCode("print(1)", "d", 7))
    await store.begin_run(mine("a"), "r1")
    await store.end_run(ended(source, "r1"), data='{"n": 2}', snapshot=Snapshot("f" * 64, 3, 99))
    copy = await store.duplicate(NewCopy(mine("a"), "b"))
    source = await store.session(mine("a"))
    own: dict[str, Any] = {"key": 0, "id": "", "version": 0, "created_at": 0, "updated_at": 0}
    own |= {"last_run_at": 0, "expires_at": 0}
    assert replace(copy, **own) == replace(source, **own)
    assert (copy.version, copy.last_run_at) == (1, None)
    assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={"who": "me"})) == [copy, source]
    assert await store.runs(copy.key, 10) == []
    old = await store.duplicate(NewCopy(mine("a"), "c", version=1))
    assert (old.data, old.snapshot) == ('{"n": 1}', EMPTY)
    other = await store.duplicate(NewCopy(mine("a"), "d", data="{}"))
    assert (other.data, other.snapshot) == ("{}", copy.snapshot)
    impossible: dict[NewCopy, type[EraError]] = {
        NewCopy(mine("a"), "b"): Conflict,
        NewCopy(mine("a"), "e", 9): NotFound,
        NewCopy(mine("x"), "e"): NotFound,
    }
    for copy_to, error in impossible.items():
        with pytest.raises(error):
            await store.duplicate(copy_to)
    assert len(await store.sessions(SessionFilter(DEFAULT_OWNER))) == 4


async def test_lists_come_newest_first_in_pages(store: SqlStore) -> None:
    for number in range(5):
        await store.create_session(new(f"s{number}", language="node" if number % 2 else "python"))
    page = await store.sessions(SessionFilter(DEFAULT_OWNER, limit=2))
    assert [session.id for session in page] == ["s4", "s3"]
    await store.create_session(new("later"))
    page = await store.sessions(SessionFilter(DEFAULT_OWNER, limit=2, before_key=page[-1].key))
    assert [session.id for session in page] == ["s2", "s1"]
    page = await store.sessions(SessionFilter(DEFAULT_OWNER, language="node"))
    assert [session.id for session in page] == ["s3", "s1"]
    session = await store.session(mine("s0"))
    for number in range(4):
        await store.begin_run(mine("s0"), f"r{number}")
    assert [run.id for run in await store.runs(session.key, 2)] == ["r3", "r2"]


ODD: dict[str, Any] = {
    "a.b": "dot",
    "quote\"'": "quotes",
    "$[0]": "path",
    "%": "_%",
    "": "empty",
    "\x00": "nul",
    "\ud800": "surrogate",
    "n": 3,
    "x": 2.50,
    "flag": True,
    "none": None,
    "list": [1, "a"],
    "long" * 1000: "v" * 10000,
}


@pytest.mark.parametrize("name", ODD)
async def test_metadata_filters_take_any_key_literally(name: str, store: SqlStore) -> None:
    text = ODD[name] if isinstance(ODD[name], str) else json.dumps(ODD[name], separators=(",", ":"))
    odd = await store.create_session(new("odd", metadata=ODD))
    await store.create_session(new("other", metadata={"a": {"b": "dot"}, "n": 4, "flag": "yes"}))
    assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={name: text})) == [odd]
    assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={name: text, "n": "3"})) == [odd]
    assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={name: text + "x"})) == []
    assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={name: text, "nowhere": "4"})) == []
    await store.change_session(mine("odd"), SessionChange(metadata={"n": "3"}))
    found = await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={"n": "3"}))
    assert [session.id for session in found] == ["odd"]
    await store.change_session(mine("odd"), SessionChange(metadata={}))
    assert await store.sessions(SessionFilter(DEFAULT_OWNER, metadata={"n": "3"})) == []

"""Locks: made of package sets, carried in capsules, and trusted for nothing but names and versions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from era.core.metadata import SessionChange
from era.core.setup.package_sets import can_be_lock, differences, pinned
from era.core.setup.requirements import Packages, packages_of
from era.errors import BadRequest
from era.packages import tools
from tests.capsules import capsule, document, parts, session
from tests.core.moving import Service
from tests.owners import mine

LOCK: dict[str, Any] = {
    "pip": [{"name": "Requests", "version": "2.32.3"}, {"name": "idna", "version": "3.1+local"}],
    "npm": [
        {"name": "@a/b", "version": "1.0.0", "integrity": "sha512-aB+/="},
        {"name": "ms", "version": "2.0.0", "integrity": None},
        {"name": "ms", "version": "1.0.0-rc.1", "path": "node_modules/@a/b/node_modules/ms"},
        {"name": "real", "version": "3.0.0", "path": "node_modules/other-name"},
    ],
    "go": [{"name": "rsc.io/quote", "version": "v1.5.2", "integrity": "h1:abc="}],
}
SETUP = {"pip": ["requests"], "npm": ["@a/b@^1"], "go": ["rsc.io/quote"]}


def test_a_setup_in_the_versions_of_a_lock() -> None:
    assert can_be_lock(LOCK)
    found = pinned(packages_of(SETUP), LOCK)
    assert found.pip == ("Requests==2.32.3", "idna==3.1+local")
    assert found.npm == (("@a/b", "1.0.0"),)
    assert found.go == (("rsc.io/quote", "v1.5.2"),)
    overrides = json.loads(tools.package_json(found))["overrides"]
    assert overrides == {"@a/b": {".": "1.0.0", "ms": {".": "1.0.0-rc.1"}}, "ms": {".": "2.0.0"}}
    assert "overrides" not in json.loads(tools.package_json(packages_of(SETUP)))
    assert pinned(packages_of({"pip": ["six"]}), {"pip": [], "npm": LOCK["npm"], "go": []}) == Packages(pip=("six",))


def test_how_a_package_set_differs_from_a_lock() -> None:
    assert differences(LOCK, LOCK) == ""
    other = json.loads(json.dumps(LOCK))
    other["pip"][0]["version"] = "2.33.0"
    other["npm"][0]["integrity"] = "sha512-other"
    del other["npm"][2]
    other["go"].append({"name": "a.b/c", "version": "v1.0.0"})
    assert differences(LOCK, other) == (
        "Requests 2.33.0, not 2.32.3; @a/b 1.0.0 with other content; @a/b/node_modules/ms (none), not 1.0.0-rc.1; "
        "a.b/c v1.0.0, not (none)"
    )


def changed(kind: str, **fields: Any) -> dict[str, Any]:
    first, *rest = LOCK[kind]
    return {**LOCK, kind: [{**first, **fields}, *rest]}


HOSTILE: list[Any] = [
    [], "lock", 7, {}, {"pip": [], "npm": []}, {**LOCK, "more": []}, {**LOCK, "pip": {}},
    {**LOCK, "pip": ["six"]}, {**LOCK, "pip": [{"name": "six"}]}, {**LOCK, "go": [LOCK["go"][0]] * 5001},
    *[changed("pip", name=bad) for bad in ("", "-e", "--index-url", "a b", "a;b", "a\n", "../a", "a@http://x", 7)],
    changed("pip", name="x" * 999),
    *[changed("pip", version=bad) for bad in ("", "1 ; x", "*", "1\n", "1,>2", "http://x", None, "1" * 999)],
    *[changed("npm", name=bad) for bad in ("", "../a", "a/b", "@a", ".bin", "node_modules", "a\n", dict[str, str]())],
    *[changed("npm", version=bad) for bad in ("", "file:/etc", "git+ssh://x", "npm:evil@1", "*", "^1", "1 || 2")],
    changed("npm", version="$ms"),
    *[changed("npm", path=bad) for bad in ("/etc", "../x", "node_modules/../../x", "node_modules/a/b", "", 7,
                                           "node_modules/" + "a/node_modules/" * 30 + "b")],
    *[changed("npm", integrity=bad) for bad in (7, "", "sha512-\n", "x" * 5000)],
    *[changed("go", name=bad) for bad in ("fmt", "../x", "a.b/../c", "-x", "a.b/c@v1")],
    *[changed("go", version=bad) for bad in ("", "1.0", "v1 -x", "none", "v1\n")],
    changed("pip", integrity="x"), changed("pip", path="x"), changed("go", path="x"),
]  # fmt: skip


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with Service.at(tmp_path / "service") as service:
        yield service


async def test_hostile_locks_are_refused(service: Service) -> None:
    for lock in HOSTILE:
        assert not can_be_lock(lock), lock
        with pytest.raises(BadRequest, match="'lock'"):
            await service.load(capsule(document(session(setup=SETUP, lock=lock))))
    assert (await service.load(capsule(document(session(setup=SETUP, lock=LOCK))))).setup_lock is not None


async def test_capsules_carry_locks(service: Service) -> None:
    """The lock of the package set, or the imported one as long as its setup isn't done and isn't replaced."""
    first = await service.load(capsule(document(session(id="s", setup=SETUP))))
    assert first.setup_lock is None
    (job,) = await service.store.unfinished_setups()
    await service.store.end_setup(job, status="completed", result="{}", package_set="e" * 64)
    service.locks["e" * 64] = LOCK
    exported = await service.export("s")
    assert json.loads(parts(exported)[0][1])["session"]["lock"] == LOCK
    second = await service.load(exported, "t")
    assert (json.loads(second.setup_lock or ""), second.setup_status) == (LOCK, "pending")
    (job,) = await service.store.unfinished_setups()
    assert json.loads(job.lock or "") == LOCK
    await service.store.end_setup(job, status="failed", result="{}", package_set=None)
    assert (await service.store.restart_setup(mine("t"))).setup_lock == second.setup_lock, "it may be tried again"
    (job,) = await service.store.unfinished_setups()
    await service.store.end_setup(job, status="completed", result="{}", package_set="f" * 64)
    assert (await service.store.session(mine("t"))).setup_lock is None
    third = await service.load(exported, "u")
    assert third.setup_lock is not None
    await service.store.change_session(mine("u"), SessionChange(setup='{"pip":["six"]}'))
    assert (await service.store.session(mine("u"))).setup_lock is None
    assert (await service.load(capsule(document(session(id="v", lock=LOCK))))).setup_lock is None, "nothing to install"


async def test_the_blobs_of_package_sets_are_kept(service: Service) -> None:
    """As long as a session names the set, also one that can be restored, or the set is on this machine."""
    with service.blobs.batch() as batch:
        named, here, gone = (batch.put(word) for word in (b"named", b"here", b"gone"))
    service.pins._local = lambda: {here}
    await service.load(capsule(document(session(id="s", setup=SETUP))))
    (job,) = await service.store.unfinished_setups()
    await service.store.end_setup(job, status="completed", result="{}", package_set=named)
    await service.collect()
    assert {named, here, gone} & service.stored() == {named, here}
    await service.store.delete_session(mine("s"))
    await service.collect()
    assert named in service.stored(), "it can be restored"
    await service.store.restore_session(mine("s"))
    assert await service.store.package_set_lost(named) == 1
    lost = await service.store.session(mine("s"))
    assert (lost.setup_status, lost.package_set) == ("pending", None)
    await service.store.purge_session(mine("s"))
    service.pins._local = set
    with service.blobs.batch() as batch:
        batch.put(b"more")
    await service.collect()
    assert not {named, here, gone} & service.stored()

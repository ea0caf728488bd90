"""The installer of package sets: what it makes, keeps and brings back."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import stat
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from era.core.setup import package_sets
from era.core.setup.commands import Build
from era.core.setup.package_sets import PackageSet
from era.core.setup.requirements import Packages, packages_of
from era.packages import trees
from era.packages.notes import Notes
from era.packages.processes import size_of
from tests.packages.lab import Lab, Nowhere, assert_sound
from tests.packages.registry import Registry, put_evil_npm, tarball, wheel
from tests.weakened import FirstCome


def test_equal_packages_are_made_once(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    first = lab.make(pip=["one"])
    assert_sound(lab, first)
    assert [(item["name"], item["version"]) for item in first.pip] == [("one", "1.0")]
    assert {"one.py", "__pycache__"} <= lab.site(first), "compiled, so that no run has to"
    asked = len(registry.asked)
    assert lab.find_installed(pip=["one"]) == first
    assert lab.make(pip={"requirements": "one"}) == first
    assert len(registry.asked) == asked, "without asking anybody"
    assert lab.make(pip=["one==1.0"]).digest == first.digest, "another wish, the same packages"
    inode = (lab.directory / "environments" / first.digest).stat().st_ino
    assert lab.make(pip=["one"], anew=True).digest == first.digest
    assert (lab.directory / "environments" / first.digest).stat().st_ino == inode
    registry.pages["/files/one-1.0-py3-none-any.whl"] = wheel("one", {"one.py": "x = 2"})
    lab.installer._cache.rename(lab.directory / "old-cache")
    lab.installer.open()
    assert lab.make(pip=["one"], anew=True).digest != first.digest, "the same name, other content"


def test_unused_package_sets_are_removed(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    registry.put_python("two", "two-1.0-py3-none-any.whl", wheel("two", {"two.py": "x = 1"}))
    one, two = lab.make(pip=["one"]), lab.make(pip=["two"])
    before = time.time() - 3600
    assert lab.installer.sweep(set(), before, before) == 0, "they are young"
    for made in (one, two):
        os.utime(lab.directory / "environments" / made.digest, (0, 0))
    assert lab.find_installed(pip=["two"]) == two, "found is as good as new"
    assert lab.installer.sweep({one.digest}, before, before) == 0
    os.utime(lab.directory / "environments" / two.digest, (0, 0))
    assert lab.installer.sweep({one.digest}, before, before) == 1
    assert lab.installer.digests() == {one.digest}
    assert lab.find_installed(pip=["two"]) is None
    assert lab.make(pip=["two"]).digest == two.digest


def faked(lab: Lab) -> Path:
    """The directory of an old package set that was made of nothing, but for who looks at its lock only."""
    with lab.blobs.batch() as batch:
        digest = batch.put(b"an archive")
    directory = lab.directory / "environments" / digest
    directory.mkdir()
    (directory / trees.LOCK).write_text('{"pip": [], "npm": [], "go": []}')
    os.utime(directory, (0, 0))
    packages = packages_of({"pip": ["fake"]})
    lab.installer._notes.write(lab.installer.name(packages), PackageSet(digest, [], [], go=[]))
    return directory


def test_a_set_is_not_found_at_the_moment_when_it_goes(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a sweep's last look at it and its being renamed."""
    directory, found = faked(lab), []
    finder = threading.Thread(target=lambda: found.append(lab.find_installed(pip=["fake"])))
    rename = Path.rename

    def slowly(path: Path, target: Path) -> Path:
        if path == directory:
            finder.start()
            finder.join(0.5)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", slowly)
    an_hour_ago = time.time() - 3600
    assert lab.installer.sweep(set(), an_hour_ago, an_hour_ago) == 1
    finder.join()
    assert found == [None]


def test_unused_package_sets_have_a_bound(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for n in range(5):
        text = f"x = '{n}{'x' * 50_000}'"
        registry.put_python(f"p{n}", f"p{n}-1.0-py3-none-any.whl", wheel(f"p{n}", {f"p{n}.py": text}))
        made.append(lab.make(pip=[f"p{n}"]).digest)
        os.utime(lab.directory / "environments" / made[n], (n, n))
    one = size_of(lab.directory / "environments" / made[0])
    assert lab.installer.sweep(set(), 0, 10) == 0, "they are small"
    monkeypatch.setattr(lab.installer, "_most_bytes", int(2.5 * one))
    assert lab.installer.sweep({made[0]}, 0, 3) == 0, "a row may be about to name the last two"
    assert lab.installer.sweep({made[0]}, 0, 10) == 2
    assert lab.installer.digests() == {made[0], made[3], made[4]}, "the oldest of those that nobody needs are gone"


def test_a_set_whose_archive_another_host_removed_is_put_again(lab: Lab, registry: Registry) -> None:
    """As the host of a cluster does that collects garbage: it doesn't know which sets others have."""
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    made = lab.make(pip=["one"])
    os.utime(lab.directory / "blobs" / made.digest[:2] / made.digest, (0, 0))
    assert lab.find_installed(pip=["one"]) == made
    assert lab.installer._blobs.sweep(set(), time.time() - 3600) == 0, "found is as good as new"
    assert lab.installer._blobs.sweep(set(), time.time() + 3600) == 1
    assert lab.find_installed(pip=["one"]) is None
    assert lab.make(pip=["one"]) == made
    assert lab.archives() == {made.digest}
    assert lab.find_installed(pip=["one"]) == made


def test_hosts_that_share_a_directory_come_to_the_same_packages(tmp_path: Path, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    a, b = (Lab(tmp_path / name, registry, tmp_path / "shared") for name in "ab")
    made = a.make(pip=["one"])
    registry.put_python("one", "one-2.0-py3-none-any.whl", wheel("one", {"one.py": "x = 2"}, version="2.0"))
    asked = len(registry.asked)
    assert b.find_installed(pip=["one"]) is None, "it isn't there yet"
    assert b.make(pip=["one"]) == made
    assert_sound(b, made)
    assert len(registry.asked) == asked, "without asking anybody"
    assert b.find_installed(pip=["one"]) == made
    os.utime(a.directory / "environments" / made.digest, (0, 0))
    assert a.installer.sweep(set(), time.time() - 3600, 0) == 1
    assert b.find_installed(pip=["one"]) == made, "what is old at one host isn't so at the other"
    assert b.make(pip=["one"], anew=True).pip[0]["version"] == "2.0", "whoever wants newer ones gets them"
    assert a.make(pip=["one"]).pip[0]["version"] == "2.0"


def test_what_a_crash_leaves_is_no_package_set(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    made = lab.make(pip=["one"])
    environments = lab.directory / "environments"
    (environments / "making" / "half" / "made").mkdir(parents=True)
    for note in (environments / "asked").iterdir():
        note.write_text("")  # after a power cut
    lab.installer.open()
    assert list((environments / "making").iterdir()) == []
    assert lab.find_installed(pip=["one"]) is None
    assert lab.make(pip=["one"]).digest == made.digest
    (environments / made.digest / "lock.json").unlink()
    assert lab.find_installed(pip=["one"]) is None
    assert lab.run(lab.installer.ensure(made.digest)), "what is broken is replaced"
    assert lab.find_installed(pip=["one"]) == made


def test_two_at_a_time_are_made_once(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))

    async def both() -> list[PackageSet]:
        packages = packages_of({"pip": ["one"]})
        return await asyncio.gather(*(lab.installer.make(packages, lab.build, anew=False) for _ in range(2)))

    first, second = lab.run(both())
    assert first == second
    assert registry.asked.count("/simple/one/") == 1


@pytest.mark.parametrize("wanted", ["other packages", "the same packages"])
@pytest.mark.parametrize("weakened", [False, True], ids=["", "weakened"])
def test_an_owner_with_many_setups_keeps_no_other_one_waiting(
    lab: Lab, wanted: str, weakened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for packages that are somewhere in the queue of his own."""
    if weakened:
        monkeypatch.setattr(lab.installer, "_slots", FirstCome(2))

    async def make_all() -> tuple[list[str], list[str]]:
        begun, end = asyncio.Queue[str](), asyncio.Event()

        async def install(packages: Packages, *_: object) -> PackageSet:
            begun.put_nowait(packages.pip[0])
            await end.wait()
            return PackageSet("0" * 64, [], [])

        def make(owner: str, package: str) -> asyncio.Task[PackageSet]:
            build = cast(Build, Nowhere(owner))
            return asyncio.create_task(lab.installer.make(Packages(pip=(package,)), build, anew=True))

        monkeypatch.setattr(lab.installer, "_install", install)
        greedy = [make("greedy", name) for name in ("a", "b", "c", "d", "the same packages")]
        first = [await begun.get() for _ in range(2)]
        other = make("other", wanted)
        async with asyncio.timeout(60):
            second = [] if weakened else [await begun.get()]
        await asyncio.sleep(0.01)
        assert begun.empty()
        end.set()
        await asyncio.gather(*greedy, other)
        return first, second

    first, second = lab.run(make_all())
    assert first == ["a", "b"]
    assert second == ([] if weakened else [wanted])


def contents(lab: Lab, made: PackageSet) -> dict[str, tuple[int, bytes]]:
    """Mode and content of everything in a package set, by path."""
    top = lab.directory / "environments" / made.digest
    return {
        path: (status.st_mode, (top / path).read_bytes() if stat.S_ISREG(status.st_mode) else b"")
        for path, status in lab.files(made).items()
    }


def test_a_package_set_comes_back_from_the_blobs(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1", "ü/x.py": "y = 1"}))
    put_evil_npm(registry, {"bin": "index.js"})
    setup: dict[str, Any] = {"pip": ["one"], "npm": ["evil"]}
    made = lab.make(**setup)
    assert lab.archives() == {made.digest}
    before, asked = contents(lab, made), len(registry.asked)
    assert any(path.endswith(".pyc") for path in before)
    assert any(stat.S_ISLNK(mode) for mode, _ in before.values())
    assert lab.run(lab.installer.ensure(made.digest)), "it is here"
    shutil.rmtree(lab.directory / "environments" / made.digest)
    assert lab.find_installed(**setup) is None
    assert lab.run(lab.installer.ensure(made.digest))
    assert contents(lab, made) == before
    assert_sound(lab, made)
    assert lab.find_installed(**setup) == made
    assert len(registry.asked) == asked
    # What is damaged isn't taken for it.
    (archive,) = (lab.directory / "blobs").glob(f"*/{made.digest}")
    whole = archive.read_bytes()
    for content in (whole.replace(b"x = 1", b"x = 2"), whole[: len(whole) // 2], b""):
        shutil.rmtree(lab.directory / "environments" / made.digest, ignore_errors=True)
        archive.write_bytes(content)
        assert not lab.run(lab.installer.ensure(made.digest))
        assert lab.installer.digests() == set()
    archive.unlink()
    for name in (made.digest, "../blobs", "0" * 64):
        assert not lab.run(lab.installer.ensure(name))
    assert lab.make(**setup).digest == made.digest
    assert archive.read_bytes() == whole


def test_a_digest_is_what_keeps_damage_out(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("era.core.trees.trees.digest_of", lambda fd: next(iter(lab.archives())))
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    made = lab.make(pip=["one"])
    shutil.rmtree(lab.directory / "environments" / made.digest)
    (archive,) = (lab.directory / "blobs").glob(f"*/{made.digest}")
    archive.write_bytes(archive.read_bytes().replace(b"x = 1", b"x = 2"))
    assert lab.run(lab.installer.ensure(made.digest))
    assert any(content == b"x = 2" for _, content in contents(lab, made).values())


def test_npm_s_packages_in_the_versions_of_a_lock(lab: Lab, registry: Registry) -> None:
    """Also where a package is there in two versions, and where there are newer ones by now."""

    def put(name: str, version: str, **dependencies: str) -> None:
        package = {"name": name, "version": version, "dependencies": dependencies}
        registry.put_npm(name, tarball({"package.json": json.dumps(package)}), package, version)

    put("base", "1.0.0")
    put("base", "2.0.0")
    put("middle", "1.0.0", base="^1")
    put("top", "1.0.0", middle="*", base="^2")
    made = lab.make(npm=["top"])
    lock = {"pip": [], "npm": made.npm, "go": []}
    assert len(made.npm) == 4
    for name, version in (("base", "1.5.0"), ("base", "2.5.0"), ("middle", "1.5.0"), ("top", "1.5.0")):
        put(name, version, **({"base": "^1"} if name == "middle" else {}))
    lab.installer._cache.rename(lab.directory / "old-cache")
    lab.installer.open()
    again = lab.run(lab.installer.make(package_sets.pinned(packages_of({"npm": ["top"]}), lock), lab.build, anew=True))
    assert package_sets.differences(lock, {"pip": [], "npm": again.npm, "go": []}) == ""
    newer = lab.make(npm=["top"], anew=True)
    assert "top 1.5.0, not 1.0.0" in package_sets.differences(lock, {"pip": [], "npm": newer.npm, "go": []})


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["put", "_finish", "_publish", "write"])
def test_killed_between_blob_place_and_note(
    lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))

    def killed(*_: object, **__: object) -> Any:
        raise Killed

    with monkeypatch.context() as context:
        targets: dict[str, tuple[object, str]] = {"put": (lab.blobs, "batch"), "write": (Notes, "write")}
        target, name = targets.get(step, (lab.installer, step))
        context.setattr(target, name, killed)
        with pytest.raises(Killed):
            lab.make(pip=["one"])
    assert bool(lab.archives()) is (step != "put"), "the blob comes first"
    assert bool(lab.installer.digests()) is (step == "write"), "then the place, and then the note"
    assert lab.find_installed(pip=["one"]) is None
    lab.installer.open()
    made = lab.make(pip=["one"])
    assert lab.archives() == lab.installer.digests() == {made.digest}
    assert lab.find_installed(pip=["one"]) == made


def test_a_blob_store_that_fails(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))

    def fails(*_: object) -> Any:
        raise OSError(errno.EIO, "the bucket is away")

    with monkeypatch.context() as context:
        context.setattr(lab.blobs, "batch", fails)
        assert "could not be kept: the bucket is away" in lab.failure(pip=["one"])
    made = lab.make(pip=["one"])
    shutil.rmtree(lab.directory / "environments" / made.digest)
    with monkeypatch.context() as context:
        context.setattr(lab.blobs, "open_blob", fails)
        with pytest.raises(OSError, match="away"):
            lab.run(lab.installer.ensure(made.digest))
    assert lab.run(lab.installer.ensure(made.digest))


@pytest.mark.parametrize("mount", ["data", "cache"])
def test_the_cache_is_emptied_on_a_full_disk_and_on_one_of_its_own(lab: Lab, mount: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    kept = [object()]

    def sweep() -> None:
        os.unshare(os.CLONE_NEWNS)  # which ends with this thread
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        directory = lab.directory if mount == "data" else lab.installer._cache
        subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=100", "none", directory], check=True)
        lab.installer.open()
        (lab.installer._cache / "uv").mkdir()
        with suppress(OSError):
            for number in range(100):
                (lab.installer._cache / "uv" / str(number)).write_bytes(bytes(1 << 20))
        lab.installer.sweep(set(), 0, 0)
        kept[:] = [*lab.installer._making.iterdir(), *lab.installer._cache.iterdir()]

    thread = threading.Thread(target=sweep)
    thread.start()
    thread.join()
    assert kept == []

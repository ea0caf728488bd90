"""Packages made to do harm, from a registry on loopback: they harm nothing, and none of their code runs on the host."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import re
import shutil
import stat
import tarfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest

from era import languages
from era.core.setup import locks
from era.core.setup.builds import Build
from era.core.setup.package_sets import PackageSet, SetupFailed
from era.core.setup.requirements import packages_of
from era.drivers import guest
from era.languages.go import GO
from era.languages.node import NODE
from era.packages import archives, installer, tools
from era.packages.installer import PackageInstaller
from era.store.blobs import LocalBlobs
from tests.drivers.boxes import Boxes, Options, Weakness
from tests.gvisor import needs_gvisor
from tests.packages.registry import Registry, serving, tarball, wheel

CANARY = Path(
    f"/tmp/era-canary-{os.getpid()}"
)  # everybody may write there, also what would run as nobody in particular


@pytest.fixture
def registry() -> Iterator[Registry]:
    with serving() as registry:
        yield registry


@pytest.fixture(autouse=True)
def no_canary() -> Iterator[None]:
    CANARY.unlink(missing_ok=True)
    yield
    CANARY.unlink(missing_ok=True)


class Nowhere:
    """Where nothing can be built."""

    owner = "1"

    @asynccontextmanager
    async def place(self, language: str) -> AsyncIterator[Any]:
        raise SetupFailed("nowhere to build")
        yield


class Lab:
    """An installer in a directory closed to others, as a data directory is."""

    def __init__(self, directory: Path, registry: Registry, **options: Any) -> None:
        self.directory = directory / "data"
        self.directory.mkdir(mode=0o700)
        python = languages.runtime("python")
        sizes = {"seconds": 30.0, "most_bytes": 64 << 20, "most_files": 1000, **options}
        self.blobs = LocalBlobs(self.directory / "blobs")
        with patch("era.store.blobs.sync"):  # which takes a second
            self.blobs.open()
        self.build = cast(Build, Nowhere())
        self.runner: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run
        self.installer = PackageInstaller(
            self.directory,
            self.blobs,
            python=python.cold[0],
            python_prefix=next(iter(python.mounts.values()), None),
            node=languages.runtime("node").mounts[NODE],
            go=languages.runtime("go").mounts[GO],
            variables={**os.environ, **registry.environment()},
            **sizes,
        )
        self.installer.open()

    def make(self, *, anew: bool = False, **setup: Any) -> PackageSet:
        made: PackageSet = self.run(self.installer.make(packages_of(setup), self.build, anew=anew))
        return made

    def run(self, job: Coroutine[Any, Any, Any]) -> Any:
        """What the installer answers, once nothing goes on any more."""

        async def settled() -> Any:
            try:
                return await job
            finally:
                await self.installer.finish_background()

        return self.runner(settled())

    def known(self, **setup: Any) -> PackageSet | None:
        return self.installer.known(packages_of(setup), self.build.owner)

    def archives(self) -> set[str]:
        return {path.name for path in (self.directory / "blobs").rglob("*") if path.is_file()}

    def failure(self, **setup: Any) -> str:
        with pytest.raises(SetupFailed) as caught:
            self.make(**setup)
        assert self.installer.digests() == set()
        assert list((self.directory / "environments" / "making").iterdir()) == []
        return str(caught.value)

    def files(self, made: PackageSet) -> dict[str, os.stat_result]:
        """Everything in a package set, by path."""
        top = self.directory / "environments" / made.digest
        return {str(path.relative_to(top)): path.lstat() for path in top.rglob("*")}

    def site(self, made: PackageSet) -> set[str]:
        (site,) = (self.directory / "environments" / made.digest).glob("python/lib/*/site-packages")
        return {path.name for path in site.iterdir()}


@pytest.fixture
def lab(tmp_path: Path, registry: Registry) -> Lab:
    return Lab(tmp_path, registry)


def assert_sound(lab: Lab, made: PackageSet) -> None:
    """Directories, plain files and links that stay within, which everybody may read and nobody else write."""
    top = lab.directory / "environments" / made.digest
    for path, status in lab.files(made).items():
        assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid()), path
        if stat.S_ISLNK(status.st_mode):
            assert (top / path).resolve().is_relative_to(top), path
        else:
            assert stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode), path
            assert stat.S_IMODE(status.st_mode) in (0o755, 0o644), path


# -- what is made -----------------------------------------------------------------------------------------------


def test_equal_packages_are_made_once(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    first = lab.make(pip=["one"])
    assert_sound(lab, first)
    assert [(item["name"], item["version"]) for item in first.pip] == [("one", "1.0")]
    assert {"one.py", "__pycache__"} <= lab.site(first), "compiled, so that no run has to"
    asked = len(registry.asked)
    assert lab.known(pip=["one"]) == first
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
    assert lab.installer.sweep(set(), before) == 0, "they are young"
    for made in (one, two):
        os.utime(lab.directory / "environments" / made.digest, (0, 0))
    assert lab.known(pip=["two"]) == two, "found is as good as new"
    assert lab.installer.sweep({one.digest}, before) == 0
    os.utime(lab.directory / "environments" / two.digest, (0, 0))
    assert lab.installer.sweep({one.digest}, before) == 1
    assert lab.installer.digests() == {one.digest}
    assert lab.known(pip=["two"]) is None
    assert lab.make(pip=["two"]).digest == two.digest


def test_what_a_crash_leaves_is_no_package_set(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    made = lab.make(pip=["one"])
    environments = lab.directory / "environments"
    (environments / "making" / "half" / "made").mkdir(parents=True)
    for note in (environments / "asked").iterdir():
        note.write_text("")  # after a power cut
    lab.installer.open()
    assert list((environments / "making").iterdir()) == []
    assert lab.known(pip=["one"]) is None
    assert lab.make(pip=["one"]).digest == made.digest
    (environments / made.digest / "lock.json").unlink()
    assert lab.known(pip=["one"]) is None
    assert lab.run(lab.installer.ensure(made.digest)), "what is broken is replaced"
    assert lab.known(pip=["one"]) == made


def test_what_was_not_compiled_yet_comes_back_compiled(lab: Lab, registry: Registry) -> None:
    """The service may end between the two."""
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    with patch.object(lab.installer, "_compile", side_effect=asyncio.CancelledError), suppress(asyncio.CancelledError):
        lab.make(pip=["one"])
    (digest,) = lab.installer.digests()
    made = lab.installer.get(digest)
    assert made is not None
    assert "__pycache__" not in lab.site(made)
    assert (lab.directory / "environments" / digest / "uncompiled").exists()
    lab.installer.open()
    assert lab.installer.digests() == set()
    assert lab.run(lab.installer.ensure(digest))
    assert "__pycache__" in lab.site(made)
    assert not (lab.directory / "environments" / digest / "uncompiled").exists()
    assert_sound(lab, made)


def test_compiling_can_be_stopped(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))

    async def stopped(seconds: float) -> None:
        await lab.installer.make(packages_of({"pip": ["one"]}), lab.build, anew=False)
        await asyncio.sleep(seconds)
        await lab.installer.stop()

    for seconds in (0, 0.01, 0.03, 0.1):
        asyncio.run(stopped(seconds))
        assert list((lab.directory / "environments" / "making").iterdir()) == []
        lab.installer.open()


def test_two_at_a_time_are_made_once(lab: Lab, registry: Registry) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))

    async def both() -> list[PackageSet]:
        packages = packages_of({"pip": ["one"]})
        return await asyncio.gather(*(lab.installer.make(packages, lab.build, anew=False) for _ in range(2)))

    first, second = lab.run(both())
    assert first == second
    assert registry.asked.count("/simple/one/") == 1


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
    setup = {"pip": ["one"], "npm": ["evil"]}
    made = lab.make(**setup)
    assert lab.archives() == {made.digest}
    before, asked = contents(lab, made), len(registry.asked)
    assert any(path.endswith(".pyc") for path in before)
    assert any(stat.S_ISLNK(mode) for mode, _ in before.values())
    assert lab.run(lab.installer.ensure(made.digest)), "it is here"
    shutil.rmtree(lab.directory / "environments" / made.digest)
    assert lab.known(**setup) is None
    assert lab.run(lab.installer.ensure(made.digest))
    assert contents(lab, made) == before
    assert_sound(lab, made)
    assert lab.known(**setup) == made
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
    monkeypatch.setattr(archives, "_digest", lambda fd: next(iter(lab.archives())))
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    made = lab.make(pip=["one"])
    shutil.rmtree(lab.directory / "environments" / made.digest)
    (archive,) = (lab.directory / "blobs").glob(f"*/{made.digest}")
    archive.write_bytes(archive.read_bytes().replace(b"x = 1", b"x = 2"))
    assert lab.run(lab.installer.ensure(made.digest))
    assert any(content == b"x = 2" for _, content in contents(lab, made).values())


def test_npm_s_packages_in_the_versions_of_a_lock(lab: Lab, registry: Registry) -> None:
    """Also where there are two versions of one, and newer ones by now."""

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
    again = lab.run(lab.installer.make(locks.pinned(packages_of({"npm": ["top"]}), lock), lab.build, anew=True))
    assert locks.differences(lock, {"pip": [], "npm": again.npm, "go": []}) == ""
    newer = lab.make(npm=["top"], anew=True)
    assert "top 1.5.0, not 1.0.0" in locks.differences(lock, {"pip": [], "npm": newer.npm, "go": []})


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["put", "_finish", "_publish", "_note"])
def test_killed_between_blob_place_and_note(
    lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))

    def killed(*_: object, **__: object) -> Any:
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(*((lab.blobs, "batch") if step == "put" else (lab.installer, step)), killed)
        with pytest.raises(Killed):
            lab.make(pip=["one"])
    assert bool(lab.archives()) is (step != "put"), "the blob comes first"
    assert bool(lab.installer.digests()) is (step == "_note"), "then the place, and then the note"
    assert lab.known(pip=["one"]) is None
    lab.installer.open()
    made = lab.make(pip=["one"])
    assert lab.archives() == lab.installer.digests() == {made.digest}
    assert lab.known(pip=["one"]) == made


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


# -- hostile packages -------------------------------------------------------------------------------------------

AT_START = f"import os; open({str(CANARY)!r}, 'w').close()"
HOOKS = {"evil.pth": AT_START, "sitecustomize.py": AT_START, "usercustomize.py": AT_START, "evil.py": "x = 1"}


def test_nothing_of_a_package_runs_at_a_start(lab: Lab, registry: Registry) -> None:
    registry.put_python("evil", "evil-1.0-py3-none-any.whl", wheel("evil", HOOKS))
    made = lab.make(pip=["evil"])
    assert lab.site(made) & HOOKS.keys() == {"evil.py"}
    assert "evil.pth" in made.stdout
    assert_sound(lab, made)
    told = run_in_a_box(lab, made, ASK_A_CHILD)
    assert told == "1\n"


ASK_A_CHILD = """
import subprocess, sys, os, evil
print(evil.x)
subprocess.run(['python3', '-c', 'pass'])
if os.path.exists(%r): print('it ran')
""" % str(CANARY)  # noqa: UP031 - it has braces


def test_it_would_run_if_it_were_kept(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "_RUN_AT_START", re.compile("(?!)"))
    registry.put_python("evil", "evil-1.0-py3-none-any.whl", wheel("evil", HOOKS))
    assert run_in_a_box(lab, lab.make(pip=["evil"]), ASK_A_CHILD) == "1\nit ran\n"


def run_in_a_box(lab: Lab, made: PackageSet, code: str, weakness: Weakness | None = None) -> str:
    boxes = Boxes(lab.directory, weakness or Weakness(), self_tested=())
    try:
        with boxes._weakened():
            box = boxes._runner.run(boxes.driver.create("python", boxes.driver.limits, made.digest))
        told = boxes.run(box, code)
        boxes.close(box)
        return told.stdout + told.stderr
    finally:
        boxes.stop()


LINK = stat.S_IFLNK | 0o777
HOSTILE_ENTRIES = {
    "a link to a file of the host": {"evil/link": (LINK, "/etc/passwd")},
    "a link upwards": {"evil/link": (LINK, "../../../../../../etc/passwd")},
    "a link to a directory, and a file in it": {
        "evil/link": (LINK, str(CANARY.parent)),
        f"evil/link/{CANARY.name}": (0o100644, "x"),
    },
    "a path upwards": {f"../../../../../../../../{CANARY}": (0o100644, "x")},
    "a path from the root": {str(CANARY): (0o100644, "x")},
    "data for a path upwards": {f"evil-1.0.data/data/../../../../../../../..{CANARY}": (0o100644, "x")},
    "a setuid program": {"evil/program": (0o106777, "#!/bin/sh")},
    "a pipe": {"evil/pipe": (stat.S_IFIFO | 0o666, "")},
}


@pytest.mark.parametrize("entries", HOSTILE_ENTRIES.values(), ids=HOSTILE_ENTRIES)
def test_hostile_wheels(lab: Lab, registry: Registry, entries: Mapping[str, tuple[int, str]]) -> None:
    content = wheel("evil", {"evil/__init__.py": ""}, entries)
    registry.put_python("evil", "evil-1.0-py3-none-any.whl", content)
    try:
        made = lab.make(pip=["evil"])
    except SetupFailed:
        assert lab.installer.digests() == set()
    else:
        assert_sound(lab, made)
    assert not CANARY.exists()
    assert list((lab.directory / "environments" / "making").iterdir()) == []


BACKEND = f"open({str(CANARY)!r}, 'w').close()"
SDIST = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": BACKEND,
}


def test_what_would_have_to_be_built_is_not(lab: Lab, registry: Registry) -> None:
    registry.put_python("evil", "evil-1.0.tar.gz", tarball(SDIST, "evil-1.0"))
    assert "nowhere to build" in lab.failure(pip=["evil"])
    assert not CANARY.exists()


def test_building_would_run_its_code(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = tools.pip_command
    weak = lambda *given: [word for word in sound(*given) if word not in ("--only-binary", ":all:")]  # noqa: E731
    monkeypatch.setattr(tools, "pip_command", weak)
    registry.put_python("evil", "evil-1.0.tar.gz", tarball(SDIST, "evil-1.0"))
    lab.failure(pip=["evil"])
    assert CANARY.exists()


SCRIPTS = dict.fromkeys(("preinstall", "install", "postinstall", "prepare"), f"echo > {CANARY}")


def put_evil_npm(registry: Registry, package: dict[str, Any], more: Mapping[str, Any] | None = None) -> None:
    text = json.dumps({"name": "evil", "version": "1.0.0", **package})
    registry.put_npm("evil", tarball({"package.json": text, "index.js": "module.exports = 1", **(more or {})}), package)


def test_npm_scripts_are_not_run(lab: Lab, registry: Registry) -> None:
    put_evil_npm(registry, {"scripts": SCRIPTS})
    assert "nowhere to build" in lab.failure(npm=["evil"])
    put_evil_npm(registry, {}, {"binding.gyp": "{}"})
    assert "nowhere to build" in lab.failure(npm=["evil"])
    assert not CANARY.exists()


def test_npm_scripts_would_do_harm(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = tools.npm_command
    weak = lambda *given: [word for word in sound(*given) if word != "--ignore-scripts"]  # noqa: E731
    monkeypatch.setattr(tools, "npm_command", weak)
    put_evil_npm(registry, {"scripts": SCRIPTS})
    lab.failure(npm=["evil"])
    assert CANARY.exists()


@pytest.mark.parametrize(
    "more",
    [
        {"link": (tarfile.SYMTYPE, "/etc/passwd")},
        {"link": (tarfile.SYMTYPE, "../../../../../../etc/passwd")},
        {"link": (tarfile.SYMTYPE, "/tmp"), f"link/{CANARY.name}": "x"},
        {"link": (tarfile.LNKTYPE, "/etc/passwd")},
        {f"../../../../../../../../..{CANARY}": "x"},
        {str(CANARY): "x"},
        {"pipe": (tarfile.FIFOTYPE, "")},
    ],
)
def test_hostile_tarballs(lab: Lab, registry: Registry, more: Mapping[str, Any]) -> None:
    put_evil_npm(registry, {}, more)
    try:
        made = lab.make(npm=["evil"])
    except SetupFailed:
        assert lab.installer.digests() == set()
    else:
        assert_sound(lab, made)
        assert not any(stat.S_ISLNK(status.st_mode) for status in lab.files(made).values())
    assert not CANARY.exists()


@pytest.mark.parametrize("where", ["file:/etc", "file:../../../../etc", "git+ssh://127.0.0.1/x", "URL/internal.tgz"])
def test_npm_packages_cannot_depend_on_what_is_in_no_registry(lab: Lab, registry: Registry, where: str) -> None:
    put_evil_npm(registry, {"dependencies": {"more": where.replace("URL", registry.url)}})
    assert "isn't in the registry" in lab.failure(npm=["evil"])
    assert not [path for path in registry.asked if "internal" in path], "it is not even asked for"


# -- bounds -----------------------------------------------------------------------------------------------------


def test_packages_of_too_many_files(tmp_path: Path, registry: Registry) -> None:
    lab = Lab(tmp_path, registry, most_files=100)
    files = {f"many/f{number}": "" for number in range(200)}
    registry.put_python("many", "many-1.0-py3-none-any.whl", wheel("many", files))
    assert "more than 100 files" in lab.failure(pip=["many"])


@pytest.mark.parametrize("files", [1, 40], ids=["one large file", "many files"])
def test_packages_of_too_many_bytes(tmp_path: Path, registry: Registry, files: int) -> None:
    lab = Lab(tmp_path, registry, most_bytes=8 << 20)
    large = {f"large/f{number}": "x" * ((40 << 20) // files) for number in range(files)}
    registry.put_python("large", "large-1.0-py3-none-any.whl", wheel("large", large))
    assert "ERA_DISK_MB" in lab.failure(pip=["large"])


# -- sharing ----------------------------------------------------------------------------------------------------

WRITE = "open('/opt/env/lib/python%d.%d/site-packages/one.py' % __import__('sys').version_info[:2], 'w').write('x = 2')"


def writable(options: Options) -> Options:
    at = max(number for number, option in enumerate(options) if option == "/opt/env")
    return [*options[: at - 2], "--bind", *options[at - 1 :]]


@pytest.mark.parametrize("weak", [False, True], ids=["sound", "weak"])
def test_programs_cannot_change_what_they_share(lab: Lab, registry: Registry, weak: bool) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    made = lab.make(pip=["one"])
    (file,) = (lab.directory / "environments" / made.digest).glob("python/lib/*/site-packages/one.py")
    weakness = None
    if weak:
        file.chmod(0o666)
        no_landlock = {'landlock.restrict(config["landlock"])': "None"}
        weakness = Weakness(options=writable, supervisor=no_landlock)
    told = run_in_a_box(lab, made, WRITE, weakness)
    assert (file.read_text() == "x = 2") is weak, told


@pytest.mark.parametrize("driver", ["bubblewrap", pytest.param("gvisor", marks=needs_gvisor)])
def test_every_driver_shows_packages(lab: Lab, registry: Registry, driver: str) -> None:
    registry.put_python("one", "one-1.0-py3-none-any.whl", wheel("one", {"one.py": "x = 1"}))
    put_evil_npm(registry, {})
    made = lab.make(pip=["one"], npm=["evil"])
    boxes = Boxes(lab.directory, Weakness(), driver, self_tested=())
    try:
        for language, code, said in (
            ("python", "import one; print(one.x); open(one.__file__, 'a')", "1\n"),
            ("node", "import e from 'evil'; console.log(e, require('evil'))", "1 1\n"),
            ("typescript", "import e from 'evil'; const a: number = e; console.log(a)", "1\n"),
        ):
            box = boxes._runner.run(boxes.driver.create(language, boxes.driver.limits, made.digest))
            told = boxes.run(box, code)
            boxes.close(box)
            assert told.stdout == said, told
            assert (told.ended.exit_code == 0) is (language != "python"), "nothing of it can be written"
    finally:
        boxes.stop()


def test_tools_get_no_secrets_and_no_rights(lab: Lab, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tool is started with, seen by a tool of the test's own."""
    monkeypatch.setenv("ERA_API_KEY", "secret")
    seen = "import json, os; print(json.dumps([dict(os.environ), os.getuid(), os.getgroups(), os.listdir('.')]))"
    seen += f"; print(open('/proc/self/status').read(), os.access({str(lab.directory)!r}, os.R_OK))"
    monkeypatch.setattr(tools, "pip_command", lambda *_: [guest.PYTHON, "-I", "-c", seen])
    made = lab.make(pip=["one"])
    told, status = made.stdout.split("\n", 1)
    environment, uid, groups, _ = json.loads(told)
    assert not [name for name in environment if name.startswith(("ERA_", "AWS_"))]
    assert environment["UV_DEFAULT_INDEX"] == f"{registry.url}/simple"
    assert "NoNewPrivs:\t1" in status
    if os.getuid() == 0:
        assert uid > 1_000_000
        assert groups == []
        assert re.search(r"CapEff:\t0+\n", status)
        assert status.rstrip().endswith("False"), "the data directory is closed to it"


# -- Go's modules ---------------------------------------------------------------------------------------------------

GREETS = 'package main\n\nimport "example.com/greet/sub"\n\nfunc main() { println(sub.To("you")) }\n'
GREET = {
    "sub/greet.go": 'package sub\n\nimport "example.com/base"\n\nfunc To(n string) string { return base.Word + n }\n'
}


def put_modules(registry: Registry) -> None:
    registry.put_go("example.com/base", {"base.go": 'package base\n\nconst Word = "hello "\n'})
    registry.put_go("example.com/greet", GREET, requires=["example.com/base"])


@pytest.mark.parametrize("driver", ["bubblewrap", pytest.param("gvisor", marks=needs_gvisor)])
def test_modules_come_with_all_they_need(lab: Lab, registry: Registry, driver: str) -> None:
    put_modules(registry)
    made = lab.make(go=["example.com/greet"])
    assert_sound(lab, made)
    assert [f"{item['name']}@{item['version']}" for item in made.go] == [
        "example.com/base@v1.0.0",
        "example.com/greet@v1.0.0",
    ]
    asked = len(registry.asked)
    assert lab.make(go=["example.com/greet"]) == made
    assert len(registry.asked) == asked
    assert lab.make(go={"goMod": "module x.y/z\n\nrequire example.com/greet v1.0.0\n"}).digest == made.digest
    boxes = Boxes(lab.directory, Weakness(), driver, self_tested=())
    try:
        box = boxes._runner.run(boxes.driver.create("go", boxes.driver.limits, made.digest))
        told = boxes.run(box, GREETS, timeout=120)
        assert (told.stderr, told.ended.exit_code) == ("hello you\n", 0)
        # A go.mod of the session's own, which needs no go.sum for what is installed, and stays as it is.
        own = b"module example.com/app\n\ngo 1.24\n\nrequire example.com/greet v1.0.0\n"
        told = boxes.run(box, GREETS, files={"go.mod": own}, timeout=120)
        assert (told.stderr, told.ended.exit_code) == ("hello you\n", 0)
        assert {path.name: path.read_bytes() for path in box.workspace.glob("go.*")} == {"go.mod": own}
        told = boxes.run(box, GREETS.replace("example.com/greet/sub", "example.com/other"), timeout=120)
        assert told.ended.exit_code == 1
        assert "example.com/other" in told.stderr
        boxes.close(box)
    finally:
        boxes.stop()


def test_modules_that_are_not_there(lab: Lab, registry: Registry) -> None:
    put_modules(registry)
    assert "There is no such package" in lab.failure(go=["example.com/nothing"])
    assert "There is no such package" in lab.failure(go=["example.com/greet@v1.9.9"])


def test_a_module_that_lies_about_its_content(lab: Lab, registry: Registry) -> None:
    """Names in a module's archive lead nowhere else, and what isn't a plain file isn't unpacked."""
    put_modules(registry)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("example.com/greet@v1.0.0/../../../../escaped", "x")
    registry.pages["/go/example.com/greet/@v/v1.0.0.zip"] = written.getvalue()
    assert "go failed" in lab.failure(go=["example.com/greet"])
    assert list(lab.directory.rglob("escaped")) == []

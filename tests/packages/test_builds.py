"""Packages that run code in order to be installed: they are built in a sandbox, and harm only the session that
asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from era.core.setup.commands import Builds
from era.core.setup.package_sets import SetupFailed
from era.core.setup.requirements import packages_of
from era.packages import building, trees
from era.packages.building import Making
from tests.drivers.sandboxes import LIMITS, Sandboxes
from tests.gvisor import needs_gvisor
from tests.packages.builds import real_builds, sdist, session, unsandboxed, with_disk
from tests.packages.lab import Lab, assert_sound
from tests.packages.registry import Registry, put_evil_npm, wheel
from tests.soaking import soak_the_rest


class BuildLab(Lab):
    """An installer that can build in sandboxes."""

    sandboxes: Sandboxes
    builds: Builds

    def own(self, name: str) -> Path:
        """A directory below the data directory, with a file in it."""
        found = self.directory / name
        found.mkdir(parents=True, exist_ok=True)
        (found / "canary").write_text("alive")
        if name.startswith("cache/"):
            self.installer._processes.change_owner(found, self.installer._processes.fetcher)
        return found


@contextmanager
def build_lab(
    directory: Path, registry: Registry, driver: str = "bubblewrap", *, limits: Any = LIMITS, **options: Any
) -> Iterator[BuildLab]:
    made = BuildLab(directory, registry, **options)
    with real_builds(made.directory, driver, limits) as (made.sandboxes, made.builds):
        made.runner, made.build = made.sandboxes._runner.run, made.builds(session(1))
        yield made


# -- what is built ----------------------------------------------------------------------------------------------

NATIVE = """
#include <node_api.h>
static napi_value Init(napi_env env, napi_value exports) {
  napi_value text;
  napi_create_string_utf8(env, "compiled", NAPI_AUTO_LENGTH, &text);
  return text;
}
NAPI_MODULE(NODE_GYP_MODULE_NAME, Init)
"""


@pytest.mark.parametrize("driver", ["bubblewrap", pytest.param("gvisor", marks=needs_gvisor)])
def test_what_is_built_is_the_session_s_own(tmp_path: Path, registry: Registry, driver: str) -> None:
    registry.put_python("helper", "helper-1.0-py3-none-any.whl", wheel("helper", {"helper.py": "word = 'built'"}))
    registry.put_python("plain", "plain-1.0-py3-none-any.whl", wheel("plain", {"plain.py": ""}))
    made_of = "import helper; files['one.py'] = f'x = {helper.word!r}'; files['one.pth'] = 'import nothing'"
    registry.put_python("one", "one-1.0.tar.gz", sdist("one", made_of, ["helper"]))
    put_evil_npm(registry, {"scripts": {"postinstall": "echo made > made.txt"}})
    with build_lab(tmp_path, registry, driver) as lab:
        setup: dict[str, Any] = {"pip": ["one", "plain"], "npm": ["evil"] if driver == "bubblewrap" else []}
        made = lab.make(**setup)
        assert_sound(lab, made)
        assert [item["name"] for item in (*made.pip, *made.npm)] == ["one", "plain", *setup["npm"]]
        assert {"one.py", "plain.py", "one.pth", "helper.py"} & lab.site(made) == {"one.py", "plain.py"}
        assert lab.find_installed(**setup) == made
        sandbox = lab.run(lab.sandboxes.driver.create("python", LIMITS, made.digest))
        result = lab.sandboxes.run(
            sandbox, "import glob, one; print(one.x, *map(len, glob.glob('/node_modules/evil/made.txt')))"
        )
        assert result.stdout == f"built{' 27' * len(setup['npm'])}\n", result
        lab.sandboxes.close(sandbox)
        assert not list((lab.sandboxes.driver.directory).glob("*/workspace/*")), "the places are gone"
        if driver == "bubblewrap":
            lab.build = lab.builds(session(2, allow_internet=False))
            assert lab.find_installed(**setup) is None, "what was built for one is nothing to another"
            other = lab.make(pip=setup["pip"])
            assert lab.site(other) == lab.site(made)
            lab.build = lab.builds(session(3))
            assert lab.find_installed(pip=setup["pip"]) is None
            assert lab.make(pip=["plain"]).digest == lab.find_installed(pip=["plain"]).digest  # type: ignore[union-attr]
            lab.build = lab.builds(session(1))
            assert lab.find_installed(pip=["plain"]) is not None, "what was only unpacked is everybody's"


def test_a_native_addon_is_compiled(tmp_path: Path, registry: Registry) -> None:
    gyp = {"targets": [{"target_name": "native", "sources": ["native.c"]}]}
    more = {"binding.gyp": json.dumps(gyp), "native.c": NATIVE}
    put_evil_npm(registry, {"scripts": {"install": "node-gyp rebuild"}}, more)
    with build_lab(tmp_path, registry, seconds=120.0) as lab:
        made = lab.make(npm=["evil"])
        assert "node_modules/evil/build/Release/native.node" in lab.files(made)


# -- what builds try --------------------------------------------------------------------------------------------

ATTACK = """
import glob, os, socket, subprocess, sys
def tried(what, name):
    try:
        result = what()
    except BaseException as problem:
        result = None
    if result:
        did.append(name)
did = []
tried(lambda: 'SECRET' in os.environ.get('ERA_API_KEY', ''), 'environment')
def processes():
    for path in glob.glob('/proc/[0-9]*/environ') + glob.glob('/proc/[0-9]*/cmdline'):
        try:
            if 'SECRET' in open(path, errors='replace').read():
                return True
        except OSError:
            pass
tried(processes, 'processes')
tried(lambda: open('DATA/canary').read(), 'read')
for name in ('cache/uv', 'cache/npm', 'environments', 'environments/asked', 'environments/other', 'blobs'):
    tried(lambda: open(f'DATA/{name}/canary', 'w').write('dead'), name)
tried(lambda: socket.create_connection(('127.0.0.1', SERVICE), 3), 'service')
tried(lambda: socket.create_connection(('127.0.0.1', REGISTRY), 3), 'registry')
tried(lambda: [name for name in os.listdir('/workspace') if name not in EXPECTED], 'files')
quiet = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)
subprocess.Popen(['sleep', '12321'], start_new_session=True, **quiet)
if 'files' in globals():
    files['evil.py'] = f'did = {did!r}'
else:
    open('did.txt', 'w').write(repr(did))
"""
EVERYTHING = [
    "environment", "processes", "read", "cache/uv", "cache/npm", "environments", "environments/asked",
    "environments/other", "blobs", "service", "registry",
]  # fmt: skip


def asleep() -> list[int]:
    """pids of processes that an attack has left behind."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes() == b"sleep\x0012321\x00":
                found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize("weak", [False, True], ids=["sound", "weak"])
def test_what_a_build_tries(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, weak: bool) -> None:
    monkeypatch.setenv("ERA_API_KEY", "SECRET")
    with socket.create_server(("127.0.0.1", 0)) as service, build_lab(tmp_path, registry) as lab:
        attack = ATTACK.replace("DATA", str(lab.directory)).replace("SERVICE", str(service.getsockname()[1]))
        attack = attack.replace("REGISTRY", registry.url.rpartition(":")[2])
        attack = attack.replace(
            "EXPECTED", "'uv cache tmp npm requirements.txt .session_data.json main.py .lock site'.split()"
        )
        canaries = [lab.own(name) for name in ("", *EVERYTHING[3:-2])]
        registry.put_python("evil", "evil-1.0.tar.gz", sdist("evil", attack))
        put_evil_npm(registry, {"scripts": {"install": "python3 attack.py"}}, {"attack.py": attack})
        lab.build = unsandboxed("1") if weak else lab.build
        try:
            made = lab.make(pip=["evil"], npm=["evil"])
            assert bool(asleep()) is weak
        finally:
            for pid in asleep():
                os.kill(pid, signal.SIGKILL)
        top = lab.directory / "environments" / made.digest
        for file in (*top.glob("python/lib/*/site-packages/evil.py"), *top.glob("node_modules/evil/did.txt")):
            assert file.read_text().removeprefix("did = ") == repr(EVERYTHING if weak else []), file
        harmed = [path.name for path in canaries if (path / "canary").read_text() != "alive"]
        assert len(harmed) == (len(canaries) - 1 if weak else 0)
        for path in canaries:
            (path / "canary").unlink()


LEFT = """
ln -s /etc/passwd ../leak
ln -s ../node_modules/evil ../a && ln -s a/../../../../../../../etc/passwd ../together
mkfifo ../pipe
ln package.json ../second
truncate --size 200M ../holes
"""
PLACES = {
    "a link in its place": "cd ../.. && mv node_modules x && ln -s VICTIM node_modules",
    "a link in the place of its project": "cd ../../.. && mv npm x && ln -s VICTIM npm",
    "nothing": "rm -rf ../../node_modules",
}


@pytest.mark.parametrize("in_its_place", soak_the_rest(PLACES, 1))
def test_what_a_build_leaves(tmp_path: Path, registry: Registry, in_its_place: str) -> None:
    """It is moved out without following a link, and checked before anybody uses it."""
    with build_lab(tmp_path, registry) as lab:
        victim = lab.own("victim/node_modules").parent

        def left_by(script: str) -> Path:
            npm = tmp_path / "npm"
            shutil.rmtree(npm, ignore_errors=True)
            (npm / "node_modules/evil").mkdir(parents=True)
            (npm / "package.json").write_text('{"dependencies": {"evil": "1"}}')
            package = {"name": "evil", "version": "1.0.0", "scripts": {"install": script}}
            (npm / "node_modules/evil/package.json").write_text(json.dumps(package))
            making = Making(tmp_path, time.monotonic() + 60, None, {})
            lab.run(building.run_scripts(lab.build, {"node_modules/evil": False}, making))
            return npm / "node_modules"

        left = left_by(LEFT)
        for name in ("leak", "together", "pipe", "holes"):
            with pytest.raises(SetupFailed):
                trees.check(left, most_files=1000, most_bytes=100 << 20, separate=True)
            (left / name).unlink()
        with pytest.raises(SetupFailed, match="second name"):
            trees.check(left, most_files=1000, most_bytes=100 << 20)
        trees.check(left, most_files=1000, most_bytes=100 << 20, separate=True)
        assert (left / "second").stat().st_nlink == 1
        assert (left / "second").read_text() == (left / "evil/package.json").read_text()
        with pytest.raises(SetupFailed, match="What was built"):
            left_by(PLACES[in_its_place].replace("VICTIM", str(victim)))
        assert (victim / "node_modules/canary").read_text() == "alive"


def test_a_look_that_follows_links_would_do_harm(tmp_path: Path) -> None:
    """The harm that move_out and check prevent."""
    place, victim, made = tmp_path / "place", tmp_path / "victim", tmp_path / "made"
    (victim / "node_modules").mkdir(parents=True)
    place.mkdir()
    (place / "npm").symlink_to(victim)
    with pytest.raises(SetupFailed):
        trees.move_out(place, "npm/node_modules", tmp_path / "target")
    (place / "npm/node_modules").rename(tmp_path / "target")
    assert not (victim / "node_modules").exists(), "a rename by path takes another's"
    (tmp_path / "secret").write_text("secret")
    (made / "x/y").mkdir(parents=True)
    (made / "x/y/top").symlink_to("../..")
    (made / "out").symlink_to("x/y/top/../secret")
    assert os.path.normpath("x/y/top/../secret") == "x/y/secret", "by its words it stays within"
    assert (made / "out").read_text() == "secret"
    with pytest.raises(SetupFailed, match="leads out"):
        trees.check(made, most_files=100, most_bytes=100)
    (made / "out").unlink()
    trees.check(made, most_files=100, most_bytes=100)


# -- bounds -----------------------------------------------------------------------------------------------------

DISK = "import time; [open(f'big{n}', 'wb').write(bytes(40 << 20)) for n in range(4)]; time.sleep(1)"
FOREVER = "import time; time.sleep(600)"
FORKS = """
import os, time
for _ in range(COUNT):
    if os.fork() == 0:
        time.sleep(2)
        os._exit(0)
"""


TRIES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "disk": (DISK, {"limits": with_disk(128)}, "out of disk space"),
    "time": (FOREVER, {"seconds": 4.0}, "took too long"),
    "processes": (FORKS.replace("COUNT", "500"), {}, "can't be built here"),
    "none": (DISK + FORKS.replace("COUNT", "5"), {"limits": with_disk(500)}, None),
}


@pytest.mark.parametrize("tried", soak_the_rest(TRIES, ["disk", "time", "processes"]))
def test_builds_have_bounds(tmp_path: Path, registry: Registry, tried: str) -> None:
    """Those of the session, and the server's bound of time. A build within them succeeds."""
    attack, options, problem = TRIES[tried]
    registry.put_python("evil", "evil-1.0.tar.gz", sdist("evil", f"{attack}\nfiles['evil.py'] = ''"))
    with build_lab(tmp_path, registry, **options) as lab:
        if problem is None:
            assert "evil.py" in lab.site(lab.make(pip=["evil"]))
        else:
            assert problem in lab.failure(pip=["evil"])


def test_credentials_stay_outside(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.put_python("one", "one-1.0.tar.gz", sdist("one", "files['one.py'] = ''"))
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    with build_lab(tmp_path, registry) as lab:
        variables = lab.installer._variables
        for secret in (
            {"UV_DEFAULT_INDEX": f"{registry.url}/simple".replace("//", "//me:hidden@")},
            {"UV_INDEX_INNER_PASSWORD": "hidden"},
        ):
            lab.installer._variables = {**variables, **secret}
            error = lab.failure(pip=["one"])
            assert "asks for a password" in error
            assert "hidden" not in error
        (home / ".netrc").write_text("machine 127.0.0.1 login me password hidden\n")
        lab.installer._variables = {**variables, "HOME": str(home)}
        assert "asks for a password" in lab.failure(pip=["one"])
        (home / ".netrc").unlink()
        assert lab.make(pip=["one"]).pip, "the same without one is built"
        again = lab.run(lab.installer.find_installed(packages_of({"pip": ["one"]}), "1"))
        assert lab.find_installed(pip=["one"], npm=[]) == again

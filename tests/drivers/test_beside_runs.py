"""Processes beside runs, in bubblewrap: the walls around them, and what is left of them. Each attack is also tried
where the wall is taken out, and must get through there."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from era.core.concurrency.stall_timeout import stall_timeout
from era.drivers import process_supervisor
from era.drivers.cgroups import Cgroups, Group, _mounts, _version_1
from tests.conftest import cgroups, eventually, is_running
from tests.drivers import process_steps as steps
from tests.drivers.conftest import BOTH_WAYS
from tests.drivers.process_steps import Said, spec
from tests.drivers.sandboxes import WITHOUT_LANDLOCK, Sandboxes, Weakness

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root can run it")

# -- walls -----------------------------------------------------------------------------------------------------------

LOOKS_AROUND = """
import json, os, resource
wanted = ('Cap', 'NoNewPrivs', 'Seccomp', 'Uid', 'Gid', 'Groups', 'SigIgn', 'SigBlk', 'SigCgt')
def mounts():
    lines = [line.split() for line in open('/proc/self/mounts')]
    own = '/dev/pts', '/proc/'
    return sorted({(where, kind, options) for _, where, kind, options, *_ in lines if not where.startswith(own)})
print(json.dumps({
    'status': [line.split() for line in open('/proc/self/status') if line.startswith(wanted)],
    'limits': {name: resource.getrlimit(value) for name, value in vars(resource).items() if name[:6] == 'RLIMIT'},
    'namespaces': {name: os.readlink(f'/proc/self/ns/{name}') for name in ('user', 'net', 'ipc', 'uts')},
    'descriptors': sorted(os.listdir('/proc/self/fd')),
    'mounts': mounts(),
    'umask': os.umask(0), 'nice': os.nice(0), 'oom': open('/proc/self/oom_score_adj').read(),
    'session': os.getsid(0) == os.getpid(),
    'environment': sorted(name for name in os.environ if name not in ('PWD', 'SHLVL', '_')),
}))
"""


async def as_seen(sandbox: Any) -> tuple[Any, Any]:
    """What a process sees of itself, and what a command of a run does."""
    said, _ = await steps.process(sandbox, spec("python3", "-c", LOOKS_AROUND))
    code = f"import subprocess; subprocess.run(['python3', '-c', {LOOKS_AROUND!r}], start_new_session=True)"
    from_run, _ = await steps.run(sandbox, code)
    return json.loads(said["stdout"]), json.loads(from_run)


@BOTH_WAYS
def test_a_process_has_the_walls_of_a_run(sandboxes: Sandboxes) -> None:
    """Whether its supervisor was forked from a template, or has been executed."""
    process, run = sandboxes.do(sandboxes.make(), as_seen)
    if not ROOT:  # then each process's memory is bounded by itself, and this one may be in the roomiest language
        assert process["limits"].pop("RLIMIT_DATA") >= run["limits"].pop("RLIMIT_DATA") > [0, 0]
    assert process == run
    assert process["descriptors"] == ["0", "1", "2", "3"]  # the last is of the directory that was listed


OWN_MODULE = "import sysconfig; open(sysconfig.get_path('purelib') + '/own.py', 'w').close()"


async def looks_for_packages(sandbox: Any) -> tuple[bool, bool]:
    """Whether there may be packages after a process that has installed none, and after one that has."""
    await asyncio.sleep(0.1)  # as long as changes take at most to show in the times of files
    await steps.process(sandbox, spec("true"))
    before = sandbox.may_have_packages()
    await steps.process(sandbox, spec("python3", "-c", OWN_MODULE))
    return before, sandbox.may_have_packages()


def test_packages_are_looked_for_once_a_process_has_installed_some(sandboxes: Sandboxes) -> None:
    assert sandboxes.do(sandboxes.make(), looks_for_packages) == (False, True)


async def namespaces(sandbox: Any) -> tuple[dict[str, str], dict[str, str]]:
    supervisor = await sandbox.process_supervisor()
    pids = sandbox._init_pid, supervisor.life.pid
    first, second = (
        {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in os.listdir(f"/proc/{pid}/ns")} for pid in pids
    )
    return first, second


@pytest.mark.skipif(not ROOT, reason="an ordinary user may not look at its sandboxes' namespaces")
@BOTH_WAYS
def test_its_supervisor_has_namespaces_of_its_own_for_processes_and_mounts(sandboxes: Sandboxes) -> None:
    first, second = sandboxes.do(sandboxes.make(), namespaces)
    own = {"pid", "pid_for_children", "mnt", "cgroup"}
    assert {name for name in first if first[name] != second[name]} == own


SUPERVISOR_IN_REACH = """
import json, os
got = []
for name in ('environ', 'mem', 'maps', 'fd', 'fdinfo'):
    try:
        os.listdir(f'/proc/1/{name}') if 'fd' in name else open(f'/proc/1/{name}', 'rb').read(1)
        got.append(name)
    except OSError: pass
for number in (9, 15, 2, 19):
    try: os.kill(1, number)
    except OSError: pass
print(json.dumps(got))
"""


@BOTH_WAYS
def test_its_supervisor_is_out_of_reach(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make()
    for _ in range(2):  # it has survived the first one's signals
        said, ended = sandboxes.do(sandbox, steps.process, spec("python3", "-c", SUPERVISOR_IN_REACH))
        assert (json.loads(said["stdout"]), ended.exit_code) == ([], 0)


WITHOUT_DOMAINS = {**WITHOUT_LANDLOCK, "self.supervisor.own_domain.enter()": "pass"}
SHARED_PROC = {
    '    mount_proc(request["read_only_proc"])': (
        "    import namespace_entry\n"
        "    is_second and namespace_entry._mount('/proc', '/dev/shm', None, 0x5000)\n"
        '    mount_proc(request["read_only_proc"])'
    )
}
"""The /proc of runs is in /dev/shm."""


@needs_root
@pytest.mark.parametrize(
    ("weak_sandboxes", "line"),
    [
        (Weakness(supervisor={**SHARED_PROC, **WITHOUT_DOMAINS}), 2),
        (Weakness(supervisor={"    mount_terminals()": "    pass"}), 1),
    ],
    indirect=["weak_sandboxes"],
    ids=["variables, by another /proc", "terminals"],
)
def test_without_the_wall_runs_and_processes_see_each_other(weak_sandboxes: Sandboxes, line: int) -> None:
    from_run, from_process = weak_sandboxes.do(weak_sandboxes.make(), steps.look_at_each_other)
    assert (from_run.splitlines()[line], from_process.splitlines()[line]) != ("[]", "[]")


@needs_root
@pytest.mark.parametrize("weak_sandboxes", [Weakness(supervisor=WITHOUT_DOMAINS)], indirect=True)
def test_without_domains_processes_see_variables_of_each_other(weak_sandboxes: Sandboxes) -> None:
    assert weak_sandboxes.do(weak_sandboxes.make(), steps.variables_of_another) != b"[]"


TERMINALS = """
import os
kept = []
try:
    while len(kept) < 300: kept.append(os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY))
except OSError as problem: print(problem.strerror, end=' ')
print(len(kept))
"""
"""As many as a program may open, of which the machine has 3,072."""


@needs_root
@pytest.mark.parametrize(
    ("weak_sandboxes", "got"),
    [(Weakness(), "No space left on device 128"), (Weakness(supervisor={"    mount_terminals()": "    pass"}), "300")],
    indirect=["weak_sandboxes"],
    ids=["sound", "weakened"],
)
def test_nobody_has_all_terminals(weak_sandboxes: Sandboxes, got: str) -> None:
    sandbox = weak_sandboxes.make()
    of_a_run = weak_sandboxes.run(sandbox, TERMINALS).stdout
    of_a_process, _ = weak_sandboxes.do(sandbox, steps.process, spec("python3", "-c", TERMINALS))
    assert (of_a_run.strip(), of_a_process["stdout"].decode().strip()) == (got, got)


# -- what stays in the supervisor's memory ---------------------------------------------------------------------------

SEARCHES = """
def serve(fd):
    first, rest = b"CANARY-OF", b"REHTONA-"  # turned round, or it would find what it looks for
    found = 0
    for line in open("/proc/self/maps"):
        span, permissions = line.split()[:2]
        if permissions.startswith("rw"):
            start, end = (int(part, 16) for part in span.split("-"))
            with open("/proc/self/mem", "rb") as memory:
                memory.seek(start)
                try: pieces = memory.read(end - start).split(first)[1:]
                except OSError: continue
                found += sum(piece[:8][::-1] == rest for piece in pieces)
    os.write(fd, b"%d" % found)

def isolation_seen()"""
WITH_A_MODULE = {"\ndef isolation_seen()": SEARCHES}


async def searched(sandbox: Any) -> Said:
    """How often a fork of the supervisor finds in its memory what a process before had in its environment."""
    for _ in range(3):
        await steps.process(sandbox, spec("true", env={"SECRET": "CANARY-OF-ANOTHER" * 100}))
    said, ended = await steps.process(sandbox, spec(channel=True, module="startup"))
    assert ended.exit_code == 0, said
    return said


@pytest.mark.parametrize(
    ("weak_sandboxes", "finds"),
    [
        (Weakness(supervisor=WITH_A_MODULE), False),
        (Weakness(supervisor={**WITH_A_MODULE, "        piece[:] = bytes(len(piece))": "        pass"}), True),
    ],
    indirect=["weak_sandboxes"],
    ids=["as it is", "without zeroing"],
)
def test_nothing_of_an_environment_stays_in_the_supervisor(weak_sandboxes: Sandboxes, finds: bool) -> None:
    said = weak_sandboxes.do(weak_sandboxes.make(), searched)
    assert (said != {"channel": b"0"}) == finds


# -- the freezer -----------------------------------------------------------------------------------------------------


@needs_root
def test_a_frozen_group_can_be_removed(tmp_path: Path) -> None:
    """With either version's freezer: what a service has left that was killed at the wrong moment."""
    for kind in ("cgroup.freeze", "freezer.state"):
        name = f"era-test-frozen-{os.getpid()}"
        roots = [path.parent for path in Path("/sys/fs/cgroup").glob(f"*/*/{kind}")]
        if not roots:
            continue
        parent = roots[0].parent / name
        parent.mkdir()
        process = subprocess.Popen(["sleep", "1000"])
        group = Group(1, {"freezer": parent / "sb-test"})
        (parent / "sb-test").mkdir()
        group.add(process.pid)
        group.set_frozen(frozen=True)
        assert eventually(group.is_frozen)
        found = Cgroups(1, {"freezer": parent}, None)
        assert found.remove_leftovers() == 1
        assert process.wait(60) == -signal.SIGKILL
        found.close()
        assert not parent.exists()


@needs_root
@pytest.mark.parametrize("kind", ["cgroup2", "cgroup"])
def test_all_of_a_group_stands_still_and_nobody_else(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Also what enters by what was opened before; and not who has the number of a process that has just ended."""
    found = [directory for directory, options in _mounts(kind) if kind == "cgroup2" or "freezer" in options]
    if not found or "pids" not in _version_1():
        pytest.skip("needs version 1 with such a freezer beside it")
    name = f"era-test-freezer-{os.getpid()}"
    group = Group(1, {"pids": _version_1()["pids"] / name}, found[0] / name)
    group.directories["pids"].mkdir()
    own, other, late = (subprocess.Popen(["sleep", "1000"]) for _ in range(3))
    entrances = group.entrances()
    try:
        group.add(own.pid)
        place, sound, stale = Path(f"/proc/{other.pid}/cgroup"), Group.processes, [[own.pid, other.pid]]
        before = place.read_text()
        monkeypatch.setattr(Group, "processes", lambda self: stale.pop() if stale else sound(self))
        assert group.prepare_freezer()
        assert place.read_text() == before
        for entrance in entrances:
            os.write(entrance, str(late.pid).encode())
        group.set_frozen(frozen=True)
        assert eventually(group.is_frozen)
        frozen = (found[0] / name / "cgroup.procs").read_text()
        assert set(map(int, frozen.split())) == {own.pid, late.pid}
    finally:
        for entrance in entrances:
            os.close(entrance)
        if group.can_freeze:
            group.set_frozen(frozen=False)
        for process in (own, other, late):
            process.kill()
            process.wait()
        group.remove()


async def interrupted(sandbox: Any) -> list[bool]:
    """Whether it stands still after a block that was left by an exception, and by being cancelled."""
    seen = []
    async with sandbox.frozen() as frozen:
        assert frozen
    with pytest.raises(ZeroDivisionError):
        async with sandbox.frozen():
            raise ZeroDivisionError
    seen.append(sandbox._group.is_frozen())

    async def waits() -> None:
        async with sandbox.frozen():
            await asyncio.sleep(1000)

    for delay in (0, 0.001, 0.2):
        task = asyncio.create_task(waits())
        await asyncio.sleep(delay)
        task.cancel()
        await asyncio.wait([task])
        seen.append(sandbox._group.is_frozen())
    return seen


@needs_root
def test_nothing_stays_frozen(sandboxes: Sandboxes) -> None:
    assert sandboxes.do(sandboxes.make(), interrupted) == [False] * 4


async def started_while_frozen(sandbox: Any) -> tuple[bool, int]:
    """Start a process while the sandbox stands still for longer than it may stand still by itself."""
    await (await sandbox.process_supervisor()).start(steps.shell("exec sleep 1000"))
    async with sandbox.frozen() as frozen:
        starting = asyncio.create_task(steps.started(sandbox, steps.shell("exec sleep 1000")))
        await asyncio.sleep(4)
    return frozen, (await starting).pid


@needs_root
def test_what_stands_still_for_us_has_not_stalled(sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_supervisor, "stall_timeout", partial(stall_timeout, seconds=2.0))
    sandbox = sandboxes.make()
    frozen, pid = sandboxes.do(sandbox, started_while_frozen)
    assert frozen
    assert pid


# -- a service that is killed ----------------------------------------------------------------------------------------

IS_KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from era.drivers.bubblewrap import BubblewrapDriver
from tests.drivers import process_steps as steps
from tests.drivers.sandboxes import LIMITS

async def main():
    driver = BubblewrapDriver(Path(sys.argv[1]), LIMITS, cgroup_name=sys.argv[2], template_forks=int(sys.argv[3]))
    driver.self_tested = ()
    await driver.clear()
    await driver.start()
    sandbox = await driver.create("python", LIMITS)
    for what in (steps.shell("echo up; sleep 1000"), steps.spec("bash", "-i", pty=steps.SIZE, env={"PS1": "up"})):
        await (await steps.begun(sandbox, what)).until(b"up")
    pids = sandbox._processes()
    assert len(pids) > 4
    async with sandbox.frozen() as frozen:
        assert frozen is (True if os.geteuid() == 0 else None)
        print(*pids, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.parametrize("forks", [64, 0], ids=["forked", "started"])
def test_nothing_is_left_by_a_service_that_is_killed(tmp_path: Path, forks: int) -> None:
    """While everything stands still."""
    name = f"era-test-killed-{os.getpid()}"
    service = subprocess.run(
        [sys.executable, "-c", IS_KILLED, tmp_path, name, str(forks)], capture_output=True, text=True, timeout=120
    )
    assert service.returncode == -signal.SIGKILL, service.stderr
    pids = [int(pid) for pid in service.stdout.split()]
    assert eventually(lambda: not any(map(is_running, pids)))
    after = Sandboxes(tmp_path, Weakness(), cgroup_name=name)
    left = [path.name for path in (tmp_path / "live").iterdir() if path.name.startswith("sb-")]
    after.stop()
    assert left == []
    assert cgroups(name) == []


KEEPS = """
import os, socket, sys, time
with socket.create_server('keeper', family=socket.AF_UNIX) as listener:
    print('up', flush=True)
    connection, _ = listener.accept()
    _, (fd,), _, _ = socket.recv_fds(connection, 1, 1)
    connection.send(b'x')
    while sys.argv[1] == 'writes': os.write(fd, b'x' * 4096)
    time.sleep(1000)
"""
GIVES_AWAY = """
import socket
connection = socket.socket(socket.AF_UNIX)
connection.connect('keeper')
print('given', flush=True)  # before the other takes all the room that there is for output
socket.send_fds(connection, [b'x'], [1])
connection.recv(1)
"""


async def gives_its_output_away(sandbox: Any, keeper_does: str) -> tuple[str, Any]:
    async with steps.running(sandbox, spec("python3", "-c", KEEPS, keeper_does)) as keeper:
        await keeper.until(b"up")
        return await steps.run(sandbox, GIVES_AWAY)


@pytest.mark.parametrize("keeper_does", ["writes", "sleeps"])
def test_a_run_ends_though_a_process_has_its_output(sandboxes: Sandboxes, keeper_does: str) -> None:
    said, ended = sandboxes.do(sandboxes.make(), gives_its_output_away, keeper_does)
    assert said.startswith("given\n"), said[:100]
    assert (ended.cause, ended.exit_code, ended.sandbox_alive) == ("exit", 0, True)

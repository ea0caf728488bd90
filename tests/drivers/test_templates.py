"""Sandboxes whose supervisors are forked from a template: they have the walls of those that bubblewrap starts, line by
line, and nothing of the template, of the service or of each other. Each wall is also taken out, which must show."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from era.drivers import forking, prefix, templates
from era.drivers.bubblewrap import BubblewrapSandbox
from tests.conftest import eventually, is_running
from tests.drivers.sandboxes import WITHOUT_LANDLOCK, Sandboxes, Weakness
from tests.drivers.test_attacks import HOST_PROC
from tests.soaking import soak_the_rest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user has no templates")

PACKAGE_SET = "0" * 64
ITS_VALUE = """
class Series:
    name = None
    def to_frame(self, _):
        print("asked for its table")
"""

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path_factory.mktemp("forked"), Weakness())
    yield made
    made.stop()


@pytest.fixture
def weak_sandboxes(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path / "weak", request.param)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    """Sandboxes in which bubblewrap starts the supervisor."""
    made = Sandboxes(tmp_path_factory.mktemp("started"), Weakness(template_forks=0))
    yield made
    made.stop()


def run(sandboxes: Sandboxes, sandbox: BubblewrapSandbox, code: str) -> str:
    result = sandboxes.run(sandbox, code)
    assert result.ended.exit_code == 0, result.stderr
    return result.stdout


def _pids(pid: int) -> list[str]:
    """The pids of a process in the namespaces that it is in, the innermost last."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:"))


def namespaces(pid: int | str) -> dict[str, str]:
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in (*NAMESPACES, "time")}


# -- the same as without ---------------------------------------------------------------------------------------------

LOOKS = """
import json, os, sys
first = {name: repr(value) for name, value in vars(sys.modules['site']).items() if name.isupper()}
names = set(sys.modules)
import gc, locale, re, resource, signal, stat, time

def lines(path):
    with open(path) as file: return file.read().splitlines()

def mounts():
    for line in lines('/proc/self/mountinfo'):
        fields = line.split()
        kind = fields[fields.index('-') + 1]
        yield fields[4], (kind, fields[5].split(','))

def tree(top):
    for directory, directories, files in os.walk(top):
        directories.sort()
        for name in sorted(directories + files):
            path = os.path.join(directory, name)
            about = os.lstat(path)
            yield path, stat.filemode(about.st_mode), about.st_uid, about.st_gid, about.st_rdev

known = {name: module for name, module in sys.modules.items() if name in names}
print(json.dumps({
    'status': {who: dict(line.split(':\\t', 1) for line in lines(f'/proc/{who}/status')) for who in ('self', '1')},
    'mounts': dict(mounts()),
    'limits': lines('/proc/self/limits'),
    'cgroup': lines('/proc/self/cgroup'),
    'maps of ids': [lines(f'/proc/self/{name}') for name in ('uid_map', 'gid_map', 'setgroups')],
    'ids': [os.getresuid(), os.getresgid(), os.getgroups()],
    'process': [os.getppid(), os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid(), os.getcwd(), os.umask(0o22),
                os.nice(0), os.sched_getscheduler(0), sorted(os.sched_getaffinity(0)), os.uname().nodename,
                lines('/proc/self/oom_score_adj'), lines('/proc/self/comm'), lines('/proc/self/cmdline'),
                lines('/proc/self/loginuid') if os.path.exists('/proc/self/loginuid') else '',
                os.readlink('/proc/self/exe'), os.readlink('/proc/self/root')],
    'signals': [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
    'mask': sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
    'descriptors': sorted(os.listdir('/proc/self/fd')),
    'files': [entry for top in ('/etc', '/dev', '/era', '/opt/node/bin') for entry in tree(top)],
    'root': sorted(os.listdir('/')),
    'environment': dict(os.environ),
    'site': first,
    'sys': {name: re.sub(' at 0x[0-9a-f]+', '', str(getattr(sys, name))) for name in (
        'path', 'prefix', 'exec_prefix', 'base_prefix', 'base_exec_prefix', 'executable', '_base_executable', 'argv',
        'orig_argv', 'flags', 'warnoptions', '_xoptions', 'dont_write_bytecode', 'pycache_prefix', 'meta_path',
        'path_hooks', 'platlibdir', 'stdlib_dir' if hasattr(sys, 'stdlib_dir') else 'platform')},
    'importers': sorted(sys.path_importer_cache),
    'modules': {name: [getattr(module, '__file__', None), getattr(module, '__cached__', None),
                       getattr(getattr(module, '__spec__', None), 'origin', None)] for name, module in known.items()},
    'streams': [[s.name, s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty()]
                for s in (sys.stdin, sys.stdout, sys.stderr)],
    'zone': [time.tzname, locale.setlocale(locale.LC_ALL)],
    'collector': [gc.isenabled(), gc.get_threshold()],
}))
"""

PASSING = re.compile(
    "Vm|Rss|Huge|Threads|voluntary|nonvoluntary|SigQ|FDSize|Pid|Tgid|NS|PPid|State|Mems|Cpus|HugetlbPages|Speculation"
)
"""Lines of /proc/PID/status that say how much there is at a moment, or what the machine has."""


def package_set(sandboxes: Sandboxes) -> str:
    """The name of a package set that is made for a driver, with two modules; the values of one's would be kept."""
    made = sandboxes.driver.directory.parent / "environments" / PACKAGE_SET
    site = made / prefix.PACKAGES_SITE.replace(prefix.PYTHON_PACKAGES, "python").lstrip("/")
    for directory in (made / "node_modules", site / "pandas"):
        directory.mkdir(parents=True, exist_ok=True)
    (site / "pandas" / "__init__.py").write_text(ITS_VALUE)
    (site / "packaged.py").write_text("place = __file__\n")
    return PACKAGE_SET


@pytest.mark.parametrize("has_packages", [False, True])
def test_a_program_sees_what_it_would_see_without_templates(
    sandboxes: Sandboxes, started: Sandboxes, has_packages: bool
) -> None:
    seen: list[Any] = []
    for made in (sandboxes, started):
        sandbox = made.make(package_set=package_set(made) if has_packages else None)
        assert sandbox.is_forked == (made is sandboxes)
        seen.append(json.loads(run(made, sandbox, LOOKS)))
        assert (prefix.PACKAGES_SITE in seen[-1]["sys"]["path"]) == has_packages
    forked, other = seen
    for who in ("self", "1"):
        status = [
            {name: text for name, text in one["status"].pop(who).items() if not PASSING.match(name)} for one in seen
        ]
        assert status[0] == status[1]
        assert {"Uid", "Gid", "Groups", "CapInh", "CapBnd", "CapEff", "NoNewPrivs", "Seccomp", "SigIgn"} <= set(
            status[0]
        )
        assert status[0]["Seccomp"] == "2"
    for path, (kind, options) in other["mounts"].items():
        assert kind == forked["mounts"][path][0], path
        assert set(options) <= set(forked["mounts"][path][1]) | {"relatime"}, path
    assert set(forked.pop("mounts")) == set(other.pop("mounts"))
    assert forked.keys() == other.keys()
    for name in forked:
        if isinstance(forked[name], dict):
            items = forked[name].keys() | other[name].keys()
            differ = {item: (forked[name].get(item), other[name].get(item)) for item in items}
            assert {item: pair for item, pair in differ.items() if pair[0] != pair[1]} == {}, name
        assert forked[name] == other[name], name


def test_packages_are_found_and_their_values_kept(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make(package_set=package_set(sandboxes))
    assert sandbox.is_forked
    assert run(sandboxes, sandbox, "import packaged; print(packaged.place)") == f"{prefix.PACKAGES_SITE}/packaged.py\n"
    assert run(sandboxes, sandbox, "import pandas; pandas.Series()") == "asked for its table\n"
    assert "ModuleNotFoundError" in sandboxes.run(sandboxes.make(), "import packaged").stderr


def test_what_is_in_force_is_the_same(sandboxes: Sandboxes, started: Sandboxes) -> None:
    forked, other = (made.make().enforced for made in (sandboxes, started))
    assert forked | {"uid": 0} == other | {"uid": 0}


@pytest.mark.parametrize("way", ["sandboxes", "started"])
def test_all_processes_are_in_the_sandbox_s_namespaces_and_groups(request: pytest.FixtureRequest, way: str) -> None:
    """Seen from outside, for nothing inside can tell it as well."""
    made = request.getfixturevalue(way)
    sandbox, other = made.make(), made.make()
    assert sandbox._group is not None
    assert eventually(lambda: sandbox._group is not None and len(sandbox._group.processes()) >= 2)
    pids = sandbox._group.processes()
    assert sandbox._init_pid in pids
    ours = namespaces(sandbox._init_pid)
    inside = [pid for pid in pids if namespaces(pid)["pid"] == ours["pid"]]
    for pid in inside:
        assert namespaces(pid) == ours
        assert Path(f"/proc/{pid}/root/workspace").stat().st_ino == sandbox.workspace.stat().st_ino
    for foreign in (namespaces("self"), namespaces(other._init_pid)):
        assert [name for name in NAMESPACES if foreign[name] == ours[name]] == []
    groups = {Path(f"/proc/{pid}/cgroup").read_text() for pid in inside}
    assert len(groups) == 1
    for controller in ("memory", "pids", "cpu"):
        line = next(line for line in groups.pop().splitlines() if controller in line) if groups else ""
        assert sandbox.id in line or not line


COUNTED = """
import json, sys, textwrap
class Told:
    def __init__(self, name): self.name = name
    def __del__(self): print('gone:', self.name)
print([sys.getrefcount(each) > 1 << 31 for each in (json.JSONDecoder, json.loads.__code__, json.loads, json, textwrap)])
json.told, json.loads.told = Told('of a module'), Told('of a function')
"""


def test_forks_share_what_needs_no_count_and_let_go_of_what_a_program_adds(
    sandboxes: Sandboxes, started: Sandboxes
) -> None:
    shared = run(sandboxes, sandboxes.make(), COUNTED).splitlines()
    usual = run(started, started.make(), COUNTED).splitlines()
    assert shared[0] == "[True, True, False, False, False]"
    assert usual[0] == "[False, False, False, False, False]"
    assert shared[1:] == usual[1:]
    assert sorted(shared[1:]) == ["gone: of a function", "gone: of a module"]


# -- nothing of the template -----------------------------------------------------------------------------------------


def descriptors(pid: int) -> list[str]:
    """What the descriptors of a process are, without numbers of objects."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{name}")
        found.append(f"{name} {re.sub(r'[0-9]+', '', target)}")
    return sorted(found)


def test_the_supervisor_has_no_descriptor_but_its_own(sandboxes: Sandboxes, started: Sandboxes) -> None:
    forked, other = sandboxes.make(), started.make()
    assert sorted(name.split()[1] for name in descriptors(forked._init_pid)) == sorted(
        name.split()[1] for name in descriptors(other._init_pid)
    )
    assert [name for name in descriptors(forked._init_pid) if "ns:" in name or "pidfd" in name] == [
        name for name in descriptors(other._init_pid) if "ns:" in name or "pidfd" in name
    ]


@pytest.mark.parametrize(
    "weak_sandboxes",
    [
        Weakness(
            supervisor={
                "os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n    resource": "resource",
                "    os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n    # An": "    # An",
            }
        )
    ],
    indirect=True,
)
def test_a_descriptor_that_stays_open_shows(weak_sandboxes: Sandboxes) -> None:
    assert any("mnt:" in name for name in descriptors(weak_sandboxes.make()._init_pid))


FINDS_UID = """
import re
wanted = re.compile(rb'"uid": (\\d{10})')
found = set()
for line in open('/proc/self/maps'):
    span, permissions = line.split()[:2]
    if permissions.startswith('rw'):
        start, end = (int(part, 16) for part in span.split('-'))
        with open('/proc/self/mem', 'rb') as memory:
            memory.seek(start)
            try: found.update(wanted.findall(memory.read(end - start)))
            except OSError: continue
print(sorted(int(uid) for uid in found))
"""


def test_nothing_of_an_earlier_sandbox_is_in_a_later_one(sandboxes: Sandboxes) -> None:
    first, second = sandboxes.make(), sandboxes.make()
    found = json.loads(run(sandboxes, second, FINDS_UID))
    assert first.uid not in found
    assert set(found) <= {second.uid}


@pytest.mark.parametrize(
    "weak_sandboxes",
    [
        Weakness(
            supervisor={
                "        if not fds:\n            _end()\n": (
                    "        if not fds:\n            _end()\n"
                    "        LEAK.append(_socket.socket(1, 5, 0, os.dup(fds[0])).recv(1 << 17, 2))\n"
                ),
                "_KEPT_CAPABILITIES = ": "LEAK = []\n_KEPT_CAPABILITIES = ",
            }
        )
    ],
    indirect=True,
)
def test_a_template_that_read_requests_would_be_found_out(weak_sandboxes: Sandboxes) -> None:
    first, second = weak_sandboxes.make(), weak_sandboxes.make()
    assert second.is_forked
    assert first.uid in json.loads(run(weak_sandboxes, second, FINDS_UID))


REACHES_OUT = """
import ctypes, json, os, signal
libc = ctypes.CDLL(None, use_errno=True)
got = []
pids = [int(name) for name in os.listdir('/proc') if name.isdigit()]
if set(pids) != {1, os.getpid()}: got.append(f'processes {pids}')
if os.getppid() != 1: got.append('another parent')
for pid in (TEMPLATE, SUPERVISOR):
    try: os.kill(pid, 0); got.append(f'kill {pid}')
    except OSError: pass
    if libc.ptrace(16, pid, 0, 0) == 0: got.append(f'ptrace {pid}')
    for name in ('environ', 'mem', 'maps'):
        try: open(f'/proc/{pid}/{name}', 'rb').read(1); got.append(f'{name} of {pid}')
        except OSError: pass
if libc.ptrace(16, 1, 0, 0) == 0: got.append('ptrace 1')
for name in ('environ', 'mem', 'maps', 'fd', 'fdinfo', 'map_files'):
    try:
        os.listdir(f'/proc/1/{name}') if 'f' in name else open(f'/proc/1/{name}', 'rb').close()
        got.append(f'{name} of 1')
    except OSError: pass
for name in ('root', 'cwd', 'exe', 'ns/mnt'):
    try: os.readlink(f'/proc/1/{name}'); got.append(f'{name} of 1')
    except OSError: pass
for flags in (os.O_WRONLY, os.O_RDWR):
    try: os.close(os.open('/proc/self/exe', flags)); got.append('exe to write')
    except OSError: pass
for change, *how in ((os.chmod, 0o777), (os.utime,), (os.chown, 1000, 1000), (os.setxattr, 'user.canary', b'1'),
                     (os.truncate, 0)):
    try: change('/proc/self/exe', *how); got.append('exe changed')
    except OSError: pass
print(json.dumps(got))
"""


def _reaches(sandboxes: Sandboxes, sandbox: BubblewrapSandbox) -> list[str]:
    template = sandboxes.driver.templates._current.pid
    code = REACHES_OUT.replace("TEMPLATE", str(template)).replace("SUPERVISOR", str(sandbox._init_pid))
    got: list[str] = json.loads(run(sandboxes, sandbox, code))
    return got


def test_template_and_supervisor_are_out_of_reach(sandboxes: Sandboxes) -> None:
    interpreter = os.stat("/usr/bin/python3").st_mtime_ns, os.stat("/usr/bin/python3").st_mode
    assert _reaches(sandboxes, sandboxes.make()) == []
    assert (os.stat("/usr/bin/python3").st_mtime_ns, os.stat("/usr/bin/python3").st_mode) == interpreter


@pytest.mark.parametrize(
    ("weak_sandboxes", "got"),
    [
        (Weakness(supervisor={"_libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)": "pass", **WITHOUT_LANDLOCK}), "mem of 1"),
        (HOST_PROC, "processes"),
    ],
    indirect=["weak_sandboxes"],
    ids=["dumpable", "the host's /proc"],
)
def test_what_is_in_reach_without_a_wall(weak_sandboxes: Sandboxes, got: str) -> None:
    assert any(one.startswith(got) for one in _reaches(weak_sandboxes, weak_sandboxes.make()))


@pytest.mark.parametrize(
    "weak_sandboxes", [Weakness(supervisor={"    load(filters)": "    pass", **WITHOUT_LANDLOCK})], indirect=True
)
def test_a_filter_that_is_not_loaded_is_reported(weak_sandboxes: Sandboxes) -> None:
    assert weak_sandboxes.make().enforced["seccomp"] == "none"


# -- templates come and go -------------------------------------------------------------------------------------------

HASH = "print(hash('canary'))"


@pytest.mark.parametrize("weak_sandboxes", [Weakness(template_forks=2)], indirect=True)
def test_a_hash_seed_is_shared_by_so_many_and_no_more(weak_sandboxes: Sandboxes) -> None:
    """One with no seed of its own would have all hashes in common with everybody."""
    made: list[BubblewrapSandbox] = []
    hashes: list[str] = []
    templates = weak_sandboxes.driver.templates

    def seeds() -> int:
        begins = templates._next is None  # while the next template starts, the one before makes all
        made.append(weak_sandboxes.make())
        seed = run(weak_sandboxes, made[-1], HASH)
        if begins or seed not in hashes:
            hashes.append(seed)
        return len(set(hashes))

    first = templates._current.pid
    assert eventually(lambda: seeds() >= 3)
    assert len(set(hashes)) >= 3
    assert max(map(hashes.count, hashes)) <= 6
    assert is_running(first)
    for sandbox in made:
        weak_sandboxes.close(sandbox)
    weak_sandboxes.make()
    assert eventually(lambda: weak_sandboxes.make() and not is_running(first))
    assert not is_running(first)


@pytest.mark.parametrize("weak_sandboxes", [Weakness(template_forks=3)], indirect=True)
def test_a_template_that_is_replaced_makes_what_it_was_asked_for(weak_sandboxes: Sandboxes) -> None:
    async def make(count: int) -> list[BubblewrapSandbox]:
        create: Any = weak_sandboxes.driver.create
        return list(await asyncio.gather(*(create("python", weak_sandboxes._weakness.limits) for _ in range(count))))

    made = [sandbox for _ in range(3) for sandbox in weak_sandboxes._runner.run(make(8))]
    assert all(sandbox.is_forked for sandbox in made)
    assert all(run(weak_sandboxes, sandbox, "print('well')") == "well\n" for sandbox in made[::5])


@pytest.mark.parametrize("weak_sandboxes", [Weakness()], indirect=True)
def test_sandboxes_die_with_their_template_and_others_are_made(weak_sandboxes: Sandboxes) -> None:
    old = weak_sandboxes.make()
    template = weak_sandboxes.driver.templates._current
    os.kill(template.pid, 9)
    assert eventually(lambda: not is_running(old._init_pid))
    assert not is_running(old._init_pid)
    made: list[BubblewrapSandbox] = []

    def forked_again() -> bool:
        made.append(weak_sandboxes.make())
        assert run(weak_sandboxes, made[-1], "print('well')") == "well\n"
        return made[-1].is_forked

    assert eventually(forked_again)
    assert not made[0].is_forked  # which didn't have to wait for another template
    assert made[-1].is_forked


FAILING_FORK = """
_pid, _fork, _forks = os.getpid(), os.fork, []
def _third_fails():
    if os.getpid() == _pid != 1:
        _forks.append(None)
        if len(_forks) == 3:
            raise BlockingIOError(11, "too many processes")
    return _fork()
os.fork = _third_fails
_MESSAGE_BYTES = """


@pytest.mark.parametrize("weak_sandboxes", [Weakness(supervisor={"\n_MESSAGE_BYTES = ": FAILING_FORK})], indirect=True)
def test_a_fork_that_fails_takes_no_sandboxes_along(weak_sandboxes: Sandboxes) -> None:
    """The first was that of the self-test."""
    old, new = weak_sandboxes.make(), weak_sandboxes.make()
    assert (old.is_forked, new.is_forked) == (True, False)
    for sandbox in (old, new):
        assert run(weak_sandboxes, sandbox, "print('well')") == "well\n"


@pytest.mark.parametrize(
    "weak_sandboxes",
    [Weakness(supervisor={"rights = os.pidfd_open(pid)": "__import__('time').sleep(1); rights = os.pidfd_open(pid)"})],
    indirect=True,
)
def test_a_supervisor_that_comes_too_late_is_ended(weak_sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would share its sandbox, and the socket to the service, with the one that was started instead."""
    monkeypatch.setattr(forking, "_FORK_SECONDS", 0.5)
    sandbox = weak_sandboxes.make()
    assert not sandbox.is_forked
    time.sleep(1)
    assert sandbox._group is not None
    first = [pid for pid in sandbox._group.processes() if _pids(pid)[-1] == "1"]
    assert first == [sandbox._init_pid]
    assert run(weak_sandboxes, sandbox, "print('well')") == "well\n"


@pytest.mark.parametrize("has_spoken", [False, True], ids=["at once", "after it has said that it is ready"])
@pytest.mark.parametrize("weak_sandboxes", [Weakness()], indirect=True)
def test_a_supervisor_for_which_there_is_no_descriptor_is_ended(
    weak_sandboxes: Sandboxes, monkeypatch: pytest.MonkeyPatch, has_spoken: bool
) -> None:
    """The kernel drops a descriptor that comes where all are taken. What such a supervisor has said isn't taken for
    words of the one that is started instead."""
    real, forked = socket.recv_fds, list[int]()

    def drops(sock: socket.socket, *given: int) -> tuple[bytes, list[int], int, Any]:
        message, received, flags, address = real(sock, *given)
        if sock.type == socket.SOCK_SEQPACKET and message[1:].isdigit():  # not a broker's, which has no number
            forked.append(int(message[1:]))
            if has_spoken:
                time.sleep(1)
            for descriptor in received:
                os.close(descriptor)
            received = []
        return message, received, flags, address

    with monkeypatch.context() as patched:
        patched.setattr(socket, "recv_fds", drops)
        sandbox = weak_sandboxes.make()
    assert not sandbox.is_forked
    assert len(forked) == 1
    assert eventually(lambda: not is_running(forked[0]))
    assert run(weak_sandboxes, sandbox, "print('well')") == "well\n"


@pytest.mark.parametrize(
    "weakness",
    soak_the_rest(
        [
            Weakness(
                supervisor={
                    "    preloaded = None\n": "    preloaded = None\n    'template' in config and os._exit(3)\n"
                }
            ),
            Weakness(supervisor={"    os.unshare(os.CLONE_NEWPID)": "    raise OSError('not today')"}),
            Weakness(supervisor={"        inner = enter_used": "        os._exit(1)\n        inner = enter_used"}),
            Weakness(supervisor={'mount_proc(request["read_only_proc"])': "os._exit(9)"}),
        ],
        2,
    ),
    ids=["it doesn't start", "it can't enter", "it dies", "it is no sandbox"],
)
def test_without_templates_sandboxes_start_by_themselves(tmp_path: Path, weakness: Weakness) -> None:
    made = Sandboxes(tmp_path / "sandboxes", weakness)
    try:
        for _ in range(3):
            sandbox = made.make()
            assert not sandbox.is_forked
            assert run(made, sandbox, "print('well')") == "well\n"
        eventually(lambda: not made.driver.templates.usable or not made.make())
        assert not made.driver.templates.usable
    finally:
        made.stop()


def test_where_it_fails_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given_up: list[str] = []
    made = templates.Templates(lambda: (_ for _ in ()).throw(OSError("no room")), 64)
    made.failed = lambda problem: given_up.append(str(problem))  # type: ignore[method-assign]
    assert made.take() is None
    assert given_up == ["no room"]

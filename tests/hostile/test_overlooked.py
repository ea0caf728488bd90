"""What an answer calls committed is what is there: in the warm sandbox, by the files API and in a fresh sandbox,
whatever a program does to have a change overlooked. Where the look trusts inotify, all of it is overlooked."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.api.live import process, start
from tests.conftest import MakeServer, Server, eventually
from tests.gvisor import BOTH_KINDS, needs_gvisor

FURNISH = """
import os
for d in range(6):
    os.makedirs(f"d{d}")
    for f in range(8):
        open(f"d{d}/f{f}", "w").write("as it was")
os.link("d2/f2", "d2/linked")
"""
CHANGES = {
    "a link beside": "os.link('d1/f1', 'd1/t'); write('d1/t'); os.unlink('d1/t')",
    "a link with the program's name": """
os.unlink("main.py"); os.link("d1/f1", "main.py"); write("main.py"); os.unlink("main.py")""",
    "a link in a directory that is gone": """
os.mkdir("n"); os.link("d1/f1", "n/t"); write("n/t"); os.unlink("n/t"); os.rmdir("n")""",
    "a mode by a link": "os.link('d1/f1', 't'); os.chmod('t', 0o60{0}); os.unlink('t')",
    "a link with a link's name": "os.unlink('d2/linked'); os.link('d1/f1', 'd2/linked'); write('d2/linked')",
    "a link that is renamed to a link's name": "os.link('d1/f1', 't'); write('t'); os.rename('t', 'd2/linked')",
    "a link that is replaced": "os.link('d1/f1', 't'); write('t'); open('u', 'w'); os.rename('u', 't'); os.unlink('t')",
    "a map": "map()",
    "a map, closed late": """
from array import array
file = map()
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
flight = array("i", [file.fileno(), a.fileno(), b.fileno()])
for end in (a, b):
    end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, flight)])
os._exit(0)""",
}
LOOK = "import os; print(open('d1/f1').read(), f\"{os.stat('d1/f1').st_mode & 0o7777:04o}\", end='')"
TOOLS = """
import mmap, os, socket
def write(path):
    with open(path, "w") as file: file.write("changed {0}")
def map():
    file = open("d1/f1", "r+b")
    mapped = mmap.mmap(file.fileno(), 0); mapped[:9] = b"changed {0}"
    return file
"""


class Session:
    def __init__(self, client: httpx.Client, id: str) -> None:
        self.client, self.where = client, f"/api/sessions/{id}"

    @classmethod
    def create(cls, client: httpx.Client, isolation: str) -> Session:
        body = {"language": "python", "session_id": f"s{uuid4().hex[:8]}", "isolation": isolation}
        response = client.post("/api/sessions", json=body)
        assert response.status_code == 201, response.text
        return cls(client, body["session_id"])

    def run(self, code: str, **env: str) -> str:
        answer = self.client.post(f"{self.where}/run", json={"code": code, "env": env}).json()
        assert answer["status"] == "ok", answer
        assert answer["state"]["committed"], answer
        return str(answer["stdout"])

    def fresh(self, code: str) -> str:
        """What a program sees in a copy of the session, and so in a sandbox that nothing else has run in."""
        copy = Session(self.client, self.client.post(f"{self.where}/duplicate", json={}).json()["id"])
        try:
            return copy.run(code)
        finally:
            copy.delete()

    def delete(self) -> None:
        assert self.client.delete(self.where).status_code == 200

    def tree(self) -> dict[str, list[str]]:
        """Type, mode and content of all files, as the files API lists them and packs them into an archive."""
        listed = self.client.get(f"{self.where}/files", params={"directories": True}).json()
        assert listed["next_cursor"] is None
        tree = {}
        with tarfile.open(fileobj=io.BytesIO(self.client.get(f"{self.where}/archive").content)) as archive:
            for entry in listed["files"]:
                path, kind = entry["path"], entry["type"]
                tree[path] = ["link", entry["link"]] if kind == "link" else [kind, entry["mode"]]
                if kind == "file":
                    packed = archive.extractfile(path)
                    assert packed
                    tree[path].append(packed.read().hex())
        return tree

    def looks(self) -> list[str]:
        """Content and mode of a file: by the files API, in a fresh sandbox, in the warm one."""
        name = "d1/f1"
        mode = self.client.get(f"{self.where}/stat/{name}").json()["mode"]
        return [f"{self.client.get(f'{self.where}/files/{name}').text} {mode}", self.fresh(LOOK), self.run(LOOK)]


def differences(client: httpx.Client, isolation: str, change: str) -> int:
    """How often looks differ, or see nothing of a change that was committed: it is made twice."""
    session, count = Session.create(client, isolation), 0
    session.run(FURNISH)
    time.sleep(0.1)  # until what was found can be relied on
    session.run("open('d1/f1', 'r+').read()")
    before = session.looks()
    assert len(set(before)) == 1
    for number in range(2):  # the second time with what the first has left open somewhere
        session.run(TOOLS.format(number) + change.format(number))
        seen = session.looks()
        count += len(set(seen)) > 1 or seen == before
        before = seen
    return count


def server_of(user: str, own_server: MakeServer) -> Server:
    if user == "root" and os.geteuid() != 0:
        pytest.skip("not root")
    return own_server(uid=None if user == "root" or os.geteuid() else 4201)


def soaked(*values: Any, needs: tuple[Any, ...] = ()) -> Any:
    return pytest.param(*values, marks=[*needs, pytest.mark.soak])


@pytest.mark.parametrize(
    ("isolation", "user"),
    [
        ("bubblewrap", "root"),
        pytest.param("bubblewrap", "ordinary user", marks=[] if os.geteuid() else pytest.mark.soak),
        soaked("gvisor", "root", needs=(needs_gvisor,)),
        soaked("gvisor", "ordinary user", needs=(needs_gvisor,)),
    ],
)
def test_what_is_committed_is_what_is_there(isolation: str, user: str, own_server: MakeServer) -> None:
    with server_of(user, own_server).client() as client:
        assert {name: differences(client, isolation, change) for name, change in CHANGES.items()} == dict.fromkeys(
            CHANGES, 0
        )


TRUSTING = """
from era.core.trees import trees
from era.core.trees import watch
from era.drivers.gvisor import GvisorSandbox
note_links = watch.Watch.note_links
watch.Watch.note_links = lambda *what, arrived: note_links(*what, arrived=False)
trees.Scan._look_at_state_file = lambda *_, **__: None
watch._MASK &= ~watch._OPEN
watch._CreatedNames.note = lambda *_: None
GvisorSandbox.opens_on_host = True
"""
"""Takes the events of a watch as they are, in gVisor too."""


@pytest.mark.soak
@pytest.mark.parametrize("isolation", BOTH_KINDS)
def test_a_look_that_trusts_inotify_overlooks_it(isolation: str, own_server: MakeServer) -> None:
    server = own_server(weakness=TRUSTING)
    with server.client() as client:
        for name, change in CHANGES.items():
            if (isolation, name) != ("bubblewrap", "a map"):  # whose end is an event
                # The kernel may collect what is in flight at any moment.
                tries = 10 if name == "a map, closed late" else 1
                assert any(differences(client, isolation, change) for _ in range(tries)), name


PATHS = st.sampled_from([f"d{d}/{name}" for d in range(2) for name in ("f0", "f1", "n0", "own/n0")])
DEEDS = [
    "write", "quiet write", "append", "link", "symlink", "unlink", "rename", "exchange", "truncate", "mode", "map",
    "late map", "mkdir", "rmtree", "swap directories", "write by another's name",
]  # fmt: skip
RUNS = st.lists(
    st.lists(st.tuples(st.sampled_from(DEEDS), PATHS, PATHS), min_size=3, max_size=15), min_size=1, max_size=4
)
MIXTURE = """
import array, ctypes, json, mmap, os, shutil, socket

libc = ctypes.CDLL(None, use_errno=True)
late = []

def exchange(one, other):
    if libc.renameat2(-100, one.encode(), -100, other.encode(), 2):
        raise OSError(ctypes.get_errno(), "renameat2")

def invert(file):
    mapped = mmap.mmap(file.fileno(), 0)
    mapped[:1] = bytes([mapped[0] ^ 1])

def do(deed, one, other):
    match deed:
        case "write":
            with open(one, "wb") as file: file.write(os.urandom(4))
        case "quiet write":  # the size and the times are as they were
            before = os.stat(one)
            with open(one, "r+b") as file: file.write(os.urandom(min(4, before.st_size)))
            os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns))
        case "append":
            with open(one, "ab") as file: file.write(b"+")
        case "link": os.link(one, other)
        case "write by another's name":  # which may have been a link
            if os.path.lexists(other): os.unlink(other)
            os.link(one, other)
            with open(other, "ab") as file: file.write(b"+")
        case "symlink": os.symlink(os.path.basename(one), other)
        case "unlink": os.unlink(one)
        case "rename": os.rename(one, other)
        case "exchange": exchange(one, other)
        case "truncate": os.truncate(one, 1)
        case "mode": os.chmod(one, 0o600 if os.stat(one).st_mode & 0o44 else 0o644)
        case "map":
            with open(one, "r+b") as file: invert(file)
        case "late map":  # what is in flight in a cycle is collected some time after its process has ended
            file = open(one, "r+b")
            invert(file)
            a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            flight = array.array("i", [file.fileno(), a.fileno(), b.fileno()])
            for end in (a, b):
                end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, flight)])
            late.append((file, a, b))
        case "mkdir": os.mkdir(os.path.dirname(one) + "/own")
        case "rmtree": shutil.rmtree(os.path.dirname(one) + "/own")
        case "swap directories": exchange(one.split("/")[0], other.split("/")[0])

for deed, one, other in json.loads(os.environ["DEEDS"]):
    try: do(deed, one, other)
    except (OSError, ValueError): pass  # what isn't there, or is there already; an empty file, which can't be mapped
os._exit(0)
"""
TREE = """
import json, os
tree = {}
for directory, directories, files in os.walk("."):
    for name in directories + files:
        path = os.path.relpath(os.path.join(directory, name))
        mode = f"{os.lstat(path).st_mode & 0o7777:04o}"
        if os.path.islink(path): tree[path] = ["link", os.readlink(path)]
        elif name in directories: tree[path] = ["dir", mode]
        elif path not in ("main.py", ".session_data.json"): tree[path] = ["file", mode, open(path, "rb").read().hex()]
print(json.dumps(tree))
"""


OTHERS = "has other files"


def search(client: httpx.Client, isolation: str, examples: int, is_random: bool) -> None:
    """Does any mixture of deeds in each run of a session. After each, its files are the same by the files API, in a
    fresh sandbox and in the warm one."""

    @settings(
        max_examples=examples,
        derandomize=not is_random,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(RUNS)
    def holds(runs: list[list[tuple[str, str, str]]]) -> None:
        session = Session.create(client, isolation)
        session.run(FURNISH)
        time.sleep(0.1)  # until what was found can be relied on
        for deeds in runs:
            session.run(MIXTURE, DEEDS=json.dumps(deeds))
            by_api = session.tree()
            assert by_api == json.loads(session.fresh(TREE)), f"a fresh sandbox {OTHERS}"
            assert by_api == json.loads(session.run(TREE)), f"the warm sandbox {OTHERS}"
        session.delete()

    holds()


@pytest.mark.parametrize(
    ("isolation", "user", "examples"),
    [
        ("bubblewrap", "root" if os.geteuid() == 0 else "ordinary user", 6),
        pytest.param("gvisor", "root" if os.geteuid() == 0 else "ordinary user", 2, marks=needs_gvisor),
        soaked("bubblewrap", "root", 150),
        soaked("bubblewrap", "ordinary user", 150),
        soaked("gvisor", "root", 40, needs=(needs_gvisor,)),
        soaked("gvisor", "ordinary user", 40, needs=(needs_gvisor,)),
    ],
)
def test_no_mixture_of_deeds_is_overlooked(isolation: str, user: str, examples: int, own_server: MakeServer) -> None:
    with server_of(user, own_server).client() as client:
        search(client, isolation, examples, is_random=examples > 6)


SLOW = """
import os, time
from era.core.trees.watch import Watch
skip, much = Watch.skip, os.environ["ERA_DATA_DIR"] + "/much"
def slowly(self):
    if os.path.exists(much) and not os.path.exists(much + " is looked at"):
        open(much + " is looked at", "w").close()
        time.sleep(6)
    skip(self)
Watch.skip = slowly
"""
"""The end of the first look takes long while there is this file, as it does where much is stored."""

JOINED = (
    SLOW.replace("time.sleep(6)", "while os.path.exists(much): time.sleep(0.01)")
    + """
from era.core.execution.active_runs import ActiveRun
def set(self, name, value):
    if name != "joinable" or value or not hasattr(self, name): object.__setattr__(self, name, value)
ActiveRun.__setattr__ = set
"""
)
"""It takes until the file is gone, and processes join a run as before its files are looked at."""


@pytest.mark.parametrize("weakness", [SLOW, soaked(JOINED)], ids=["", "weakened"])
def test_no_process_begins_while_a_run_s_files_are_looked_at(own_server: MakeServer, weakness: str) -> None:
    """Or what it writes meanwhile is taken for seen."""
    server = own_server(weakness=weakness)
    much = server.data_dir / "much"
    with server.client() as client, ThreadPoolExecutor() as threads:
        session = Session.create(client, "bubblewrap")
        session.run(FURNISH)
        much.touch()
        run = threads.submit(session.run, "open('d1/f1', 'w').write('first')")
        assert eventually(much.with_name("much is looked at").exists)
        id = session.where.rpartition("/")[2]
        start(client, id, "echo other > d1/f1; echo done; sleep 1000", tag="writer")
        assert eventually(lambda: process(client, id, "writer")["output_bytes"])
        if weakness == JOINED:
            assert not run.done()
            much.unlink()
        run.result()
        much.unlink(missing_ok=True)
        version = client.post(f"{session.where}/checkpoint").json()["version"]
        kept = client.get(f"{session.where}/versions/{version}/files/d1/f1").text
        assert kept == ("first" if weakness == JOINED else "other\n")


BY_THE_STATE_FILE = """
import os, sys
print("up", flush=True)
sys.stdin.readline()
if os.path.exists(".session_data.json"): os.unlink(".session_data.json")
os.link("d1/f1", ".session_data.json")
open(".session_data.json", "w").write("changed")
print("done", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("isolation", "weakness"),
    [("bubblewrap", ""), soaked("bubblewrap", TRUSTING), soaked("gvisor", "", needs=(needs_gvisor,))],
    ids=["bubblewrap", "bubblewrap weakened", "gvisor"],
)
def test_what_a_process_writes_by_the_state_file_s_name_is_not_overlooked(
    own_server: MakeServer, isolation: str, weakness: str
) -> None:
    with own_server(weakness=weakness).client() as client:
        session = Session.create(client, isolation)
        session.run(FURNISH)
        id = session.where.rpartition("/")[2]
        start(client, id, ["python3", "-c", BY_THE_STATE_FILE], tag="writer", stdin=True)
        assert eventually(lambda: process(client, id, "writer")["output_bytes"] == 3)
        for _ in range(2):  # until what was found can be relied on
            client.post(f"{session.where}/checkpoint").raise_for_status()
            time.sleep(0.1)
        client.post(f"{session.where}/processes/writer/stdin", content=b"go on\n").raise_for_status()
        assert eventually(lambda: process(client, id, "writer")["output_bytes"] == 8)
        version = client.post(f"{session.where}/checkpoint").json()["version"]
        kept = client.get(f"{session.where}/versions/{version}/files/d1/f1").text
        assert kept == ("as it was" if weakness else "changed")

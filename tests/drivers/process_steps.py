"""What tests do with the processes of a sandbox. Each step is given the sandbox first."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from era.core.ports import GuestProcess, Sandbox
from era.core.process import ProcessEnded, ProcessOutput, ProcessSpec, TerminalSize
from era.core.program import Ended, Output, Program

PATIENCE = 180.0
"""Only bounds how long a test that fails takes."""

type Said = dict[str, bytes]

SIZE = TerminalSize(80, 24)


def spec(*command: str, env: Mapping[str, str] | None = None, **more: Any) -> ProcessSpec:
    return ProcessSpec(command, env or {}, **more)


def shell(script: str, **more: Any) -> ProcessSpec:
    return spec("sh", "-c", script, **more)


async def started(sandbox: Sandbox, what: ProcessSpec) -> GuestProcess:
    return await (await sandbox.process_supervisor()).start(what)


class Following:
    """What a process has said, and its end, followed in the background."""

    def __init__(self, process: GuestProcess) -> None:
        self.process = process
        self.said: Said = {}
        self.ended: ProcessEnded | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for event in self.process.events():
            if isinstance(event, ProcessEnded):
                self.ended = event
            else:
                self.said[event.stream] = self.said.get(event.stream, b"") + event.data
            self._changed.set()

    async def until(self, text: bytes, times: int = 1) -> Said:
        """Wait until it has said this, so many times."""
        try:
            async with asyncio.timeout(PATIENCE):
                while sum(said.count(text) for said in self.said.values()) < times:
                    assert self.ended is None, (self.said, self.ended)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{text!r} did not come, but {self.said}") from None
        return self.said

    async def press(self, key: bytes, text: bytes, *, again: bool) -> None:
        """Press a key of the terminal, and wait until it has said this. `again`: press it now and then until it has, as
        people do: gVisor may lose a signal that comes while a process becomes another program."""

        async def keep_pressing() -> None:
            while True:
                await asyncio.sleep(3)
                await self.process.write(key)

        await self.process.write(key)
        pressing = asyncio.create_task(keep_pressing()) if again else None
        try:
            await self.until(text)
        finally:
            if pressing is not None:
                pressing.cancel()

    async def end(self) -> tuple[Said, ProcessEnded]:
        async with asyncio.timeout(PATIENCE):
            await asyncio.shield(self._task)
        assert self.ended is not None
        return self.said, self.ended


async def begun(sandbox: Sandbox, what: ProcessSpec) -> Following:
    return Following(await started(sandbox, what))


async def process(sandbox: Sandbox, what: ProcessSpec, stdin: bytes | None = None) -> tuple[Said, ProcessEnded]:
    """Run a process to its end."""
    following = await begun(sandbox, what)
    if stdin is not None:
        await following.process.write(stdin)
        await following.process.close_stdin()
    return await following.end()


async def processes(sandbox: Sandbox, what: Sequence[ProcessSpec]) -> list[tuple[Said, ProcessEnded]]:
    """Run several at a time."""
    return [await following.end() for following in [await begun(sandbox, one) for one in what]]


async def run(sandbox: Sandbox, code: str, env: Mapping[str, str] | None = None) -> tuple[str, Ended]:
    """Run a program."""
    said, ended = b"", None
    async for event in sandbox.run(Program(code.encode(), b"{}", env or {}, 30, False, {})):
        if isinstance(event, Output):
            said += event.data
        else:
            ended = event
    assert ended is not None
    return said.decode(errors="replace"), ended


@contextlib.asynccontextmanager
async def running(sandbox: Sandbox, what: ProcessSpec) -> AsyncIterator[Following]:
    """A process that is killed in the end."""
    following = await begun(sandbox, what)
    try:
        yield following
    finally:
        await following.process.kill()
        await following.end()


async def end_processes(sandbox: Sandbox) -> None:
    await (await sandbox.process_supervisor()).close()


# -- input and output ------------------------------------------------------------------------------------------------


async def waits_for_its_record(sandbox: Sandbox) -> tuple[bytes, Said, ProcessEnded]:
    """A process that is put on record late: what there was of what it makes until then, and how it went on."""
    recorded = asyncio.get_running_loop().create_future()
    what = shell("touch made; echo ${#LONG}; exit 7", env={"LONG": "x" * 100_000})
    starting = asyncio.create_task((await sandbox.process_supervisor()).start(what, lambda: recorded))
    seen, _ = await process(sandbox, shell("sleep 0.5; ls | grep made"))
    assert not starting.done()
    recorded.set_result(None)
    return seen.get("stdout", b""), *await Following(await starting).end()


async def can_t_be_put_on_record(sandbox: Sandbox) -> tuple[str, bytes]:
    """A process that is never put on record: what its start raises, and what there is of what it makes in the end."""

    async def alive() -> int:
        return int((await process(sandbox, shell("set -- /proc/[0-9]*; echo $#")))[0]["stdout"])

    before = await alive()
    recorded = asyncio.get_running_loop().create_future()
    starting = asyncio.create_task((await sandbox.process_supervisor()).start(shell("touch refused"), lambda: recorded))
    async with asyncio.timeout(PATIENCE):
        while await alive() == before:  # until it is made ready
            pass
    recorded.set_exception(LookupError("there is no session"))
    [raised] = await asyncio.gather(starting, return_exceptions=True)
    async with asyncio.timeout(PATIENCE):
        while await alive() > before:
            pass
    seen, _ = await process(sandbox, shell("ls | grep refused"))
    return str(raised), seen.get("stdout", b"")


async def refuses_input(sandbox: Sandbox) -> list[str]:
    """Which writes are refused, of those that must be."""
    refused = []
    without = await begun(sandbox, shell("sleep 1000"))
    for name, write in (("stdin", without.process.write), ("channel", without.process.send)):
        with contextlib.suppress(BrokenPipeError):
            await write(b"x")
            continue
        refused.append(f"{name} of one without")
    await without.process.kill()
    await without.end()
    closes = await begun(sandbox, shell("exec <&-; echo closed; sleep 1000", stdin=True))
    await closes.until(b"closed")
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                await closes.process.write(b"x")
                await asyncio.sleep(0.01)
    except BrokenPipeError:
        refused.append("stdin of one that has closed it")
    await closes.process.kill()
    await closes.end()
    try:
        await closes.process.write(b"x")
    except BrokenPipeError:
        refused.append("stdin of one that has ended")
    return refused


async def terminal(sandbox: Sandbox) -> Said:
    """A shell in a terminal: its size changes, a job is interrupted, another one is stopped and goes on."""
    following = await begun(sandbox, spec("bash", "--norc", "-i", pty=SIZE, env={"PS1": r"<\#> "}))
    write, until = following.process.write, following.until
    press = partial(following.press, again=sandbox.enforced["driver"] == "gvisor")
    await until(b"<1> ")
    await write(b"stty size; tty; sh -c \"trap 'stty size; exit' WINCH; echo u''p; while :; do sleep 0.02; done\"\n")
    await until(b"24 80\r\n/dev/pts/")
    await until(b"up\r\n")
    await following.process.resize(TerminalSize(100, 40))
    await until(b"40 100\r\n")
    await until(b"<2> ")
    # `exec`: dash loses a Ctrl-C that comes while it starts a command that isn't to take its place (vfork).
    await write(b"sh -c 'echo asl''eep; exec sleep 1000'\n")
    await until(b"asleep\r\n")
    await press(b"\x03", b"<3> ")
    await write(b"echo status $?\n")
    await until(b"status 130")
    await write(b"sh -c 'echo also u''p; exec cat'\n")
    await until(b"also up\r\n")
    await press(b"\x1a", b"Stopped")
    await until(b"<5> ")
    await write("fg\ngrüße\n".encode())
    await until("grüße".encode())
    await press(b"\x03", b"<6> ")
    await following.process.close_stdin()
    said, ended = await following.end()
    assert ended.cause == "exit", ended
    return said


async def unread(sandbox: Sandbox) -> tuple[int, bytes, ProcessEnded]:
    """One process's output isn't read at first: what another one says in the meantime; then how much the first has
    said."""
    supervisor = await sandbox.process_supervisor()
    first = await supervisor.start(shell("head -c 20000000 /dev/zero; echo end >&2"))
    others = b""
    for number in range(10):
        said, _ = await process(sandbox, shell(f"echo {number}"))
        others += said["stdout"]
    count, last = 0, None
    async with asyncio.timeout(PATIENCE):
        async for event in first.events():
            if isinstance(event, ProcessOutput):
                count += len(event.data)
            else:
                last = event
    assert last is not None
    return count, others, last


async def unread_input(sandbox: Sandbox) -> tuple[bool, bytes]:
    """Writing to a process that doesn't read: whether that waits, and what another process says in the meantime."""
    slow = await begun(sandbox, shell("sleep 1000", stdin=True))
    writing = asyncio.create_task(slow.process.write(bytes(5_000_000)))
    said, _ = await process(sandbox, spec("cat", stdin=True), b"well")
    waits = not writing.done()
    await slow.process.kill()
    await slow.end()
    with contextlib.suppress(BrokenPipeError):
        await writing
    return waits, said["stdout"]


async def many(sandbox: Sandbox, count: int, writers: int) -> tuple[int, int]:
    """So many processes at once, and so many that write as fast as they can: how many answer, and how often one more
    echoes in the meantime."""
    waiting = [await begun(sandbox, spec("cat", stdin=True)) for _ in range(count)]
    busy = [await begun(sandbox, spec("yes")) for _ in range(writers)]
    echo = await begun(sandbox, spec("cat", stdin=True))
    echoes = 0
    for number in range(20):
        await echo.process.write(b"<%d>" % number)
        await echo.until(b"<%d>" % number)
        echoes += 1
    for following in [*busy, echo]:
        await following.process.kill()
        following.said.clear()
    answers = 0
    for following in waiting:
        await following.process.write(b"here")
        await following.process.close_stdin()
        said, ended = await following.end()
        answers += said.get("stdout") == b"here" and ended.exit_code == 0
    for following in [*busy, echo]:
        await following.end()
    return answers, echoes


# -- signals ---------------------------------------------------------------------------------------------------------


async def signalled(sandbox: Sandbox, number: int, group: bool) -> tuple[Said, ProcessEnded]:
    """What a shell with a child says when it gets a signal."""
    child = f"trap 'echo child; exit' {number}; echo up; while :; do sleep 0.05; done"
    script = f"trap '{'wait $!; ' if group else ''}echo shell; exit 3' {number}; sh -c \"{child}\" & wait; wait"
    following = await begun(sandbox, shell(script))
    await following.until(b"up")
    await following.process.signal(number, group=group)
    said, ended = await following.end()
    await following.process.kill()
    return said, ended


COUNT = "import os; print(sum(name.isdigit() for name in os.listdir('/proc')))"


async def left_of_a_tree(sandbox: Sandbox) -> tuple[ProcessEnded, bytes]:
    """A process with descendants is killed; what is left then, as another one sees it."""
    script = "setsid sleep 1000 & (sleep 1000 & sleep 1000) & sleep 1000 & echo up; wait"
    following = await begun(sandbox, shell(script))
    await following.until(b"up")
    await asyncio.sleep(0.1)
    await following.process.kill()
    _, ended = await following.end()
    said: Said = {"stdout": b"?"}
    deadline = time.monotonic() + PATIENCE
    while said["stdout"].strip() != b"2" and time.monotonic() < deadline:
        said, _ = await process(sandbox, spec("python3", "-c", COUNT))
    return ended, said["stdout"].strip()


async def background(sandbox: Sandbox) -> tuple[Said, ProcessEnded, bytes]:
    """A shell ends and leaves something in the background, which goes on writing."""
    script = ": > beside; (while :; do echo more; echo x >> beside; sleep 0.02; done) & echo first"
    said, ended = await process(sandbox, shell(script))
    before, _ = await process(sandbox, shell("wc -l < beside"))
    after = before
    deadline = time.monotonic() + PATIENCE
    while int(after["stdout"]) <= int(before["stdout"]) + 3 and time.monotonic() < deadline:
        after, _ = await process(sandbox, shell("wc -l < beside"))
    await end_processes(sandbox)
    return said, ended, b"lives" if int(after["stdout"]) > int(before["stdout"]) else b"has ended"


# -- beside runs -----------------------------------------------------------------------------------------------------

LOOKS = """
import os, signal, sys
own = {1, os.getpid(), os.getppid()}
print([name for name in os.listdir('/proc') if name.isdigit() and int(name) not in own])
print([name for name in os.listdir('/dev/pts') if name != 'ptmx'] if os.path.isdir('/dev/pts') else [])
found = []
for pid in range(2, 400):
    for path in (f'/proc/{pid}/environ', f'/dev/shm/{pid}/environ'):
        try: content = open(path, 'rb').read()
        except OSError: continue
        if b'CANARY' in content: found.append(pid)
print(found)
"""


async def look_at_each_other(sandbox: Sandbox) -> tuple[str, str]:
    """What a run sees of a process, and what a process sees of a run. Each has a variable that nobody else may see."""
    async with running(sandbox, spec("bash", "-i", pty=SIZE, env={"SECRET": "CANARY"})) as beside:
        await beside.process.write(b"echo u''p\n")
        await beside.until(b"up")
        from_run, _ = await run(sandbox, LOOKS)
    going_on = asyncio.create_task(run(sandbox, WAITS, {"SECRET": "CANARY"}))
    said: Said = {}
    deadline = time.monotonic() + PATIENCE
    while b"runs" not in said.get("stdout", b"") and time.monotonic() < deadline:
        said, _ = await process(sandbox, shell("cat /tmp/runs 2>/dev/null"))
    said, _ = await process(sandbox, spec("python3", "-c", LOOKS))
    await process(sandbox, shell("touch /tmp/end"))
    await going_on
    return from_run, said["stdout"].decode()


WAITS = """
import os, pty, subprocess, time
subprocess.Popen(['sleep', '1000'])
master, slave = pty.openpty()
open('/tmp/runs', 'w').write('runs')
while not os.path.exists('/tmp/end'): time.sleep(0.01)
os.unlink('/tmp/end'); os.unlink('/tmp/runs')
"""


async def outlives_runs(sandbox: Sandbox) -> tuple[list[int], str, Said]:
    """Runs end beside a process; then what they have left of processes, and the process's answer."""
    async with running(sandbox, spec("cat", stdin=True)) as beside:
        codes = [
            (await run(sandbox, "import subprocess; subprocess.Popen(['sleep', '1000'])"))[1].exit_code,
            (await run(sandbox, "import os; os.kill(-1, 9)"))[1].exit_code,
        ]
        left, _ = await run(sandbox, COUNT)
        await beside.process.write(b"still here")
        return codes, left, await beside.until(b"still here")


async def a_run_outlives_processes(sandbox: Sandbox) -> tuple[str, Ended, ProcessEnded]:
    """All processes end while a run is under way, with their supervisor."""
    going_on = asyncio.create_task(run(sandbox, WAITS))
    beside = await begun(sandbox, shell("until test -e /tmp/runs; do sleep 0.01; done; echo up; sleep 1000"))
    await beside.until(b"up")
    await end_processes(sandbox)
    _, how = await beside.end()
    await process(sandbox, shell("touch /tmp/end"))
    said, ended = await going_on
    return said, ended, how


async def scratch(sandbox: Sandbox) -> list[str]:
    """What is in /tmp after runs: with a process that has a file there, which the first run began without, and once
    there are no processes. Without hidden files: shells of other tests leave their history."""
    seen = []
    list_it = "import os; print(*sorted(name for name in os.listdir('/tmp') if name[0] != '.'))"
    joined = asyncio.create_task(
        run(sandbox, "import os, time\nwhile not os.path.exists('/tmp/joined'): time.sleep(0.01)")
    )
    async with running(
        sandbox, shell("echo mine > /tmp/of-a-process; touch /tmp/joined; echo up; exec sleep 1000")
    ) as beside:
        await beside.until(b"up")
        await joined
        await run(sandbox, "open('/tmp/of-a-run', 'w')")
        seen.append((await run(sandbox, list_it))[0].strip())
    await end_processes(sandbox)
    await run(sandbox, "")
    seen.append((await run(sandbox, list_it))[0].strip())
    return seen


SERVES = """
import socket
server = socket.create_server(('127.0.0.1', 0))
print(server.getsockname()[1], flush=True)
while True:
    client, _ = server.accept()
    client.sendall(b'hello'); client.close()
"""


async def connected(sandbox: Sandbox) -> bytes:
    """What a server in a process says to a connection from the host, while no run is under way."""
    async with running(sandbox, spec("python3", "-c", SERVES)) as beside:
        said = await beside.until(b"\n")
        assert "stdout" in said, said
        sock, deadline = None, time.monotonic() + PATIENCE
        while sock is None and time.monotonic() < deadline:
            sock = await sandbox.connect(int(said["stdout"]))
        assert sock is not None
        with sock:
            return await asyncio.get_running_loop().sock_recv(sock, 100)


# -- the freezer -----------------------------------------------------------------------------------------------------

COUNTS = "i=0; while :; do i=$((i+1)); echo $i > counter; done"


async def stands_still(sandbox: Sandbox) -> tuple[bool, bool, bool]:
    """Whether a sandbox can be frozen, whether nothing changes then, and whether all goes on afterwards."""
    counter = sandbox.workspace / "counter"

    async def changes(seconds: float) -> bool:
        before, deadline = counter.read_bytes(), time.monotonic() + seconds
        while time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            if counter.read_bytes() not in (before, b""):
                return True
        return False

    async with running(sandbox, shell(COUNTS + "& echo up; wait")) as beside:
        await beside.until(b"up")
        while not counter.exists():  # noqa: ASYNC110  nothing tells of it
            await asyncio.sleep(0.01)
        async with sandbox.frozen() as is_frozen:
            frozen = bool(is_frozen)
            still = frozen and not await changes(1)
        return frozen, still, await changes(PATIENCE)


# -- ends ------------------------------------------------------------------------------------------------------------


async def over_a_channel(sandbox: Sandbox, what: ProcessSpec, message: bytes) -> Said:
    following = await begun(sandbox, what)
    await following.process.send(message)
    return (await following.end())[0]


async def variables_of_another(sandbox: Sandbox) -> bytes:
    """In which processes one finds the variable of another one."""
    async with running(sandbox, shell("echo up; exec sleep 1000", env={"SECRET": "CANARY"})) as beside:
        await beside.until(b"up")
        said, _ = await process(sandbox, spec("python3", "-c", LOOKS))
        return said["stdout"].splitlines()[2]


async def without_a_supervisor(sandbox: Any) -> tuple[Sequence[str], tuple[str, Said]]:
    """The supervisor is killed: how its processes have ended, and what a run and a new process say then."""
    beside = [await begun(sandbox, shell("sleep 1000")) for _ in range(3)]
    (await sandbox.process_supervisor()).life.kill()
    causes = [(await following.end())[1].cause for following in beside]
    said, _ = await run(sandbox, "print('runs')")
    return causes, (said, (await process(sandbox, shell("echo well")))[0])


async def closed_under_processes(sandbox: Sandbox) -> list[str]:
    """The sandbox is closed, and frozen in the meantime: how its processes have ended."""
    beside = [
        await begun(sandbox, what)
        for what in (shell("sleep 1000"), spec("bash", "-i", pty=SIZE), shell("setsid sleep 1000 & sleep 1000"))
    ]
    async with sandbox.frozen():
        await sandbox.close()
    return [(await following.end())[1].cause for following in beside]


async def fork_bomb(sandbox: Sandbox) -> tuple[str, str]:
    """A fork bomb goes on in a process: what a run says then, and what a new process says once it is killed."""
    bomb = "import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(0.01)"
    following = await begun(sandbox, spec("python3", "-c", f"print('up', flush=True)\n{bomb}"))
    await following.until(b"up")
    await asyncio.sleep(0.5)
    forks = (
        "import os\ntry:\n    os.fork() or os._exit(0)\n    print('forks')\n"
        "except OSError as problem: print(problem.strerror)"
    )
    said, _ = await run(sandbox, forks)
    await end_processes(sandbox)
    await following.end()
    again, _ = await process(sandbox, shell("echo well"))
    return said.strip(), again["stdout"].decode().strip()


async def out_of_memory(sandbox: Sandbox) -> tuple[ProcessEnded, str]:
    """A process takes too much memory: how it has ended, and what a run says then. Another process goes on."""
    other = await begun(sandbox, spec("cat", stdin=True))
    takes = (
        "import mmap\nheld = []\nwhile True:\n    held.append(mmap.mmap(-1, 8 << 20)); held[-1].write(b'x' * (8 << 20))"
    )
    following = await begun(sandbox, spec("python3", "-c", takes))
    _, ended = await following.end()
    said, _ = await run(sandbox, "print('well')")
    if not said and sandbox.enforced["driver"] == "gvisor":
        # What was freed counts until gVisor gives it back, and may have ended this run, too.
        await asyncio.sleep(2)
        said, _ = await run(sandbox, "print('well')")
    with contextlib.suppress(BrokenPipeError):
        await other.process.close_stdin()
    await other.end()
    return ended, said.strip()


async def out_of_memory_beside_a_run(sandbox: Sandbox, size: int = 4 << 20) -> tuple[ProcessEnded | None, Ended, str]:
    """A process takes too much memory, `size` at a time, while a run waits for its end: how both have ended."""
    takes = (
        "import socket, time\nserver = socket.create_server(('127.0.0.1', 4711))\nprint('ready', flush=True)\n"
        "waits = server.accept()\nheld = []\n"
        f"while True:\n    held.append(bytearray(b'1') * {size})\n    time.sleep(0.005)"
    )
    waits = (
        "import socket\nother = socket.create_connection(('127.0.0.1', 4711))\nprint('well', flush=True)\n"
        "try: other.recv(1)\nexcept OSError: pass"
    )
    async with running(sandbox, spec("python3", "-c", takes)) as following:
        await following.until(b"ready")
        said, ended = await run(sandbox, waits)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                await following.end()
    return following.ended, ended, said.strip()


async def system_v_objects(sandbox: Sandbox) -> list[str]:
    """What is left of a shared memory object of a process after a run, and once there are no processes."""
    makes = (
        "import ctypes, time; print(ctypes.CDLL(None).shmget(4711, 4096, 0o1600) >= 0, flush=True); time.sleep(1000)"
    )
    looks = "import ctypes; print(ctypes.CDLL(None).shmget(4711, 4096, 0) >= 0)"
    seen = []
    async with running(sandbox, spec("python3", "-c", makes)) as beside:
        await beside.until(b"True")
        await run(sandbox, "")
        seen.append((await run(sandbox, looks))[0].strip())
    await end_processes(sandbox)
    await run(sandbox, "")
    seen.append((await run(sandbox, looks))[0].strip())
    return seen


async def too_many_files_in_memory(sandbox: Sandbox) -> tuple[str, str, ProcessEnded, str]:
    """Processes make as many files in /tmp as a run may, then more. How a run beside, the last and one after it end."""
    makes = (
        "import subprocess, time\nfor _ in range({children}): subprocess.Popen(['sleep', '1000'])\n"
        "for number in range({first}, {last}): open(f'/tmp/{{number}}', 'w').close()\n"
        "print('up', flush=True); time.sleep(1000)"
    )
    sleeps = "import time; time.sleep(0.5)"
    first = await begun(sandbox, spec("python3", "-c", makes.format(first=0, last=9_990, children=0)))
    await first.until(b"up")
    _, beside = await run(sandbox, sleeps)
    second = await begun(sandbox, spec("python3", "-c", makes.format(first=10_000, last=30_000, children=30)))
    said, ended = await second.end()
    after, _ = await (await begun(sandbox, spec("sh", "-c", "sleep 0.5; echo well"))).end()
    await first.end()
    await end_processes(sandbox)
    return beside.cause, said.get("stderr", b"").decode(), ended, after.get("stdout", b"").decode()

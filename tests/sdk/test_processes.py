"""Processes and terminals by the SDK and the command."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
from pathlib import Path

import pytest

import era as package
from era import AsyncEra, Era
from era.sdk.events import ProcessEvent, ProcessExit, ProcessOutput
from tests.api.live import refusal, socket
from tests.client.command import environment, era
from tests.conftest import ERA, MakeServer, Server, eventually
from tests.sdk.cutter import Cutter, cut_once_after

ASK = "import sys\nfor line in sys.stdin:\n    print('got', line.strip(), flush=True)\nprint('end')"


def test_a_process_is_asked_and_answers(server: Server) -> None:
    with Era(server.url) as client:
        session = client.session("python", isolation="bubblewrap")
        process = session.process(["python3", "-c", ASK], stdin=True, tag="asked", env={"A": "1"})
        process.write("süß\n")
        process.write(b"two\n")
        process.close_stdin()
        *output, last = process.events()
        assert b"".join(e.data for e in output if isinstance(e, ProcessOutput)) == "got süß\ngot two\nend\n".encode()
        assert isinstance(last, ProcessExit)
        assert last.exit_code == 0
        assert [info.tag for info in session.processes.list()] == ["asked"]
        with pytest.raises(package.Conflict):
            process.write("late")
        assert session.stop().status == "idle"


def test_a_checkpoint_keeps_what_a_process_has_written(server: Server) -> None:
    with Era(server.url) as client:
        session = client.session("python", isolation="bubblewrap")
        before = session.checkpoint()  # it isn't live: its version is all there is
        assert (before.version, before.consistent) == (session.info().version, True)
        session.process("echo made > made.txt; echo ready; exec sleep 600", tag="writer")
        assert eventually(lambda: session.files.list() != [])
        made = session.checkpoint()
        assert made.version > before.version
        assert list(session.versions.files(made.version)) == ["made.txt"]
        era(server, "checkpoint", session.id, code=0)
        answer = json.loads(era(server, "checkpoint", session.id, "--json", code=0).stdout)
        assert answer == {"version": session.info().version, "consistent": os.geteuid() == 0}  # only root can freeze
        assert int(era(server, "checkpoint", session.id, code=0).stdout) == answer["version"]
        with pytest.raises(package.NotFound):
            client.sessions.named("none").checkpoint()
        session.delete(purge=True)


@pytest.mark.parametrize("lost", [0, 12])
def test_a_watch_goes_on_where_it_broke(server: Server, lost: int) -> None:
    """Even where that takes a while, and so many connections."""
    with (
        Cutter(server.url, cut_once_after(b'"first.txt"', lost)) as way,
        Era(way.url) as client,
        Era(server.url) as uncut,
    ):
        session = client.session("python", isolation="bubblewrap")
        session.process("exec sleep 600")
        events = session.files.watch(recursive=True)
        assert next(events).type == "watching"
        uncut.sessions.named(session.id).files["first.txt"] = "1"  # its answer has the name, too
        while next(events).type != "watching":
            pass
        session.files["second.txt"] = "2"
        while next(events).path != "second.txt":
            pass
        assert way.connections > lost
        del events
        session.delete(purge=True)


def test_watch_goes_on_when_the_session_becomes_live(server: Server) -> None:
    with Era(server.url) as client:
        session = client.session("python", isolation="bubblewrap")
        events = session.files.watch(".")
        assert next(events).type == "watching"
        session.files["by a call"] = "1"
        assert (next(events).type, session.info().status) == ("create", "idle")
        session.run("open('by a run', 'w').write('1')")
        assert next(events).path == "by a run"
        session.process("exec sleep 600")
        types = [next(events).type for _ in range(3)]
        assert types == ["overflow", "watching", "gap"], "those who watch are told to look again"
        session.files["live"] = "1"
        while next(events).path != "live":
            pass
        del events
        session.delete(purge=True)


def test_dot_is_the_working_directory(server: Server) -> None:
    with Era(server.url) as client:
        session = client.session("python", isolation="bubblewrap")
        session.files["d/file"] = "1"
        assert [file.path for file in session.files.list(".")] == ["d/file"]
        assert session.files.stat(".").type == "dir"
        assert "d/file" in era(server, "files", "list", session.id, ".", code=0).stdout
        session.files.mkdir(".")
        session.delete(purge=True)


async def test_a_watch_for_asyncio(server: Server) -> None:
    async with AsyncEra(server.url) as client:
        session = await client.session("python", isolation="bubblewrap")
        process = await session.process(["cat"], stdin=True)
        async for event in session.files.watch():
            if event.type == "watching":
                await session.files.write("made.txt", "1")
            elif event.path == "made.txt":
                break
        await process.stop()
        await session.delete(purge=True)


async def test_a_ticket_opens_one_websocket(own_server: MakeServer) -> None:
    server = own_server(api_key="the-operators-own-key")
    async with AsyncEra(server.url, api_key="the-operators-own-key") as client:
        session = await client.session("python", isolation="bubblewrap")
        given = await session.ticket()
        assert given.expires_at.endswith("Z")
        path = f"{session.id}/terminal?ticket={given.ticket}"
        with socket(server, path):
            assert refusal(server, path) == (401, "unauthorized")
        await session.delete(purge=True)


async def test_a_process_for_asyncio(server: Server) -> None:
    async with AsyncEra(server.url) as client:
        session = await client.session("python", isolation="bubblewrap")
        # By itself: a signal that comes just before sh -c makes way for its command is lost, on the host as well.
        process = await session.process(["sleep", "600"], tag="web")
        await session.processes.get("web").signal("INT")
        assert (await process.wait()).signal == "INT"
        terminal = await session.terminal(50, 20)
        await terminal.resize(60, 20)
        await terminal.write("stty size; exit 3\n")
        shown = b"".join([event.data async for event in terminal.events() if isinstance(event, ProcessOutput)])
        assert b"20 60" in shown
        assert (await terminal.info()).exit_code == 3
        assert (await (await session.process("sleep 600")).stop()).exit_code == 143


def test_output_goes_on_where_it_broke(server: Server) -> None:
    code = "echo 1; until [ -e go ]; do sleep 0.02; done; for n in $(seq 2 40); do echo $n; done"
    events: list[ProcessEvent] = []
    with (
        Cutter(server.url, cut_once_after(b"7\\n")) as way,
        Era(way.url) as client,
        Era(server.url) as uncut,
    ):
        session = client.session("python", isolation="bubblewrap")
        for event in session.process(code).events():
            events.append(event)
            if len(events) == 1:  # so there is something to go on after
                uncut.sessions.named(session.id).files["go"] = ""
    shown = b"".join(event.data for event in events if isinstance(event, ProcessOutput))
    assert shown == b"".join(b"%d\n" % n for n in range(1, 41))
    assert any(b"/events?after=" in request and b"after=0" not in request for request in way.requests)


def test_by_the_command(server: Server) -> None:
    era(server, "sessions", "create", "python", "app", code=0)
    id = era(server, "exec", "app", "--process", "--tag", "web", "--", "echo up; exec sleep 600", code=0).stdout.strip()
    assert eventually(lambda: era(server, "logs", "app", "web", code=0).stdout == "up\n")
    (row,) = era(server, "ps", "app", code=0).stdout.splitlines()
    assert row.split()[:3] == [id, "web", "running"]
    assert "tag_in_use" in era(server, "exec", "app", "--process", "--tag", "web", "--json", "--", "ls", code=2).stderr
    assert "--process" in era(server, "exec", "app", "--tag", "x", "--", "ls", code=2).stderr
    era(server, "kill", "app", "web", code=0)
    assert era(server, "logs", "app", id, code=143).stdout == "up\n"
    assert "live" in era(server, "sessions", "list", code=0).stdout
    era(server, "stop", "app", code=0)


def test_a_shell_of_a_pipe(server: Server) -> None:
    era(server, "sessions", "create", "python", "app", code=0)
    done = era(server, "shell", "app", stdin="echo $((40 + 2)); exit 5\n", code=5)
    assert "42\r\n" in done.stdout


def test_a_shell_of_a_terminal(server: Server, tmp_path: Path) -> None:
    """Ctrl-C goes to what runs in it, and the terminal is as before at the end."""
    era(server, "sessions", "create", "python", "app", code=0)
    ours, theirs = pty.openpty()
    env = environment(server, TERM="xterm")
    process = subprocess.Popen([ERA, "shell", "app"], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""

    def wait_for(text: bytes, again: bytes = b"") -> None:
        """Wait until it shows this; where nothing comes for a while, type `again`, as people do."""
        nonlocal shown
        while text not in shown:
            if again and not select.select([ours], [], [], 5)[0]:
                os.write(ours, again)
                continue
            shown += os.read(ours, 4096)

    os.write(ours, b"echo re''ady\n")
    wait_for(b"ready\r\n")  # what it prints, not what is typed
    os.write(ours, b"echo wai''ting; sleep 500\n")
    wait_for(b"waiting\r\n")
    os.write(ours, b"\x03")
    wait_for(b"^C")
    os.write(ours, b"echo a''gain\n")
    wait_for(b"again\r\n", again=b"\x03echo a''gain\n")
    os.write(ours, b"exit 7\n")
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 7
    assert b"Traceback" not in shown


def test_a_shell_goes_on_where_a_call_with_keys_was_lost(server: Server) -> None:
    era(server, "sessions", "create", "python", "app", code=0)
    keyboard, theirs = pty.openpty()
    with Cutter(server.url, cut_once_after(b'"bytes":')) as way:
        env = environment(None, TERM="xterm", ERA_SERVER=way.url)
        pipe = subprocess.PIPE
        with subprocess.Popen([ERA, "shell", "app"], stdin=theirs, stdout=pipe, stderr=pipe, env=env) as shell:
            try:
                assert shell.stdout is not None
                os.write(keyboard, b"echo re''ady\n")
                while b"ready" not in shell.stdout.readline():
                    assert shell.poll() is None
                os.write(keyboard, b"exit 7\n")
                _, said = shell.communicate(timeout=60)
            finally:
                shell.kill()
                os.close(keyboard)
                os.close(theirs)
    assert shell.returncode == 7
    assert said.startswith(b"era: input may be lost: ")


def test_a_shell_of_a_pipe_is_left_where_its_input_was_lost(server: Server) -> None:
    """The rest of a script would mean something else."""
    era(server, "sessions", "create", "python", "app", code=0)
    with Cutter(server.url, cut_once_after(b'"bytes":')) as way:
        done = era(None, "shell", "app", stdin="echo up\n", code=130, env={"ERA_SERVER": way.url})
    assert "input may be lost" in done.stderr
    (row,) = era(server, "ps", "app", code=0).stdout.splitlines()
    assert f"--process {row.split()[0]}" in done.stderr


def test_listening_ends_and_the_process_goes_on(server: Server) -> None:
    era(server, "sessions", "create", "python", "app", code=0)
    era(server, "exec", "app", "--process", "--tag", "web", "--", "echo up; exec sleep 600", code=0)
    listening = subprocess.Popen([ERA, "logs", "-f", "app", "web"], stdout=subprocess.PIPE, env=environment(server))
    assert listening.stdout is not None
    assert listening.stdout.readline() == b"up\n"
    listening.send_signal(signal.SIGINT)
    listening.communicate(timeout=60)
    assert listening.returncode == 130
    assert "running" in era(server, "ps", "app", code=0).stdout

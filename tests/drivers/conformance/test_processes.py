"""Processes beside runs: what goes in and out, signals, terminals; and that runs and processes don't meet."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.drivers import moment_steps
from tests.drivers import process_steps as steps
from tests.drivers.process_steps import shell, spec


@pytest.fixture
def live(expect_known_failures: None, sandboxes: Any, sandbox: Any) -> Iterator[Any]:
    """A sandbox that may have processes, and has none afterwards."""
    yield sandbox
    sandboxes.do(sandbox, steps.end_processes)


def test_what_a_process_says_and_how_it_ends(sandboxes: Any, live: Any) -> None:
    said, ended = sandboxes.do(
        live, steps.process, shell("echo out; echo err >&2; pwd; echo $A; exit 3", env={"A": "b"})
    )
    assert said == {"stdout": b"out\n/workspace\nb\n", "stderr": b"err\n"}
    assert (ended.exit_code, ended.signal, ended.cause) == (3, None, "exit")
    assert ended.cpu_us >= 0
    assert ended.peak_memory_bytes > 0


def test_a_command_that_can_t_be_started(sandboxes: Any, live: Any) -> None:
    for command, code, why in (
        (spec("no-such-program"), 127, b"no-such-program: No such file or directory"),
        (spec("./nothing"), 127, b"./nothing: No such file or directory"),
        (spec("/etc/passwd"), 126, b"/etc/passwd: Permission denied"),
        (spec("true", cwd="not/there"), 126, b"not/there: No such file or directory"),
    ):
        said, ended = sandboxes.do(live, steps.process, command)
        assert (ended.exit_code, ended.cause) == (code, "exit")
        assert why in said["stderr"]
    said, ended = sandboxes.do(live, steps.process, spec("no-such-program", pty=steps.SIZE))
    assert b"no-such-program: No such file" in said["pty"]


def test_nothing_is_executed_before_a_process_is_on_record(sandboxes: Any, live: Any) -> None:
    made_before, said, ended = sandboxes.do(live, steps.waits_for_its_record)
    assert made_before == b""
    assert (said, ended.exit_code) == ({"stdout": b"100000\n"}, 7)


def test_a_process_that_can_t_be_put_on_record_is_killed(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.can_t_be_put_on_record) == ("there is no session", b"")


def test_it_starts_in_a_directory_below(sandboxes: Any, live: Any) -> None:
    sandboxes.do(live, steps.process, shell("mkdir -p sub/directory"))
    said, _ = sandboxes.do(live, steps.process, spec("pwd", cwd="sub/directory"))
    assert said["stdout"] == b"/workspace/sub/directory\n"


def test_programs_of_every_kind(sandboxes: Any, live: Any) -> None:
    """With the interpreters and packages of runs, and a script without a first line that names its interpreter."""
    sandboxes.run(
        live,
        "import os, sysconfig; path = sysconfig.get_path('purelib'); os.makedirs(path, exist_ok=True)\n"
        "open(path + '/installed.py', 'w').write('word = 42'); open('script', 'w').write('echo script $1')\n"
        "os.chmod('script', 0o755)",
    )
    said, _ = sandboxes.do(live, steps.process, spec("python3", "-c", "import installed; print(installed.word)"))
    assert said == {"stdout": b"42\n"}
    said, _ = sandboxes.do(live, steps.process, spec("./script", "x"))
    assert said == {"stdout": b"script x\n"}
    said, _ = sandboxes.do(live, steps.process, spec("node", "-p", "6 * 7"))
    assert said == {"stdout": b"42\n"}


def test_input(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.process, spec("cat", stdin=True), b"abc")[0] == {"stdout": b"abc"}
    assert sandboxes.do(live, steps.process, spec("cat"))[0] == {}
    said, _ = sandboxes.do(live, steps.process, spec("wc", "-c", stdin=True), bytes(3_000_000))
    assert said["stdout"].strip() == b"3000000"
    content = bytes(range(256)) * 5000
    said, _ = sandboxes.do(live, steps.process, spec("sha256sum", stdin=True), content)
    assert said["stdout"].split()[0].decode() == hashlib.sha256(content).hexdigest()


def test_input_that_is_refused(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.refuses_input) == [
        "stdin of one without",
        "channel of one without",
        "stdin of one that has closed it",
        "stdin of one that has ended",
    ]


def test_a_channel(sandboxes: Any, live: Any) -> None:
    code = "import socket; s = socket.socket(fileno=3); s.sendall(s.recv(9).upper()); print('also')"
    assert sandboxes.do(live, steps.over_a_channel, spec("python3", "-c", code, channel=True), b"hello") == {
        "channel": b"HELLO",
        "stdout": b"also\n",
    }


def test_a_terminal(sandboxes: Any, live: Any) -> None:
    said = sandboxes.do(live, steps.terminal)
    assert set(said) == {"pty"}
    assert b"cannot set terminal process group" not in said["pty"]
    assert b"no job control" not in said["pty"]


@pytest.mark.parametrize(("group", "says"), [(True, {b"shell", b"child"}), (False, {b"shell"})])
def test_a_signal_for_a_group_or_one(sandboxes: Any, live: Any, group: bool, says: set[bytes]) -> None:
    said, ended = sandboxes.do(live, steps.signalled, signal.SIGUSR1, group)
    assert set(said["stdout"].split()) - {b"up"} == says
    assert (ended.exit_code, ended.cause) == (3, "exit")


def test_a_deadly_signal(sandboxes: Any, live: Any) -> None:
    said, ended = sandboxes.do(live, steps.process, shell("kill -SEGV $$"))
    assert (said, ended.exit_code, ended.signal, ended.cause) == ({}, 139, 11, "signal")


def test_what_descends_from_a_process_is_killed_with_it(sandboxes: Any, live: Any) -> None:
    ended, left = sandboxes.do(live, steps.left_of_a_tree)
    assert (ended.exit_code, ended.signal, ended.cause) == (137, 9, "signal")
    assert left == b"2", "there are more than the supervisor and who looks"


def test_what_is_left_in_the_background_goes_on(sandboxes: Any, live: Any) -> None:
    said, ended, state = sandboxes.do(live, steps.background)
    assert b"first\n" in said["stdout"]
    assert (ended.exit_code, state) == (0, b"lives")


def test_output_that_nobody_reads_stops_its_process_only(sandboxes: Any, live: Any) -> None:
    count, others, ended = sandboxes.do(live, steps.unread)
    assert count == 20_000_000 + len("end\n")
    assert others == b"".join(b"%d\n" % number for number in range(10))
    assert ended.exit_code == 0


def test_input_that_nobody_reads_holds_up_nobody_else(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.unread_input) == (True, b"well")


def test_many_processes(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.many, 30, 10) == (30, 20)


def test_runs_and_processes_don_t_see_each_other(sandboxes: Any, live: Any) -> None:
    """Neither processes, nor terminals, nor variables."""
    assert sandboxes.do(live, steps.look_at_each_other) == ("[]\n[]\n[]\n", "[]\n[]\n[]\n")


def test_variables_are_hidden_from_other_processes(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.variables_of_another) == b"[]"


def test_a_process_outlives_runs(sandboxes: Any, live: Any) -> None:
    codes, left, said = sandboxes.do(live, steps.outlives_runs)
    assert codes[0] == 0
    assert left == "2\n"
    assert said["stdout"] == b"still here"


def test_a_run_outlives_processes(sandboxes: Any, live: Any) -> None:
    said, ended, how = sandboxes.do(live, steps.a_run_outlives_processes)
    assert (said, ended.exit_code, ended.sandbox_alive) == ("", 0, True)
    assert (how.exit_code, how.signal, how.cause) == (137, 9, "signal")


def test_the_end_of_the_supervisor_is_that_of_all_processes(sandboxes: Any, live: Any) -> None:
    """A program can't bring it about; the kernel can. Runs don't notice, and there is another supervisor then."""
    causes, after = sandboxes.do(live, steps.without_a_supervisor)
    assert causes == ["sandbox_died"] * 3
    assert after == ("runs\n", {"stdout": b"well\n"})


def test_scratch_is_shared_and_not_cleaned_beside_processes(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.scratch) == ["joined of-a-process of-a-run", ""]


def test_system_v_objects_of_processes_stay_beside_runs(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.system_v_objects) == ["True", "False"]


def test_files_in_memory_are_bounded_beside_processes(sandboxes: Any, live: Any) -> None:
    cause, said, ended, after = sandboxes.do(live, steps.too_many_files_in_memory)
    assert cause == "exit", "files of processes count against a run"
    assert "holds more than 20000 files" in said
    assert (ended.signal, ended.cause) == (9, "signal")
    assert after == "well\n", "its files are held against others"


def test_a_fork_bomb_in_a_process(sandboxes: Any, live: Any) -> None:
    said, again = sandboxes.do(live, steps.fork_bomb)
    assert said in ("forks", "Resource temporarily unavailable")
    assert again == "well"


def test_a_process_that_takes_too_much_memory(sandboxes: Any) -> None:
    """As an ordinary user the largest process is killed, in gVisor all of them."""
    sandbox = sandboxes.make("python")
    ended, said = sandboxes.do(sandbox, steps.out_of_memory)
    assert (ended.exit_code, ended.signal, ended.cause) == (137, 9, "oom")
    assert said == "well"
    sandboxes.close(sandbox)


def test_the_host_can_connect_to_a_process(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.connected) == b"hello"


def test_everything_can_stand_still(sandboxes: Any, live: Any) -> None:
    assert sandboxes.do(live, steps.stands_still) == (True, True, True)


def test_no_snapshot_shows_counters_reversed(sandboxes: Any, live: Any) -> None:
    """What twenty processes write while it is taken is of one moment, unless it says that it isn't; and that shows
    where nothing stands still."""
    freezes = not sandboxes.name.endswith("as a user")
    sound, weak = sandboxes.do(live, moment_steps.counters, 4, 50 if freezes else 1)
    assert sound.reversed == 0
    assert not freezes or (sound.consistent == 4 and sound.moved)
    assert weak.reversed


def test_is_empty_once_descendants_have_ended(sandboxes: Any, live: Any) -> None:
    """Helpers of our own don't count."""
    assert sandboxes.do(live, moment_steps.emptied) == [True, False, True]


def test_closing_ends_all(sandboxes: Any) -> None:
    sandbox = sandboxes.make("python")
    assert sandboxes.do(sandbox, steps.closed_under_processes) == ["signal"] * 3

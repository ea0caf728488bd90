"""Python contexts, with the real interpreter and IPython: what cells answer, and that nothing they do breaks the
service's end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from era.core.live import context as module
from era.core.live.context import NotBegun
from era.guest import python_kernel
from era.languages import ipython
from tests.core.interpreters import Cells, Written, interpreter, python_command
from tests.soaking import soak_the_rest
from tests.unit.core import until

pytestmark = pytest.mark.usefixtures("staged_ipython")


# -- what cells answer ------------------------------------------------------------------------------------------------


async def test_variables_stay_and_the_last_expression_is_the_main_result(cells: Cells) -> None:
    first, _ = await cells.run("x = 20\nx + 1")
    assert first.results == [{"data": {"text/plain": "21"}, "metadata": {}, "main": True}]
    assert (first.exit_code, first.cause, first.execution_count) == (0, "exit", 1)
    assert await cells.value("x * 2 + _") == "61"
    second, _ = await cells.run("x;")
    assert (second.results, second.execution_count) == ([], 3)


async def test_output_is_told_from_results_and_streams_from_each_other(cells: Cells) -> None:
    outcome, written = await cells.run(
        "import subprocess, sys, os\n"
        "print('a', end=' '); print('b', file=sys.stderr); os.write(1, b'c ')\n"
        "_ = subprocess.run('echo d; echo e >&2', shell=True)\n"
        "display('f')"
    )
    assert written.stdout == "a c d\n"
    assert written.stderr == "b\ne\n"
    assert [(result["data"]["text/plain"], result["main"]) for result in outcome.results] == [("'f'", False)]


async def test_what_is_displayed_comes_in_order_with_all_its_types(cells: Cells) -> None:
    outcome, _ = await cells.run(
        "from IPython.display import HTML, Image, JSON, display\n"
        "display(HTML('<b>1</b>'), JSON({'a': [float('nan'), 1]}))\n"
        "class Own:\n"
        "    def _repr_html_(self): return '<i>own</i>'\n"
        "    def _repr_png_(self): return b'\\x89PNG'\n"
        "Own()"
    )
    first, second, third = outcome.results
    assert first["data"]["text/html"] == "<b>1</b>"
    assert second["data"]["application/json"] == {"a": [None, 1]}
    assert third["main"] is True
    assert third["data"]["text/html"] == "<i>own</i>"
    assert third["data"]["image/png"].strip() == "iVBORw=="


async def test_a_display_can_be_changed_and_cleared(cells: Cells) -> None:
    outcome, _ = await cells.run("handle = display('one', display_id=True)\ndisplay('two')\nhandle.update('changed')\n")
    assert [result["data"]["text/plain"] for result in outcome.results] == ["'changed'", "'two'"]
    outcome, _ = await cells.run(
        "from IPython.display import clear_output\ndisplay(1); clear_output(); display(2); clear_output(wait=True)\n"
        "display(3)"
    )
    assert [result["data"]["text/plain"] for result in outcome.results] == ["3"]


async def test_an_error_has_name_value_and_the_traceback_of_the_cell(cells: Cells) -> None:
    outcome, written = await cells.run("def f():\n    return 1 / 0\nprint('before')\nf()")
    assert outcome.error is not None
    assert (outcome.error["name"], outcome.error["value"]) == ("ZeroDivisionError", "division by zero")
    assert "Cell In[1], line 4" in outcome.error["traceback"]
    assert "\x1b" not in outcome.error["traceback"]
    assert "python_kernel" not in outcome.error["traceback"]
    assert outcome.error["traceback"] in written.stderr
    assert written.stdout == "before\n"
    assert (outcome.exit_code, outcome.cause, outcome.lost) == (1, "exit", None)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("def f(:", "SyntaxError"),
        ("raise ExceptionGroup('several', [ValueError(1)])", "ExceptionGroup"),
        ("%nosuchmagic", "UsageError"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "ValueError"),  # as IPython says
        ("def f(): f()\nf()", "RecursionError"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
async def test_every_kind_of_error_is_told(cells: Cells, code: str, name: str) -> None:
    outcome, _ = await cells.run(code)
    assert outcome.error is not None
    assert (outcome.error["name"], outcome.exit_code, outcome.cause) == (name, 1, "exit")
    assert await cells.value("1") == "1"


async def test_the_traceback_of_a_group_of_exceptions_names_them_all(cells: Cells) -> None:
    outcome, written = await cells.run(
        "def f():\n    raise ExceptionGroup('two', [ValueError('a'), KeyError('b')])\nf()"
    )
    assert outcome.error is not None
    assert outcome.error["name"] == "ExceptionGroup"
    assert all(
        part in outcome.error["traceback"] for part in ("in f\n", "two (2 sub-", "ValueError: a", "KeyError: 'b'")
    )
    assert outcome.error["traceback"] in written.stderr
    outcome, _ = await cells.run("%nothing")
    assert outcome.error is not None
    assert outcome.error["traceback"] == "UsageError: Line magic function `%nothing` not found."


async def test_await_magics_and_shell_lines(cells: Cells) -> None:
    assert await cells.value("import asyncio\nawait asyncio.sleep(0, 'awaited')") == "'awaited'"
    assert await cells.value("asyncio.run(asyncio.sleep(0, 7))") == "7"
    _, written = await cells.run("!echo from a shell; echo wrong >&2")
    assert (written.stdout, written.stderr) == ("from a shell\n", "wrong\n")
    _, written = await cells.run("%%bash\nfor i in 1 2; do echo $i; done")
    assert written.stdout == "1\n2\n"
    _, written = await cells.run("%time sum(range(10))")
    assert "Wall time" in written.stdout
    assert await cells.value("files = !printf 'a\\nb'\nfiles") == "['a', 'b']"


async def test_input_reads_the_run_s_stdin_and_ends_with_it(cells: Cells) -> None:
    outcome, written = await cells.run("name = input('Who? ')\nprint('Hello', name)", stdin="Ada\n")
    assert outcome.error is None
    assert written.stdout == "Who? Hello Ada\n"
    assert await cells.value("import sys\nsys.stdin.read()", stdin="alles: ä") == "'alles: ä'"
    _, written = await cells.run("!cat", stdin="for a child")
    assert written.stdout == "for a child"
    outcome, _ = await cells.run("input()")
    assert outcome.error is not None
    assert outcome.error["name"] == "EOFError"


async def test_env_is_there_for_the_cell_only(cells: Cells) -> None:
    code = "import os, subprocess\n(os.environ.get('TOKEN'), subprocess.getoutput('echo $TOKEN'))"
    outcome, _ = await cells.run(code, env={"TOKEN": "s3cret", "HOME": "/elsewhere"})
    assert outcome.results[0]["data"]["text/plain"] == "('s3cret', 's3cret')"
    assert await cells.value(code) == "(None, '')"
    assert await cells.value("os.environ['HOME'] != '/elsewhere'") == "True"
    assert await cells.value("b's3cret' in open('/proc/self/environ', 'rb').read()") == "False"
    outcome, _ = await cells.run("os.environ['TOKEN'] = 'mine'; 1 / 0", env={"TOKEN": "a"})
    assert await cells.value("str(os.environ.get('TOKEN'))") == "'None'"


async def test_a_directory_is_for_the_cell_and_cd_stays(cells: Cells, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text("where = 'sub'")
    outcome, _ = await cells.run("import os, mine\n(os.path.basename(os.getcwd()), mine.where)", cwd="sub")
    assert outcome.results[0]["data"]["text/plain"] == "('sub', 'sub')"
    assert await cells.value("os.getcwd()") == repr(str(tmp_path))
    await cells.run("%cd -q sub")
    assert await cells.value("os.path.basename(os.getcwd())") == "'sub'"
    outcome, _ = await cells.run("os.path.basename(os.getcwd())", cwd="sub")
    assert outcome.results[0]["data"]["text/plain"] == "'sub'", "it is below the session's directory, not the context's"
    outcome, _ = await cells.run("1", cwd="nowhere")
    assert outcome.error is not None
    assert outcome.error["name"] == "FileNotFoundError"


async def test_a_cell_of_ipython_s_documentation_answers_as_ipython_does(cells: Cells, tmp_path: Path) -> None:
    """The results of the same cells, as a real `ipython` prints them."""
    documented = [
        "a = 10",
        "a",
        "print('hello')",
        "_ + 1",
        "b = range(3); list(b)",
        "{'a': 1, 'b': [1, 2]}",
        "'text\\nwith a line'",
        "import math; math.pi",
        "%precision 3",
        "math.pi",
        "%alias_magic t timeit",
        "x = 5;",
        "x;",
        "Out[2]",
        "In[1]",
        "_i2",
        "%pwd",
        "!echo $a",
        "files = !echo one two\nfiles.n",
        "%who_ls int",
        "%%writefile made.txt\ncontent",
        "%cat made.txt",
        "%%capture captured\nprint('quiet')",
        "captured.stdout",
        "%env NOSUCH=1",
        "%run -n -i made.py",
        "ran",
        "async def coroutine():\n    return 42",
        "await coroutine()",
        "%pprint",
        "list(range(5))",
        "%reset -f out",
        "%macro again 5",
        "%xmode Plain",
        "1 if a else 2",
        "sorted({'q', 'p'})",
        "for i in range(2):\n    i",
        "if True:\n    'not shown'",
    ]
    (tmp_path / "made.py").write_text("ran = a + 1\n")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "made.py").write_text("ran = a + 1\n")
    program = (
        "import json, sys\n"
        "from IPython.terminal.interactiveshell import TerminalInteractiveShell\n"
        "from traitlets.config import Config\n"
        "c = Config(); c.HistoryManager.enabled = False; c.TerminalInteractiveShell.colors = 'nocolor'\n"
        "c.TerminalInteractiveShell.simple_prompt = True\n"
        "shell = TerminalInteractiveShell.instance(config=c)\n"
        "class Hook(type(shell.displayhook)):\n"
        "    def write_output_prompt(self): pass\n"
        "    def write_format_data(self, data, metadata=None): told.append(data['text/plain'])\n"
        "    def finish_displayhook(self): pass\n"
        "shell.displayhook.__class__ = Hook\n"
        "for cell in json.load(sys.stdin):\n"
        "    told = []\n"
        "    print('\\0', flush=True)\n"
        "    shell.run_cell(cell, store_history=True)\n"
        "    sys.stdout.flush()\n"
        "    print('\\1' + json.dumps(told), flush=True)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(documented),
        capture_output=True,
        text=True,
        cwd=theirs,
        env={"PATH": os.environ["PATH"], "HOME": str(theirs), "IPYTHONDIR": str(theirs / ".ipython")},
        check=True,
    )
    expected = []
    for answer in ran.stdout.split("\0\n")[1:]:
        printed, _, shown = answer.partition("\1")
        expected.append(
            (printed.replace(str(theirs), "HERE"), [one.replace(str(theirs), "HERE") for one in json.loads(shown)])
        )
    for cell, (said, results) in zip(documented, expected, strict=True):
        outcome, written = await cells.run(cell)
        got = [result["data"]["text/plain"].replace(str(tmp_path), "HERE") for result in outcome.results]
        assert (cell, got) == (cell, results)
        assert (cell, written.stdout.replace(str(tmp_path), "HERE")) == (cell, said)


# -- the packages -----------------------------------------------------------------------------------------------------


async def test_a_session_s_own_version_of_what_contexts_need_wins(tmp_path: Path) -> None:
    """A package that is older, but does: the session's is imported, by the shell as well."""
    own = tmp_path / "packages"
    shutil.copytree(
        Path(python_command()[-1]) / "wcwidth", own / "wcwidth", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (own / "wcwidth" / "__init__.py").open("a") as file:
        file.write("\n__version__ = 'the session own'\n")
    async with interpreter(python_command(), tmp_path, {"PYTHONPATH": str(own)}) as cells:
        assert await cells.value("import wcwidth\nwcwidth.__version__") == "'the session own'"


async def test_a_session_s_own_version_that_the_shell_can_t_use_is_still_the_program_s(tmp_path: Path) -> None:
    own = tmp_path / "packages"
    (own / "traitlets").mkdir(parents=True)
    (own / "traitlets" / "__init__.py").write_text("version = 'ancient'\n")
    async with interpreter(python_command(), tmp_path, {"PYTHONPATH": str(own)}) as cells:
        assert await cells.value("import traitlets\ntraitlets.version") == "'ancient'"
        assert await cells.value("%pwd") == repr(str(tmp_path))
        outcome, _ = await cells.run("from IPython.display import HTML\nHTML('x')")
        assert outcome.results[0]["data"]["text/html"] == "x"


async def test_a_file_of_the_session_s_hides_a_package_of_contexts(tmp_path: Path) -> None:
    (tmp_path / "pygments.py").write_text("mine = 1\n")
    (tmp_path / "ipython_shell.py").write_text("mine = 2\n")
    async with interpreter(python_command(), tmp_path) as cells:
        assert await cells.value("import pygments, ipython_shell\n(pygments.mine, ipython_shell.mine)") == "(1, 2)"


def test_exactly_what_ipython_needs_is_staged() -> None:
    names = {path.name for path in Path(python_command()[-1]).iterdir()}
    assert {"IPython", "traitlets", "matplotlib_inline", "prompt_toolkit"} <= names
    assert not names & {"jedi", "parso", "era", "fastapi", "pydantic", "httpx"}


def test_staging_is_named_after_what_is_staged() -> None:
    assert ipython.packages().name == ipython.packages().name
    assert ipython.packages().mount == "/opt/ipython"


# -- ends -------------------------------------------------------------------------------------------------------------


async def test_a_timeout_interrupts_and_keeps_the_variables(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 60.0)
    await cells.run("x = 1")
    outcome, written = await cells.run(
        "import time\nprint('begun')\ntry:\n    time.sleep(60)\nfinally:\n    x = 'tidied up'", timeout=5
    )
    assert (outcome.cause, outcome.exit_code, outcome.lost) == ("timeout", 124, None)
    assert outcome.error is not None
    assert outcome.error["name"] == "KeyboardInterrupt"
    assert written.stdout == "begun\n"
    assert await cells.value("x") == "'tidied up'"


@pytest.mark.parametrize(
    "code",
    soak_the_rest(
        [
            "while True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass",
            "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)",
            "import ctypes\nctypes.CDLL(None).signal(2, 1)\nctypes.CDLL(None).sleep(60)",
        ],
        1,
    ),
)
async def test_a_cell_that_goes_on_after_its_timeout_loses_the_variables(
    cells: Cells, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 0.3)
    outcome, _ = await cells.run(f"import time\n{code}", timeout=5)
    assert (outcome.cause, outcome.exit_code) == ("timeout", 124)
    assert outcome.lost == "It was killed, since a cell went on after its timeout."
    assert not cells.context.alive
    with pytest.raises(NotBegun):
        await cells.run("1")


async def test_an_interrupt_waits_for_what_is_being_shown(cells: Cells) -> None:
    code = "x = 5\nfrom IPython.display import HTML\nwhile True: display(HTML('x' * 1_000_000))"
    for _ in range(3):
        outcome, _ = await cells.run(code, timeout=0.5, output_bytes=1 << 30)
        assert (outcome.cause, outcome.lost) == ("timeout", None)
    assert await cells.value("x") == "5"


async def test_what_threads_show_at_once_is_not_mixed_up(cells: Cells) -> None:
    outcome, _ = await cells.run(
        "import threading\n"
        "def show(letter):\n    for _ in range(3): display({'text/plain': letter * 500_000}, raw=True)\n"
        "threads = [threading.Thread(target=show, args=(letter,)) for letter in 'ab']\n"
        "for one in threads: one.start()\n"
        "for one in threads: one.join()",
        output_bytes=1 << 22,
    )
    assert outcome.lost is None
    assert sorted(one["data"]["text/plain"] for one in outcome.results) == ["a" * 500_000] * 3 + ["b" * 500_000] * 3


@pytest.mark.parametrize("shows", ["display(1)", "clear_output()"])
async def test_what_is_shown_between_cells_is_dropped(cells: Cells, tmp_path: Path, shows: str) -> None:
    ended, shown = tmp_path / "ended", tmp_path / "shown"
    await cells.run(
        "import os, threading, time\nfrom IPython.display import clear_output, display\nx = 5\n"
        f"def later():\n    while not os.path.exists({str(ended)!r}): time.sleep(0.02)\n"
        f"    {shows}; open({str(shown)!r}, 'w')\n"
        "threading.Thread(target=later).start()"
    )
    ended.touch()
    await until(shown.exists)
    assert await cells.value("x") == "5"


async def test_ignoring_interrupts_is_for_one_cell(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 60.0)
    await cells.run("import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN);")
    outcome, _ = await cells.run("time.sleep(60)", timeout=0.3)
    assert (outcome.cause, outcome.lost) == ("timeout", None)


async def test_an_interrupt_ends_the_cell_and_nothing_else(cells: Cells) -> None:
    assert await cells.context.interrupt() is False
    written = Written()
    running = asyncio.create_task(cells.run("import time\nx = 5\nprint('begun')\ntime.sleep(60)", written=written))
    await until(lambda: "begun" in written.stdout)
    assert await cells.context.interrupt() is True
    outcome, _ = await running
    assert (outcome.cause, outcome.exit_code, outcome.lost) == ("killed", 130, None)
    assert await cells.value("x") == "5"


@pytest.mark.parametrize(
    ("code", "cause", "exit_code", "lost"),
    [
        ("import os\nos._exit(7)", "exit", 7, "The program ended the interpreter with exit code 7."),
        ("import os\nos.kill(os.getpid(), 9)", "signal", 137, "Its interpreter was killed by signal 9."),
        ("import ctypes\nctypes.string_at(0)", "signal", 139, "Its interpreter was killed by signal 11."),
        ("exit()", "exit", 0, "The program ended the interpreter."),
    ],
)
async def test_the_end_of_the_interpreter_is_the_end_of_the_cell(
    cells: Cells, code: str, cause: str, exit_code: int, lost: str
) -> None:
    outcome, written = await cells.run(f"print('before')\n{code}")
    assert (outcome.cause, outcome.exit_code, outcome.lost) == (cause, exit_code, lost)
    assert written.stdout == "before\n"


async def test_sys_exit_ends_the_cell_only(cells: Cells) -> None:
    outcome, _ = await cells.run("import sys\nx = 1\nsys.exit(3)")
    assert (outcome.exit_code, outcome.cause, outcome.lost) == (3, "exit", None)
    outcome, _ = await cells.run("sys.exit()")
    assert (outcome.exit_code, outcome.error) == (0, None)
    assert await cells.value("x") == "1"


FORK = """
import os, socket, sys, threading
sys.path.insert(0, sys.argv[1])
from python_kernel import Channel
ours, theirs = socket.socketpair()
channel, has_turn = Channel(theirs.detach()), threading.Event()
def keep_turn():
    with channel._turn:
        has_turn.set()
        threading.Event().wait()
threading.Thread(target=keep_turn, daemon=True).start()
has_turn.wait()
if os.fork() == 0:
    channel.send(b"P", b"")
    os._exit(0)
print(ours.recv(5)[:1].decode(), flush=True)
os._exit(0)
"""


def test_a_process_forked_while_another_thread_shows_something_can_show_something_too() -> None:
    command = [sys.executable, "-c", FORK, str(Path(python_kernel.__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.communicate(timeout=30)[0] == "P\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_a_mark_waits_for_room_in_a_pipe_that_doesn_t_block() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write, b"x" * 4096)
        reading = threading.Timer(0.3, os.read, (read, 1 << 20))
        reading.start()
        python_kernel.write_mark(write, b"mark")
        reading.join()
        assert os.read(read, 1 << 20).endswith(b"mark")
    finally:
        os.close(read)
        os.close(write)


# -- attacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        "s.sendall(b'garbage garbage garbage')",
        "s.sendall(b'P' + (1 << 31).to_bytes(4, 'big'))",
        "s.sendall(b'P' + (5).to_bytes(4, 'big') + b'[1,2]')",
        "s.sendall(b'D' + (2).to_bytes(4, 'big') + b'{}')",
        "s.sendall(b'P' + (2).to_bytes(4, 'big') + b'\\xff\\xff')",
        "s.sendall(b'B' + bytes(4))",  # it has begun: each would have a signal of its own
    ],
)
async def test_what_is_no_message_ends_the_interpreter_and_says_so(cells: Cells, write: str) -> None:
    outcome, _ = await cells.run(
        "import gc, socket, time\n"
        f"s = next(o for o in gc.get_objects() if isinstance(o, socket.socket))\n{write}\ntime.sleep(60)"
    )
    assert outcome.cause == "killed"
    assert outcome.lost is not None
    assert outcome.lost.startswith("It was killed, since its interpreter wrote")


async def test_a_forged_end_ends_the_cell_at_most(cells: Cells) -> None:
    outcome, _ = await cells.run(
        "import gc, json, socket, time\n"
        "s = next(o for o in gc.get_objects() if isinstance(o, socket.socket))\n"
        "d = json.dumps({'exit_code': 0, 'execution_count': 10 ** 30, 'error': None, 'marked': [1, 7]}).encode()\n"
        "s.sendall(b'D' + len(d).to_bytes(4, 'big') + d)\ntime.sleep(0.2)"
    )
    assert outcome.exit_code == 0
    await until(lambda: cells.context.lost is not None)
    assert cells.context.lost == "It was killed, since its interpreter wrote about a cell while there was none."


async def test_closed_and_changed_descriptors_do_no_harm(cells: Cells) -> None:
    outcome, _ = await cells.run(
        "import os\nos.close(3) if os.path.exists('/proc/self/fd/3') else None\nos.closerange(3, 256)\n5"
    )
    assert outcome.results[0]["data"]["text/plain"] == "5"
    outcome, _ = await cells.run("null = os.open('/dev/null', os.O_WRONLY)\nos.dup2(null, 1)\nprint('gone')\n6")
    assert outcome.results[0]["data"]["text/plain"] == "6"
    outcome, _ = await cells.run("os.closerange(3, 1024)", timeout=5)
    assert outcome.lost is not None


async def test_a_fork_of_a_cell_is_no_second_interpreter(cells: Cells) -> None:
    outcome, written = await cells.run(
        "import os, sys\npid = os.fork()\nif pid:\n    os.waitpid(pid, 0)\nprint('here', pid == 0, flush=True)"
    )
    assert outcome.error is None
    assert sorted(written.stdout.splitlines()) == ["here False", "here True"]
    assert (
        await cells.value(
            "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: r = p.map(abs, [-1, 2])\nr"
        )
        == "[1, 2]"
    )


async def test_a_child_left_behind_doesn_t_hold_the_cell(cells: Cells) -> None:
    outcome, written = await cells.run("import subprocess\np = subprocess.Popen(['sleep', '30'])\nprint('on')")
    assert written.stdout == "on\n"
    assert outcome.error is None
    assert await cells.value("p.kill(); p.wait()") == "-9"


async def test_endless_output_is_cut_and_said_to_be(cells: Cells) -> None:
    outcome, written = await cells.run("for _ in range(20000): print('x' * 100)", output_bytes=10_000)
    assert len(written.stdout) == 10_000
    assert (outcome.stdout_truncated, outcome.stderr_truncated) == (True, False)


async def test_results_are_bounded_and_said_to_be(cells: Cells) -> None:
    outcome, _ = await cells.run("'x' * 100_000\ndisplay('y' * 5000)\n'z' * 100_000", output_bytes=20_000)
    assert outcome.results_truncated is True
    assert sum(len(str(result)) for result in outcome.results) < 20_000
    outcome, _ = await cells.run("for i in range(20000): display(i)", output_bytes=1 << 22, timeout=600)
    assert (len(outcome.results), outcome.results_truncated) == (10_000, True)


async def test_what_threads_print_between_cells_comes_with_the_next(cells: Cells, tmp_path: Path) -> None:
    ended, printed = tmp_path / "ended", tmp_path / "printed"
    await cells.run(
        "import os, threading, time\n"
        f"def later():\n    while not os.path.exists({str(ended)!r}): time.sleep(0.02)\n"
        f"    print('between'); open({str(printed)!r}, 'w'); done.set()\n"
        "done = threading.Event(); threading.Thread(target=later).start()"
    )
    ended.touch()
    await until(printed.exists)
    outcome, written = await cells.run("done.wait(); print('now')")
    assert outcome.error is None
    assert written.stdout == "between\nnow\n"


async def test_output_that_looks_like_the_mark_is_output(cells: Cells) -> None:
    _, written = await cells.run("import os\nos.write(1, b'\\0era:' * 3); os.write(1, b'\\0era'); print('\\0', end='')")
    assert written.stdout == "\0era:" * 3 + "\0era" + "\0"


async def test_a_monkeypatched_ipython_is_the_cell_s_own_affair(cells: Cells) -> None:
    await cells.run(
        "ip = get_ipython()\n"
        "ip.run_cell = lambda *a, **k: (_ for _ in ()).throw(RuntimeError('mine'))\n"
        "import json; json.dumps = json.loads = None"
    )
    outcome, _ = await cells.run("1", timeout=5)
    assert outcome.error == {"name": "RuntimeError", "value": "mine", "traceback": "RuntimeError: mine"}
    assert (outcome.exit_code, outcome.lost) == (1, None)


async def test_text_that_can_t_be_encoded_is_cleaned(cells: Cells) -> None:
    outcome, _ = await cells.run("display({'text/plain': '\\ud800'}, raw=True)\nraise ValueError('\\udc00')")
    assert outcome.results[0]["data"]["text/plain"] == "?"
    assert outcome.error is not None
    assert outcome.error["value"] == "?"

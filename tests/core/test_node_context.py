"""Node and TypeScript contexts, with the real Node."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from era.core.live import context as module
from tests.core.interpreters import Cells, Written, interpreter, node_command
from tests.unit.core import until


@pytest.fixture
async def cells(tmp_path: Path) -> AsyncIterator[Cells]:
    async with interpreter(node_command(), tmp_path) as made:
        yield made


@pytest.fixture
async def typescript(tmp_path: Path) -> AsyncIterator[Cells]:
    async with interpreter(node_command("typescript"), tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("1 + 1", "2"),
        ("let x = 3; x * 2", "6"),
        ("{a: 1}", "{ a: 1 }"),
        ("[1, 'a', new Map([[1, 2]])]", "[ 1, 'a', Map(1) { 1 => 2 } ]"),
        ("await new Promise((resolve) => setTimeout(() => resolve(7), 10))", "7"),
        ("const a = await Promise.resolve(4); a + 1", "5"),
        ("function f() { return 5 }\nf()", "5"),
        ("class A {}; new A()", "A {}"),
        ("require('node:path').basename('/a/b')", "'b'"),
        ("import path, { basename as base } from 'node:path'\npath.sep + base('/a/b')", "'/b'"),
        ("import * as all from 'node:os'; typeof all.cpus", "'function'"),
        ("import 'node:fs'\n'imported'", "'imported'"),
        (
            "import { // from 'it'\n  basename, /* , */ sep as line,\n} from 'node:path'\nbasename('/a/b') + line",
            "'b/'",
        ),
        ("import/**/{basename}from'node:path';basename('/a/b')", "'b'"),
        ("import größe, { 'basename' as μ } from 'node:path'; [größe.sep, μ('/a/b')]", "[ '/', 'b' ]"),
        ("import from from 'node:path'; from.sep", "'/'"),
        ("import path, * as all from 'node:path'; path === all.default", "true"),
        ("import './own.json' with { type: 'json' }\n'imported'", "'imported'"),
        ("const importé = 1; importé", "1"),
        ("`import x from 'y'`", "\"import x from 'y'\""),
        ("// import x from 'y'\n/import b from 'c'/.source", "\"import b from 'c'\""),
        ("(await import('node:path')).sep", "'/'"),
        ("typeof process.stdin.on", "'function'"),
    ],
)
async def test_a_cell_answers_as_the_repl_does(cells: Cells, code: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("{}")
    assert await cells.value(code) == text


async def test_what_looks_like_the_beginning_of_an_import_takes_no_time(cells: Cells) -> None:
    for rest in (" " * 200_000, "/* " * 100_000, "{ a, /**/ " * 30_000, "a\nimport " * 30_000):
        outcome, _ = await cells.run(f"import {rest}", timeout=60)
        assert outcome.error is not None
        assert outcome.error["name"] == "SyntaxError"


async def test_variables_stay(cells: Cells) -> None:
    await cells.run("const one = 1; let two = 2; var three = 3; function four() { return 4 }; class Five {}")
    assert await cells.value("one + two + three + four() + new Five().constructor.name.length") == "14"
    assert await cells.value("_ + 1") == "15"
    await cells.run("const { promises: fs } = await import('node:fs')")
    assert await cells.value("typeof fs.readFile") == "'function'"


async def test_what_a_cell_declares_under_the_name_of_a_global_is_its_own_affair(cells: Cells) -> None:
    await cells.run("const { URL } = require('url')")
    assert await cells.value("import { basename } from 'node:path'; basename(URL.name)") == "'URL'"
    await cells.run("const { Buffer } = require('buffer'), process = require('process'), crypto = require('crypto')")
    assert await cells.value("typeof require('./era_storage.js').KVStorage + typeof Buffer") == "'functionfunction'"


async def names_of_globals(cells: Cells) -> tuple[set[str], set[str]]:
    """The names of Node's own globals, but for `require`, and of the language's."""
    names = await cells.value(
        "const language = new Set(require('vm').runInNewContext('Object.getOwnPropertyNames(globalThis)'));"
        "[false, true].map((is) => Object.getOwnPropertyNames(globalThis).filter((name) => "
        "language.has(name) === is && Object.getOwnPropertyDescriptor(globalThis, name).configurable && "
        "/^[a-zA-Z]+$/.test(name) && name !== 'require').join()).join(';')"
    )
    nodes, languages = (set(part.split(",")) for part in names.strip("'").split(";"))
    return nodes, languages


@pytest.mark.parametrize("language", ["node", "typescript"])
async def test_globals_that_a_cell_declared_and_never_set_leave_contexts_whole(tmp_path: Path, language: str) -> None:
    """No code can read such a name any more."""
    (tmp_path / "own.mjs").write_text("export const own = 'own'")
    async with interpreter(node_command(language), tmp_path) as cells:
        names, _ = await names_of_globals(cells)
        assert {"Buffer", "URL", "process"} <= names
        await cells.run(f"null.x; let {', '.join(names)}")
        outcome, _ = await cells.run("Buffer")
        assert outcome.error is not None
        assert outcome.error["value"] == "Buffer is not defined"
        outcome, _ = await cells.run("import { own } from './own.mjs'; own", env={"A": "1"}, stdin="in", cwd=".")
        assert (outcome.error, outcome.results[0]["data"]) == (None, {"text/plain": "'own'"})
        assert await cells.value("const six = await (async () => 6)(); six") == "6"
        outcome, _ = await cells.run("await new Promise(() => {})", timeout=0.5)
        assert (outcome.cause, outcome.lost) == ("timeout", None)


async def test_a_context_without_the_language_s_own_globals_still_ends_its_cells(cells: Cells) -> None:
    """Node's own `await` and `import` need some of them."""
    _, names = await names_of_globals(cells)
    assert {"JSON", "Object", "Promise", "globalThis"} <= names
    await cells.run(f"null.x; let {', '.join(names)}")
    assert await cells.value("({ a: 1 })") == "{ a: 1 }"
    outcome, _ = await cells.run("throw 1", env={"A": "1"}, stdin="in", cwd=".")
    assert outcome.error == {"name": "number", "value": "1", "traceback": "1"}
    outcome, _ = await cells.run("while (true) {}", timeout=0.5)
    assert (outcome.cause, outcome.lost) == ("timeout", None)


async def test_the_session_s_own_modules_and_packages(cells: Cells, tmp_path: Path) -> None:
    (tmp_path / "own.js").write_text("exports.value = 'own'")
    (tmp_path / "own.mjs").write_text("export const value = 'module'; export default 1")
    package = tmp_path / "node_modules" / "pkg"
    package.mkdir(parents=True)
    (package / "index.js").write_text("module.exports = 'package'")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.js").write_text("module.exports = 'deep'")
    assert await cells.value("require('./own').value + require('pkg')") == "'ownpackage'"
    assert await cells.value("import d, { value } from './own.mjs'; import p from 'pkg'; [d, value, p]") == (
        "[ 1, 'module', 'package' ]"
    )
    outcome, _ = await cells.run("require('./deep')", cwd="sub")
    assert outcome.results[0]["data"]["text/plain"] == "'deep'"
    assert await cells.value("process.cwd()") == repr(str(tmp_path))


async def test_the_client_of_the_storage_is_there(cells: Cells) -> None:
    assert await cells.value("typeof require('./era_storage.js').KVStorage") == "'function'"
    assert await cells.value("import { KVStorage } from './era_storage.js'; typeof KVStorage") == "'function'"


async def test_output_and_errors(cells: Cells) -> None:
    outcome, written = await cells.run("console.log('out'); console.error('err'); process.stdout.write('raw')")
    assert (written.stdout, written.stderr) == ("out\nraw", "err\n")
    outcome, written = await cells.run("function f() { throw new TypeError('no') }\nf()")
    assert outcome.error is not None
    assert (outcome.error["name"], outcome.error["value"], outcome.exit_code) == ("TypeError", "no", 1)
    assert outcome.error["traceback"].startswith("TypeError: no\n    at f (cell-2:1:22)\n    at cell-2:2:1")
    assert "node_kernel" not in outcome.error["traceback"]
    assert written.stderr.startswith("Uncaught TypeError: no")


@pytest.mark.parametrize(
    ("code", "name"),
    [("(", "SyntaxError"), ("null.x", "TypeError"), ("await Promise.reject(new RangeError('r'))", "RangeError")],
)
async def test_every_kind_of_error_is_told(cells: Cells, code: str, name: str) -> None:
    outcome, _ = await cells.run(code)
    assert outcome.error is not None
    assert (outcome.error["name"], outcome.exit_code) == (name, 1)
    assert await cells.value("1") == "1"


async def test_values_can_show_themselves(cells: Cells) -> None:
    outcome, _ = await cells.run(
        "class Own { [Symbol.for('Jupyter.display')]() { return { 'text/html': '<b>' } } }\n"
        "display(new Own()); display(5); new Own()"
    )
    assert [(next(iter(result["data"].items())), result["main"]) for result in outcome.results] == [
        (("text/html", "<b>"), False),
        (("text/plain", "5"), False),
        (("text/html", "<b>"), True),
    ]


@pytest.mark.parametrize(
    "bundle", ["['text/html']", "Promise.resolve({ 'text/html': '<b>' })", "new Date()", "new String('x')", "null"]
)
async def test_what_shows_itself_as_no_bundle_is_shown_as_the_repl_would(cells: Cells, bundle: str) -> None:
    outcome, _ = await cells.run(f"({{ a: 1, [Symbol.for('Jupyter.display')]() {{ return {bundle} }} }})")
    assert (outcome.error, outcome.lost) == (None, None)
    assert outcome.results[0]["data"]["text/plain"].startswith("{")


async def test_a_bundle_that_is_nested_too_deeply_is_left_out(cells: Cells) -> None:
    outcome, _ = await cells.run(
        "let deep = []; for (let depth = 0; depth < 100; depth += 1) deep = [deep];"
        "({ [Symbol.for('Jupyter.display')]: () => ({ 'application/json': deep }) })"
    )
    assert (outcome.results, outcome.results_truncated, outcome.lost) == ([], True, None)


async def test_results_are_bounded_in_bytes_and_said_to_be(cells: Cells) -> None:
    outcome, _ = await cells.run(
        "const text = 'ä'.repeat(2.7e6); ({ [Symbol.for('Jupyter.display')]: () => ({ 'text/plain': text }) })",
        output_bytes=4 << 20,
    )
    assert (outcome.cause, outcome.results_truncated, outcome.lost) == ("exit", True, None)
    assert outcome.results[0]["data"] == {"text/plain": "ä" * (64 << 10)}
    outcome, _ = await cells.run("throw Object.assign(new Error('long'), { name: 'n'.repeat(5.5e6) })")
    assert outcome.error is not None
    assert (len(outcome.error["name"]), outcome.lost) == (64 << 10, None)


async def test_env_and_stdin_are_for_the_cell_only(cells: Cells) -> None:
    outcome, _ = await cells.run("process.env.TOKEN", env={"TOKEN": "s3cret"})
    assert outcome.results[0]["data"]["text/plain"] == "'s3cret'"
    outcome, _ = await cells.run("process.env.TOKEN")
    assert outcome.results == []
    code = (
        "const lines = []; for await (const line of require('readline').createInterface({ input: process.stdin })) "
        "lines.push(line); lines"
    )
    outcome, _ = await cells.run(code, stdin="one\ntwo")
    assert outcome.results[0]["data"]["text/plain"] == "[ 'one', 'two' ]"


@pytest.mark.parametrize(
    "code",
    [
        "fs.readFileSync(0, 'utf8')",
        "fs.readFileSync('/dev/stdin', 'utf8')",
        "fs.readFileSync(process.stdin.fd, 'utf8')",
        "child.execFileSync('cat', { stdio: [0, 'pipe', 2] }).toString()",
        "child.execFileSync('cat', { stdio: ['inherit', 'pipe', 2] }).toString()",
        "var text = ''; for await (const part of fs.createReadStream('', { fd: 0 })) text += part; text",
    ],
)
async def test_stdin_is_descriptor_0_of_the_cell_and_of_its_processes(cells: Cells, code: str) -> None:
    await cells.run("const fs = require('fs'), child = require('child_process')")
    for text in ("one grün", "two" * 3000, "", "four"):
        assert await cells.value(code, stdin=text) == f"'{text}'"


async def test_a_cell_s_own_descriptor_0_stays_its_own(cells: Cells, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("own")
    await cells.run("const fs = require('fs'); fs.closeSync(0); const fd = fs.openSync('own')", stdin="in")
    assert await cells.value("[fd, fs.readFileSync(0, 'utf8')]", stdin="in") == "[ 0, 'own' ]"
    await cells.run("fs.closeSync(0)", stdin="in")
    assert await cells.value("fs.readFileSync(0, 'utf8')", stdin="in") == "'in'"
    assert (
        await cells.value("[fs.readFileSync(0, 'utf8'), fs.readlinkSync('/proc/self/fd/0')]") == "[ '', '/dev/null' ]"
    )


@pytest.mark.parametrize("code", ["while (true) {}", "await new Promise(() => {})"])
async def test_a_timeout_interrupts_and_keeps_the_variables(
    cells: Cells, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 60.0)
    await cells.run("var x = 5")
    outcome, _ = await cells.run(code, timeout=0.5)
    assert (outcome.cause, outcome.exit_code, outcome.lost) == ("timeout", 124, None)
    assert await cells.value("x") == "5"


async def test_an_interrupt_ends_the_cell(cells: Cells) -> None:
    written = Written()
    running = asyncio.create_task(cells.run("console.log('begun'); await new Promise(() => {})", written=written))
    await until(lambda: "begun" in written.stdout)
    assert await cells.context.interrupt() is True
    outcome, _ = await running
    assert (outcome.cause, outcome.exit_code, outcome.lost) == ("killed", 130, None)


async def test_no_interrupt_is_lost_while_the_synchronous_part_ends(cells: Cells) -> None:
    """Node loses signals of that moment, or dies of them. Each round hits another part of it."""
    for number in range(60):
        written = Written()
        code = "console.log('begun'); await new Promise(() => {})"
        running = asyncio.create_task(cells.run(code, written=written, timeout=60))
        while not (written.stdout or running.done()):  # noqa: ASYNC110  anything slower would miss the moment
            await asyncio.sleep(0)
        await asyncio.sleep(number * 25e-6)
        assert await cells.context.interrupt() is True
        outcome, _ = await running
        assert (outcome.cause, outcome.exit_code, outcome.lost) == ("killed", 130, None), number


@pytest.mark.parametrize(
    ("most", "wanting_most", "wants", "patient"),
    [(60.0, 60.0, False, True), (0.05, 60.0, False, False), (0.05, 60.0, True, True), (0.05, 0.05, True, False)],
)
async def test_a_kernel_that_gets_no_processor_is_sent_no_signal(
    cells: Cells, monkeypatch: pytest.MonkeyPatch, most: float, wanting_most: float, wants: bool, patient: bool
) -> None:
    """It would die of one that comes between the end of the synchronous part and what follows."""
    monkeypatch.setattr(module, "_HEAR_MOST", most)
    monkeypatch.setattr(module, "_HEAR_WANTING_MOST", wanting_most)
    monkeypatch.setattr(cells.context, "_wants_processor", lambda: wants)  # a stopped process doesn't
    sent: list[int] = []

    async def send(number: int) -> None:
        sent.append(number)

    process = cells.context._process
    monkeypatch.setattr(process, "signal", send)
    written = Written()
    running = asyncio.create_task(
        cells.run("console.log('begun'); await new Promise(() => {})", written=written, timeout=600)
    )
    await until(lambda: "begun" in written.stdout)
    os.kill(process.pid, signal.SIGSTOP)
    interrupting = asyncio.create_task(cells.context.interrupt())
    await asyncio.sleep(0.5)
    os.kill(process.pid, signal.SIGCONT)
    assert await interrupting is True
    outcome, _ = await running
    assert (outcome.cause, outcome.lost) == ("killed", None)
    assert sent == ([] if patient else [signal.SIGINT])


async def test_a_kernel_whose_use_of_processors_can_t_be_read_is_interrupted(
    cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptors() -> float:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(cells.context, "_cpu_seconds", no_descriptors)
    written = Written()
    running = asyncio.create_task(cells.run("console.log('begun'); while (true) {}", written=written))
    await until(lambda: "begun" in written.stdout)
    assert await cells.context.interrupt() is True
    outcome, _ = await running
    assert (outcome.cause, outcome.lost) == ("killed", None)


async def test_an_interrupt_that_comes_before_the_cell_is_kept_for_it(cells: Cells) -> None:
    for code in ("while (true) {}", "await new Promise(() => {})"):
        running = asyncio.create_task(cells.run(f"/* {'x' * 1_000_000} */ {code}", timeout=60))
        await until(lambda: cells.context.busy)
        assert await cells.context.interrupt() is True
        outcome, _ = await running
        assert (outcome.cause, outcome.lost) == ("killed", None)


async def test_a_cell_that_listens_for_the_signal_itself_is_interrupted_all_the_same(
    cells: Cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GRACE", 60.0)
    await cells.run("var heard = 0; process.on('SIGINT', () => { heard += 1 })")
    for code in (
        "process.on('SIGINT', () => { heard += 10 }); while (true) {}",
        "process.once('SIGINT', () => { heard += 10 }); while (true) {}",
    ):
        outcome, _ = await cells.run(code, timeout=0.5)
        assert (outcome.cause, outcome.exit_code, outcome.lost) == ("timeout", 124, None)
    assert await cells.value("heard") == "0", "the signal was the cell's end"
    await cells.run(
        "setTimeout(() => process.kill(process.pid, 'SIGINT'), 1);"
        "setTimeout(() => require('fs').writeFileSync('sent', ''), 50); undefined"
    )
    await until(lambda: (tmp_path / "sent").exists())
    assert await cells.value("heard") == "21", "all of them are listened to between cells"


async def test_signals_between_cells_do_nothing(cells: Cells, tmp_path: Path) -> None:
    """Not even several, of which the REPL would end."""
    await cells.run("var x = 5; process.on('SIGINT', () => { x += 1 })")
    await cells.run(
        "const signal = (left) => left ? (process.kill(process.pid, 'SIGINT'), setTimeout(signal, 10, left - 1))"
        " : require('fs').writeFileSync('sent', ''); setTimeout(signal, 1, 3); undefined"
    )
    await until(lambda: (tmp_path / "sent").exists())
    assert await cells.value("await Promise.resolve(x)") == "8"


async def test_a_cell_that_goes_on_loses_the_variables(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE", 0.3)
    outcome, _ = await cells.run(
        "while (true) { try { while (true) {} } catch {} await new Promise(r => setTimeout(r, 1)).catch(() => {}) }"
        "; process.on('SIGINT', () => {}); require('child_process').execSync('trap \"\" INT; sleep 60')",
        timeout=0.5,
    )
    assert outcome.cause == "timeout"


async def test_the_end_of_the_interpreter_is_the_end_of_the_cell(cells: Cells) -> None:
    outcome, written = await cells.run("console.log('before'); process.exit(3)")
    assert (outcome.cause, outcome.exit_code) == ("exit", 3)
    assert outcome.lost == "The program ended the interpreter with exit code 3."
    assert written.stdout == "before\n"


async def test_a_late_error_is_told_and_ends_nothing(cells: Cells) -> None:
    await cells.run("setTimeout(() => { throw new Error('late') }, 50); undefined")
    written = Written()
    for _ in range(600):  # it is told with the first cell that ends after it
        await cells.run("1", written=written)
        if written.stderr:
            break
        await asyncio.sleep(0.1)
    assert "Uncaught Error: late" in written.stderr


async def test_garbage_on_the_channel_ends_the_interpreter(cells: Cells) -> None:
    outcome, _ = await cells.run("require('fs').writeSync(3, 'garbage'); await new Promise(() => {})")
    assert outcome.cause == "killed"
    assert outcome.lost == "It was killed, since its interpreter wrote what is no message to the service."


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("const a: number = 1; a", "1"),
        ("enum Colour { Red, Green }; Colour.Green", "1"),
        ("interface Point { x: number }\nconst p: Point = { x: 1 }; p.x", "1"),
        ("function same<T>(value: T): T { return value }\nsame<string>('s')", "'s'"),
        ("import type { Stats } from 'node:fs'\nimport { existsSync } from 'node:fs'; typeof existsSync", "'function'"),
        ("const late: number = await Promise.resolve(3); late", "3"),
    ],
)
async def test_typescript(typescript: Cells, code: str, text: str) -> None:
    assert await typescript.value(code) == text


async def test_typescript_imports_the_session_s_modules(typescript: Cells, tmp_path: Path) -> None:
    (tmp_path / "own.ts").write_text("export enum E { A = 7 }\nexport const value: string = 'own'")
    assert await typescript.value("import { value, E } from './own.ts'; value + E.A") == "'own7'"
    assert await typescript.value("import { value as again } from './own'; again") == "'own'"
    outcome, _ = await typescript.run("let z: = 3")
    assert outcome.error is not None
    assert outcome.error["name"] == "SyntaxError"


async def test_the_session_s_own_typescript_of_the_name_of_a_client_wins(typescript: Cells, tmp_path: Path) -> None:
    (tmp_path / "era_state.ts").write_text("export const whose: string = 'own'")
    (tmp_path / "era_storage.ts").write_text("export const whose: string = 'own'")
    for name in ("./era_state", "./era_state.js", "./era_storage", "./era_storage.js"):
        assert await typescript.value(f"import {{ whose }} from '{name}'; whose") == "'own'", name
        assert await typescript.value(f"require('{name}').whose") == "'own'", name


async def test_events_are_in_the_order_of_the_writes(cells: Cells) -> None:
    _, written = await cells.run("console.log('a'); display('b'); console.log('c'); 'd'")
    assert written.events == [
        {"type": "stdout", "content": "a\n"},
        {"type": "display", "data": {"text/plain": "'b'"}, "metadata": {}},
        {"type": "stdout", "content": "c\n"},
        {"type": "result", "data": {"text/plain": "'d'"}, "metadata": {}, "execution_count": 1},
    ]


async def test_error_event_comes_last(cells: Cells) -> None:
    outcome, written = await cells.run("display(1); throw new Error('no')")
    assert [event["type"] for event in written.events] == ["display", "stderr", "cell_error"]
    assert written.events[-1] == {"type": "cell_error", **(outcome.error or {})}

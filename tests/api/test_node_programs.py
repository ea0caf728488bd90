# ruff: noqa: E501  programs are as their users write them
"""Node programs: what they see, print and exit with is what a plain Node gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.api.plain_interpreter import NODE, outcome, run_plainly
from tests.conftest import MakeSession, Run
from tests.table import table


@pytest.mark.parametrize("language", ["node", "typescript"])
def test_variables_of_node_work(session: MakeSession, run: Run, language: str) -> None:
    where = session(language)
    code = "console.log(process.env.NODE_OPTIONS, new Error('x').stack.split('\\n').length, new Date(0).getHours())"
    assert re.fullmatch(r"undefined ([3-9]|1\d) 0\n", run(where, code)["stdout"])
    env = {"NODE_OPTIONS": "--stack-trace-limit=1", "TZ": "Asia/Tokyo"}
    assert outcome(run(where, code, env=env)) == (0, "--stack-trace-limit=1 2 9\n", "")


def test_what_most_programs_need_is_loaded_before_a_run(session: MakeSession, run: Run) -> None:
    where = session("node")
    code = "require('fs').writeSync(1, `${process.moduleLoadList.includes('NativeModule net')}`)"
    assert run(where, code)["stdout"] == "true"
    assert run(where, code, env={"NODE_OPTIONS": "--no-warnings"})["stdout"] == "false"


NODE_PROGRAMS = {
    "what it is": """
console.log(__filename, __dirname, require.main === module, process.argv.length, process.cwd(), module.paths[0]);
console.log(typeof window, typeof globalThis.gc, this === module.exports, process.exitCode);
console.log(process.stdin.isTTY, process.stdout.isTTY, process.listenerCount('SIGTERM'), process.listenerCount('exit'));
""",
    "what is open": """
const fs = require('fs');
for (const fd of [1, 2]) fs.writeSync(1, /flags:.*/.exec(fs.readFileSync(`/proc/self/fdinfo/${fd}`, 'utf8'))[0] + '\\n');
fs.writeSync(1, JSON.stringify([process.getActiveResourcesInfo(), process._getActiveHandles().length]));
""",
    "stdin is empty": """
console.log(JSON.stringify(require('fs').readFileSync(0, 'utf8')));
process.stdin.on('end', () => console.log('end')).resume();
""",
    "exit handlers": """
process.on('beforeExit', () => console.log('before'));
process.on('exit', (code) => console.log('exit', code));
setTimeout(() => console.log('late'), 50);
""",
    "process.exit": """
process.on('exit', (c) => console.log('bye', c));
console.log('x');
process.exit(5);
console.log('y')
""",
    "exitCode": "process.exitCode = 6; setTimeout(() => console.log('later'), 10)",
    "throw": "function f() {\n  throw new TypeError('oh', { cause: new Error('why') });\n}\n\nf();\n",
    "throw text": "throw 'just text'",
    "rejection": "Promise.reject(new Error('nobody catches'));\nsetTimeout(() => console.log('never'), 1000);",
    "rejection in an async function": "async function main() {\n  await null;\n  JSON.parse('{oh');\n}\nmain();\n",
    "handlers of rejections": """
process.on('unhandledRejection', (e) => { console.log('seen', e.message);
process.exitCode = 3; });
Promise.reject(new Error('x'));
""",
    "handler of exceptions": """
process.on('uncaughtException', (e) => console.log('seen', e.message));
setTimeout(() => console.log('on'), 5);
throw new Error('x');
""",
    "syntax error": "const a = 1;\nconst b = ;\n",
    "reference": "console.log(nothing);\n",
    "require fails": "require('./nothing.js');\n",
    "abort": "console.log('x'); process.abort()",
    "import": """
import fs from 'node:fs';
import { join } from 'path';
console.log(typeof fs.readFileSync, join('a', 'b'), import.meta.filename, import.meta.dirname, import.meta.url);
""",
    "top-level await": """
import { setTimeout as wait } from 'timers/promises';
await wait(10);
console.log('waited');
export {};
""",
    "await that never ends": "await new Promise(() => {});\n",
    "dynamic import": "import('node:os').then((os) => console.log(typeof os.cpus));",
    "throw in a module": "import 'fs';\nawait null;\nthrow new Error('in a module');\n",
    "worker": """
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
if (isMainThread) {
  const worker = new Worker(__filename, { workerData: 20 });
  worker.on('message', (m) => console.log('worker says', m));
  worker.on('exit', (c) => console.log('worker ends', c));
} else {
  parentPort.postMessage(workerData * 2 + 2);
}
""",
    "worker from text": """
const { Worker } = require('worker_threads');
new Worker('console.log(1 + 1)', { eval: true }).on('exit', (c) => console.log(c));
""",
    "fork": """
const { fork, spawnSync, execSync } = require('child_process');
if (process.argv[2] === 'child') {
  process.on('message', (m) => { process.send(m + 1); process.disconnect(); });
} else {
  const child = fork(__filename, ['child']);
  child.on('message', (m) => console.log('child says', m));
  child.on('exit', (c) => console.log('child ends', c, process.execArgv.filter((a) => a.includes('require'))));
  child.send(41);
  console.log(spawnSync(process.execPath, ['-p', '6 * 7']).stdout.toString().trim(), execSync('echo sh').toString().trim());
}
""",
    "cluster": """
const cluster = require('cluster');
if (cluster.isPrimary) { cluster.fork().on('exit', (c) => console.log('worker', c)); }
else { process.exit(7); }
""",
    "binary output": "process.stdout.write(Buffer.from([0x61, 0xff, 0xc3, 0x28, 0x0a]));",
    "much output then exit": """
for (let i = 0; i < 900; i++) console.log('line', i, 'x'.repeat(50)); process.exit(2);
""",
    "stack of an error": """
function a() { b(); }
function b() { console.log(new Error('here').stack.split('\\n').slice(0, 4).join('\\n')); }
a();
""",
    "warning": "process.emitWarning('careful'); process.on('warning', (w) => console.log(w.name));",
    "promises and timers": """
setImmediate(() => console.log(4));
setTimeout(() => console.log(3), 0);
Promise.resolve().then(() => console.log(2));
process.nextTick(() => console.log(1.5));
console.log(1);
""",
    "strict by hand": "'use strict'; try { undeclared = 1 } catch (e) { console.log(e.name) }",
    "sloppy by default": "undeclared = 1; console.log(undeclared, typeof this);",
}  # fmt: skip


def without_internal_frames(text: str) -> str:
    """Drop Node's internal frames, which depend on when its preload runs."""
    return re.sub(r"(?m)^    at .*node:internal.*\n", "", text)


@pytest.fixture
def empty_session(session: MakeSession) -> str:
    """A session whose runs find no files of each other, without internet, which may need additional variables."""
    return session("node", persistent=False, allowInternetAccess=False)


@table("name", NODE_PROGRAMS)
def test_a_node_program_does_what_node_does_with_it(
    empty_session: str, run: Run, host_directory: Path, name: str
) -> None:
    code = NODE_PROGRAMS[name]
    argv = [str(NODE), "--disable-warning=MODULE_TYPELESS_PACKAGE_JSON"]
    exit_code, stdout, stderr = run_plainly(argv, "main.js", code, host_directory)
    answer = outcome(run(empty_session, code))
    if name == "promises and timers":  # which of a timer of 0 ms and an immediate comes first is Node's to choose
        assert sorted(answer[1]) == sorted(stdout)
        return
    assert (answer[0], without_internal_frames(answer[1]), without_internal_frames(answer[2])) == (
        exit_code,
        without_internal_frames(stdout),
        without_internal_frames(stderr),
    )


def test_a_node_program_may_use_require_and_import_at_once(session: MakeSession, run: Run) -> None:
    code = """
import os from 'os';
const fs = require('fs');
await null;
fs.writeFileSync('lib.cjs', 'module.exports = 5');
console.log(typeof os.cpus, require('./lib.cjs'), (await import('./lib.cjs')).default);
"""
    where = session("node")
    for _ in range(2):
        assert outcome(run(where, code)) == (0, "function 5 5\n", "")

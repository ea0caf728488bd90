# ruff: noqa: E501  programs are as their users write them
"""TypeScript programs: the syntax that works, imports between files, and tracebacks at the user's own lines."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.api.plain_interpreter import outcome
from tests.conftest import MakeSession, Run
from tests.table import table

TYPESCRIPT = {
    "enum": ("""
enum Colour { Red = 'r', Green = 'g' }
enum N { A, B = 5, C }
const enum D { X = 9 }
console.log(Colour.Green, N.C, N[5], D.X);
""", "g 6 B 9\n"),
    "interface and generics": ("""
interface Box<T extends object = {}> { readonly value: T; more?: string }
const box: Box<{ a: number }> = { value: { a: 1 } };
function open<T extends object>(b: Box<T>): T { return b.value as T; }
console.log(open(box).a, box!.more ?? 'none', (<any>box).value.a, box satisfies object);
""", "1 none 1 { value: { a: 1 } }\n"),
    "namespace": ("""
namespace Shapes { export const sides = 4; export namespace Inner { export function f(): number { return sides + 1; } } }
console.log(Shapes.sides, Shapes.Inner.f());
""", "4 5\n"),
    "parameter properties": ("""
class Point { constructor(public x: number, private readonly y = 2, protected z?: string) {} sum(): number { return this.x + this.y; } }
console.log(new Point(1).sum(), new Point(3));
""", "3 Point { x: 3, y: 2, z: undefined }\n"),
    "classes": ("""
abstract class A<T> { abstract f(): T; declare g: string; static #n = 1; static get n() { return A.#n; } }
class B extends A<number> implements Object { override f(): number { return 7; } }
console.log(new B().f(), A.n);
""", "7 1\n"),
    "overloads and types": ("""
function f(a: string): string;
function f(a: number): number;
function f(a: any): any { return a; }
type Keys<T> = { [K in keyof T]?: T[K] };
let t: [string, ...number[]] = ['a', 1];
let u: unique symbol | undefined;
console.log(f(1), f('a'), t, u);
""", None),
    "import a file": ("""
import fs from 'fs';
fs.writeFileSync('other.ts', 'export interface T { a: number }\\nexport enum E { X = 3 }\\nexport default function (t: T): number { return t.a + E.X; }');
const { default: f } = await import('./other.ts');
console.log(f({ a: 1 }));
""", "4\n"),
    "import require": ("""
import fs = require('fs');
import path = require('path');
const x: string = path.join('a', 'b');
console.log(x, typeof fs.readFileSync);
""", "a/b function\n"),
    "import type": ("""
import type { Stats } from 'fs';
import { type PathLike, statSync } from 'fs';
const s: Stats = statSync('.' as PathLike);
console.log(s.isDirectory());
""", "true\n"),
    "await and require": ("""
const fs = require('fs');
const n: number = await Promise.resolve(5);
console.log(n, typeof fs.readFileSync);
""", "5 function\n"),
    "a type error is no failure": ("""
const n: number = 'text';
function f(a: string): number { return a; }
console.log(n, f(5 as any), (undefined as any)?.x);
const s: string = f('a').nothing;
""", "text 5 undefined\n"),
    "exit code": ("process.exitCode = 4; const x: number = 1; console.log(x);", "1\n"),
    "empty stdin": ("""
import fs from 'fs';
const s: string = fs.readFileSync(0, 'utf8');
console.log(s.length);
""", "0\n"),
    "worker": ("""
import { Worker, isMainThread, parentPort } from 'worker_threads';
enum E { A = 8 }
if (isMainThread) { new Worker(import.meta.filename).on('message', (m: number) => console.log(m)); } else { parentPort!.postMessage(E.A); }
""", "8\n"),
    "jsonc": ("""
const o: Record<string, unknown> = { a: 1, } as const;
label: for (const k in o) { console.log(k); break label; }
""", "a\n"),
}  # fmt: skip


@pytest.fixture
def empty_session(session: MakeSession) -> str:
    """A session whose runs find no files of each other, without internet, which may need additional variables."""
    return session("typescript", persistent=False, allowInternetAccess=False)


@table("name", TYPESCRIPT)
def test_typescript_runs(empty_session: str, run: Run, name: str) -> None:
    code, expected = TYPESCRIPT[name]
    answer = run(empty_session, code)
    if expected is None:  # valid types or not, it must run
        assert answer["stdout"].startswith("1 a [ 'a', 1 ]")
        expected = answer["stdout"]
    assert outcome(answer) == (4 if name == "exit code" else 0, expected, "")


def test_an_error_in_typescript_names_the_line_of_the_user(session: MakeSession, run: Run) -> None:
    code = "interface A {\n  x: number;\n}\nenum E { B }\nfunction f(a: A): void {\n  throw new Error('line six');\n}\nf({ x: E.B });\n"
    answer = run(session("typescript"), code)
    assert answer["exit_code"] == 1
    assert "Error: line six" in answer["stderr"]
    assert re.search(r"at f \((file://)?/workspace/main\.ts:6:9\)", answer["stderr"])
    assert re.search(r"at (file://)?/workspace/main\.ts:8:1|at .* \(/workspace/main\.ts:8:1\)", answer["stderr"])
    broken = run(session("typescript"), "const a: number = 1;\nconst b = ;\n")
    assert broken["exit_code"] == 1
    assert "main.ts:2" in broken["stderr"]
    for text in (answer["stderr"], broken["stderr"]):
        assert "/era" not in text
        assert "node_wait" not in text


def test_modules_are_found_without_their_endings(client: httpx.Client, session: MakeSession, run: Run) -> None:
    """As every TypeScript tool finds them, in `import`, `import()` and `require`."""
    where = session("typescript")
    for path, code in {
        "lib/m.ts": "export const m: number = 1;",
        "lib/index.ts": "export const all = 'index'; export enum Kind { One = 4 }",
        "lib/uses.ts": "import { m } from './m'; import { Kind } from '.'; export const sum = m + Kind.One;",
        "lib/plain.js": "exports.plain = true;",
        "lib/data.json": '{"a": 5}',
        "lib/both.js": "module.exports = 'js';",
        "lib/both.ts": "export default 'ts';",
    }.items():
        client.put(f"/api/sessions/{where}/files/{path}", content=code)
    code = """
import { sum } from './lib/uses';
import { all } from './lib';
import { m } from './lib/m.js';
import * as plain from './lib/plain';
import data from './lib/data';
import both from './lib/both';
import exact from './lib/both.js';
const later = await import('./lib/m');
console.log(sum, all, m, plain.plain, data.a, both, exact, later.m, require('./lib/m').m, require('./lib/data').a);
"""
    outcome = run(where, code)
    assert outcome["stdout"] == "5 index 1 true 5 ts js 1 1 5\n", outcome
    assert run(where, "const { m } = require('./lib/m');\nconsole.log(m);")["stdout"] == "1\n"
    missing = run(where, "import './lib/gone';")
    assert "ERR_MODULE_NOT_FOUND" in missing["stderr"]
    assert "/era/" not in missing["stderr"]
    # Node's own rules hold for Node.
    node = session("node")
    client.put(f"/api/sessions/{node}/files/part.mjs", content="export const a = 1;")
    assert "ERR_MODULE_NOT_FOUND" in run(node, "import { a } from './part'; console.log(a)")["stderr"]

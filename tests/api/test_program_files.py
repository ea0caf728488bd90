# ruff: noqa: E501  programs are as their users write them
"""The session's own files as its programs see them: modules, a file named like the program, and what is written at exit."""

from __future__ import annotations

import re

import httpx

from tests.api.plain_interpreter import outcome
from tests.conftest import MakeSession, Run
from tests.table import table


def test_what_is_written_at_exit_is_kept(session: MakeSession, run: Run) -> None:
    where = session()
    code = """
import atexit, json, threading, time
unflushed = open('unflushed', 'w')
unflushed.write('all of it')
@atexit.register
def save():
    with open('.session_data.json', 'w') as f: json.dump({'saved': 'at exit'}, f)
def work():
    time.sleep(0.2)
    open('by-thread', 'w').write('done')
threading.Thread(target=work).start()
"""
    assert run(where, code)["data"] == {"saved": "at exit"}
    assert run(where, "print(open('unflushed').read(), open('by-thread').read())")["stdout"] == "all of it done\n"


def test_files_of_the_session_are_modules_and_hide_those_of_the_library(session: MakeSession, run: Run) -> None:
    where = session()
    run(
        where,
        """
import os
open('helper.py', 'w').write('VALUE = 5\\ndef f(): return __file__, __name__')
open('json.py', 'w').write('mine = "json of mine"')
open('random.py', 'w').write('mine = "random of mine"')
os.mkdir('string'); open('string/__init__.py', 'w').write('mine = "string of mine"')
os.mkdir('package'); open('package/sub.py', 'w').write('X = 1')
""",
    )
    code = "import helper, json, random, string, package.sub; print(helper.VALUE, helper.f(), json.mine, random.mine, string.mine, package.sub.X)"
    expected = "5 ('/workspace/helper.py', 'helper') json of mine random of mine string of mine 1\n"
    assert outcome(run(where, code)) == (0, expected, "")


@table("language, name", [("python", "main.py"), ("node", "main.js"), ("typescript", "main.ts")])
def test_a_file_of_the_programs_name_stays_the_sessions_own(
    client: httpx.Client, session: MakeSession, run: Run, language: str, name: str
) -> None:
    where = session(language)
    write = {
        "python": "open('main.py', 'w').write('VALUE = 5')",
        "node": "require('fs').writeFileSync('main.js', 'exports.VALUE = 5')",
        "typescript": "require('fs').writeFileSync('main.ts', 'export const VALUE: number = 5')",
    }[language]
    look = {
        "python": "import main; print(main.VALUE, open('main.py').read())",
        "node": "console.log(require('./main.js').VALUE, require('fs').readFileSync('main.js', 'utf8'))",
        "typescript": "import { VALUE } from './main.ts'; import fs from 'fs'; console.log(VALUE, fs.readFileSync('main.ts', 'utf8'))",
    }[language]
    run(where, write)
    for _ in range(2):
        answer = run(where, look)
        assert (answer["exit_code"], answer["stderr"]) == (0, "")
        assert re.fullmatch(r"5 .*VALUE.* = 5\n", answer["stdout"])
    files = client.get(f"/api/sessions/{where}?include=files").json()["files"]
    assert [file["path"] for file in files] == [name]


@table("language", ["python", "node", "typescript"])
def test_the_programs_own_file_is_not_kept(client: httpx.Client, session: MakeSession, run: Run, language: str) -> None:
    where = session(language)
    run(where, "1")
    assert client.get(f"/api/sessions/{where}?include=files").json()["files"] == []

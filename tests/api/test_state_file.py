# ruff: noqa: E501  programs are as their users write them
"""State files as programs leave them: either the old data stands, or the file becomes the data as documented."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx
import pytest

from tests.conftest import MakeSession, Run
from tests.table import table

OLD: dict[str, Any] = {"old": [1, 2.5, "ü"], "deep": {"er": None}}

NO_FILE = "os.remove(S)\n"


def put(content: bytes) -> str:
    """A program that writes `content` into its state file."""
    return f"open(S, 'wb').write({content!r})"


def nested(levels: int) -> str:
    """JSON of an object that is `levels` deep, the object itself being the first."""
    return '{"a":' * levels + "1" + "}" * levels


REFUSED: dict[str, tuple[str, str]] = {
    # Not a plain file.
    "link to a file of the system": (NO_FILE + "os.symlink('/etc/passwd', S)", "is a symbolic link"),
    "link to good json": (
        NO_FILE + "open('good', 'w').write('{\"evil\": 1}'); os.symlink('good', S)",
        "is a symbolic link",
    ),
    "link to nowhere": (NO_FILE + "os.symlink('/nowhere', S)", "is a symbolic link"),
    "link to itself": (NO_FILE + "os.symlink(S, S)", "is a symbolic link"),
    "pipe": (NO_FILE + "os.mkfifo(S)", "is a named pipe"),
    "pipe with a reader and a writer": (
        NO_FILE + "os.mkfifo(S); fd = os.open(S, os.O_RDWR)\nif os.fork() == 0: time.sleep(60)",
        "is a named pipe",
    ),
    "empty directory": (NO_FILE + "os.mkdir(S)", "is a directory"),
    "full directory": (NO_FILE + "os.makedirs(S + '/a/b'); open(S + '/a/f', 'w').write('x')", "is a directory"),
    "device, or else a socket": (
        NO_FILE
        + """
try:
    os.mknod(S, 0o20666, os.makedev(1, 5))
    print('a device was made')
except OSError:
    import socket
    socket.socket(socket.AF_UNIX).bind(S)
""",
        "is a socket",
    ),
    "hard link to a file of the session": (
        "open('twin', 'w').write('{\"evil\": 1}')\n" + NO_FILE + "os.link('twin', S)",
        "hard link",
    ),
    "second name": ("open(S, 'w').write('{\"evil\": 1}'); os.link(S, 'twin')", "hard link"),
    "no permissions": ("open(S, 'w').write('{\"evil\": 1}'); os.chmod(S, 0)", "can't be opened: Permission denied"),
    # Too large, or too deep.
    "1 GB, sparse": ("os.truncate(S, 10**9)", "too large"),
    "100,000 levels of lists": (
        "open(S, 'w').write('{\"a\":' + '['*100000 + ']'*100000 + '}')",
        "nested deeper than 64",
    ),
    "100,000 levels of objects": ("open(S, 'w').write('{\"a\":'*100000 + '1' + '}'*100000)", "nested deeper than 64"),
    "65 levels": (put(nested(65).encode()), "nested deeper than 64"),
    "65 levels, the last one empty": (put(b'{"a":' * 64 + b"{}" + b"}" * 64), "nested deeper than 64"),
    "one byte over 1 MiB": ("open(S, 'w').write('{\"a\":\"' + 'x' * (2**20 - 7) + '\"}')", "1048577 bytes .*1048576"),
    "over 1 MiB in characters of two bytes": (
        "open(S, 'w').write('{\"a\":\"' + 'é' * (2**19 + 1) + '\"}')",
        r"\d+ bytes .*1048576",
    ),
    "5 MB of blanks": ("open(S, 'w').write('{' + ' ' * 5_000_000 + '}')", "too large"),
    "a number of 5,000 digits": ("open(S, 'w').write('{\"a\":' + '9'*5000 + '}')", "5000 digits"),
    "a negative number of 5,000 digits": ("open(S, 'w').write('{\"a\":-' + '9'*5000 + '}')", r"500\d digits"),
    # Not JSON.
    "empty": (put(b""), "is empty"),
    "blank": (put(b" \n\t"), "is empty"),
    "truncated": (put(b'{"a": [1, 2'), "is not JSON"),
    "two documents": (put(b'{"a": 1}{"b": 2}'), "is not JSON"),
    "python's notation": (put(b"{'a': None}"), "is not JSON"),
    "trailing comma": (put(b'{"a": 1,}'), "is not JSON"),
    "NUL": (put(b'{"a": 1}\0'), "is not JSON"),
    "raw newline in a string": (put(b'{"a": "1\n2"}'), "is not JSON"),
    "NaN": (put(b'{"a": NaN}'), "NaN"),
    "Infinity": (put(b'{"a": Infinity}'), "Infinity"),
    "-Infinity": (put(b'{"a": [-Infinity]}'), "-Infinity"),
    "1e400": (put(b'{"a": 1e400}'), "out of range"),
    "-1e400": (put(b'{"a": -1e400}'), "out of range"),
    "byte order mark": (put(b'\xef\xbb\xbf{"a": 1}'), "byte order mark"),
    "UTF-16": (put('{"a": 1}'.encode("utf-16")), "is not UTF-8"),
    "UTF-16 without a mark": (put('{"a": 1}'.encode("utf-16-le")), "is not (UTF-8|JSON)"),
    "invalid UTF-8": (put(b'{"a": "\xff\xfe"}'), "is not UTF-8"),
    "overlong UTF-8": (put(b'{"a": "\xc0\xaf"}'), "is not UTF-8"),
    "a surrogate as UTF-8": (put(b'{"a": "\xed\xa0\x80"}'), "is not UTF-8"),
    "lone surrogate": (put(b'{"a": "\\ud800"}'), "lone surrogate"),
    "lone surrogate, deep": (put(b'{"a": [{"b": ["x\\uDFFF"]}]}'), "lone surrogate"),
    "lone surrogate in a key": (put(b'{"\\udead": 1}'), "lone surrogate"),
    "surrogates in the wrong order": (put(b'{"a": "\\ude00\\ud83d"}'), "lone surrogate"),
    # JSON, but no object.
    "list": (put(b'[{"a": 1}]'), "is a list, not an object"),
    "string": (put(b'"a"'), "is a string, not an object"),
    "number": (put(b"17"), "is a number, not an object"),
    "boolean": (put(b"true"), "is a boolean, not an object"),
    "null": (put(b"null"), "is null, not an object"),
}

BIG = "x" * (2**20 - 8)
READINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deleted": ("os.remove(S)", OLD),
    "untouched": ("pass", OLD),
    "written by rename": ("open('new', 'w').write('{\"a\": 1}'); os.rename('new', S)", {"a": 1}),
    "empty object": (put(b"{}"), {}),
    "blanks around": (put(b'\r\n\t {"a" : 1}\r\n'), {"a": 1}),
    "of duplicate keys the last": (put(b'{"a": 1, "b": {"c": 1, "c": 2}, "a": [3]}'), {"a": [3], "b": {"c": 2}}),
    "escaped pair of surrogates": (put(b'{"a": "\\ud83d\\ude00"}'), {"a": "😀"}),
    "escaped NUL": (put(b'{"a\\u0000": "\\u0000"}'), {"a\0": "\0"}),
    "large whole numbers are exact": (put(b'{"a": 12345678901234567890123}'), {"a": 12345678901234567890123}),
    "4,000 digits": (put(b'{"a": ' + b"7" * 4000 + b"}"), {"a": int("7" * 4000)}),
    "numbers": (put(b'{"a": [1E2, -0.5, 1e-400, 1.7976931348623157e308]}'), {"a": [100.0, -0.5, 0.0, 1.7976931348623157e308]}),
    "64 levels": (put(nested(64).encode()), json.loads(nested(64))),
    "1 MiB": (f"open(S, 'w').write('{{\"a\":\"' + 'x' * {len(BIG)} + '\"}}')", {"a": BIG}),
    "read-only": ("open(S, 'w').write('{\"a\": 1}'); os.chmod(S, 0o400)", {"a": 1}),
}  # fmt: skip


def program(code: str, end: str = "print('done'); sys.exit(3)") -> str:
    """A program that writes two files, does `code` with its state file S, and ends with `end`."""
    return (
        "import os, sys, time\nS = '.session_data.json'\nopen('kept', 'w').write('new')\nopen('extra', 'w').close()\n"
        f"{code}\n{end}"
    )


LOOK = """
import json, os
print(json.dumps([json.load(open('.session_data.json')), open('kept').read(), sorted(os.listdir())]))
"""


@pytest.fixture
def old_session(session: MakeSession) -> str:
    """A session with the old data."""
    return session(data=OLD)


@table("name", REFUSED)
def test_what_cannot_be_read_leaves_data_and_files_as_they_were(
    client: httpx.Client, old_session: str, run: Run, name: str
) -> None:
    code, reason = REFUSED[name]
    where = old_session
    before = run(where, "open('kept', 'w').write('old')")["state"]["version"]
    answer = run(where, program(code))
    # The run's own outcome stands.
    assert (answer["stdout"], answer["stderr"]) == ("done\n", "")
    assert (answer["exit_code"], answer["status"]) == (3, "failed")
    assert (answer["data"], answer["state"]["committed"], answer["state"]["version"]) == (OLD, False, before)
    # The reason is a sentence.
    assert re.fullmatch(
        rf"\.session_data\.json .*{reason}.*; data and files stay as they were\.", answer["state"]["reason"]
    )
    shown = client.get(f"/api/sessions/{where}").json()
    assert (shown["data"], shown["version"], shown["file_count"]) == (OLD, before, 1)
    # The next run works, on the old data and files.
    again = run(where, LOOK)
    assert again["exit_code"] == 0, again["stderr"]
    assert json.loads(again["stdout"]) == [OLD, "old", [".session_data.json", "kept", "main.py"]]
    assert again["state"]["committed"]


@table("name", READINGS)
def test_what_can_be_read_becomes_the_data(client: httpx.Client, session: MakeSession, run: Run, name: str) -> None:
    code, expected = READINGS[name]
    where = session(data=OLD)
    answer = run(where, program(code))
    assert (answer["exit_code"], answer["stdout"], answer["stderr"]) == (3, "done\n", "")
    assert answer["state"] == {"version": 2, "committed": True, "reason": None}
    assert answer["data"] == expected
    assert client.get(f"/api/sessions/{where}").json()["data"] == expected
    again = run(where, LOOK.replace("json.load(open('.session_data.json'))", "open('.session_data.json').read()"))
    content, kept, names = json.loads(again["stdout"])
    assert (json.loads(content), kept) == (expected, "new")
    assert {"kept", "extra"} <= set(names)
    assert again["data"] == expected


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("node", "const fs = require('fs'); fs.writeFileSync('kept', 'new'); fs.writeFileSync('.session_data.json', '[1');"),
        ("typescript", "import fs from 'fs'; fs.writeFileSync('kept', 'new'); fs.rmSync('.session_data.json'); fs.mkdirSync('.session_data.json');"),
    ],
)  # fmt: skip
def test_other_languages_lose_nothing_either(session: MakeSession, run: Run, language: str, code: str) -> None:
    where = session(language, data=OLD)
    run(where, "require('fs').writeFileSync('kept', 'old')")
    answer = run(where, code)
    assert (answer["exit_code"], answer["stderr"]) == (0, "")
    assert (answer["data"], answer["state"]["committed"]) == (OLD, False)
    look = "console.log(require('fs').readFileSync('kept', 'utf8'), require('./.session_data.json').deep.er)"
    assert run(where, look)["stdout"] == "old null\n"


def test_what_a_background_process_writes_after_the_program_has_ended_does_not_count(
    client: httpx.Client, session: MakeSession, run: Run
) -> None:
    where = session(data=OLD)
    late = """
if os.fork() == 0:
    os.setsid()
    time.sleep(3)
    open(S, 'w').write('{"late": true}')
    open('late', 'w').close()
    os._exit(0)
open(S, 'w').write('{"good": 1}')
"""
    answer = run(where, program(late))
    assert (answer["data"], answer["state"]["committed"]) == ({"good": 1}, True)
    time.sleep(3.5)
    assert client.get(f"/api/sessions/{where}").json()["data"] == {"good": 1}
    data, _, names = json.loads(run(where, LOOK)["stdout"])
    assert (data, "late" in names) == ({"good": 1}, False)


def test_a_file_torn_by_a_process_that_never_stops_writing_is_whole_or_refused(
    client: httpx.Client, session: MakeSession, run: Run
) -> None:
    where = session(data=OLD)
    race = """
def write():
    open(S, 'w').write('{"torn": "' + 'x' * 300_000 + '"}')
began, begins = os.pipe()
if os.fork() == 0:
    write()
    os.write(begins, b'1')
    while True:
        write()
os.read(began, 1)
time.sleep(0.05)
"""
    new = {"torn": "x" * 300_000}
    expected = OLD
    for _ in range(6):
        answer = run(where, program(race))
        expected = new if answer["state"]["committed"] else expected
        assert answer["data"] == expected
        assert (answer["state"]["reason"] is None) == answer["state"]["committed"]
        assert client.get(f"/api/sessions/{where}").json()["data"] == expected
        assert run(where, "import json; print(sorted(json.load(open('.session_data.json'))))")["stdout"] == (
            f"{sorted(expected)}\n"
        )

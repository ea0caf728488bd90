"""How programs are called: arguments, standard input, directory, commands."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from era.core.program import CODE_ALONE, Invocation
from tests.drivers.conformance.helpers import says, shared
from tests.soaking import soak_the_rest

WORDS = ("plain", "two words", "", "--flag", "süß 🐢", '"quoted"', "line\nbreak", "$HOME `x` *")
SHOW = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), sys.stdin.read()], ensure_ascii=False))"


def test_arguments_arrive_as_they_were_given(sandboxes: Any, sandbox: Any) -> None:
    code = "import sys; print(sys.argv[1:] == eval(sys.stdin.read()), sys.argv[0], sys.orig_argv[-1] == sys.argv[-1])"
    call = Invocation(args=WORDS, stdin=repr(list(WORDS)).encode())
    assert says(sandboxes, sandbox, code, invocation=call).split()[0] == "True"
    assert says(sandboxes, sandbox, "import sys; print(sys.argv)") == "['main.py']\n"  # the next run has none of it


@pytest.mark.parametrize("size", [1, 5, 70_000, 3_000_000])
def test_standard_input_is_all_there_and_then_ends(sandboxes: Any, sandbox: Any, size: int) -> None:
    given = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    code = """
import hashlib, os, sys
first = sys.stdin.buffer.read(1)
rest = sys.stdin.buffer.read()
print(hashlib.sha256(first + rest).hexdigest(), len(first + rest), sys.stdin.read() == '', sys.stdin.isatty())
"""
    expected = f"{hashlib.sha256(given).hexdigest()} {size} True False\n"
    assert says(sandboxes, sandbox, code, invocation=Invocation(stdin=given)) == expected
    assert says(sandboxes, sandbox, "import sys; print(repr(sys.stdin.read()))") == "''\n"


def test_a_prompt_is_answered_line_by_line(sandboxes: Any, sandbox: Any) -> None:
    code = """name = input('name? ')
age = int(input('age? '))
print(f'{name} is {age}')
try: input()
except EOFError: print('over')
"""
    assert says(sandboxes, sandbox, code, invocation=Invocation(stdin=b"Ada\n36\n")) == "name? age? Ada is 36\nover\n"


def test_a_child_has_the_standard_input_too(sandboxes: Any, sandbox: Any) -> None:
    code = "import subprocess; subprocess.run(['tr', 'a-z', 'A-Z'], check=True)"
    assert says(sandboxes, sandbox, code, invocation=Invocation(stdin=b"shout")) == "SHOUT"


def test_a_program_starts_in_its_directory_and_still_imports_the_session_s_modules(
    sandboxes: Any, sandbox: Any
) -> None:
    files = {"own_module.py": b"word = 'mine'", "deep/er/note.txt": b"here"}
    code = "import own_module, os; print(own_module.word, os.getcwd()[-8:], open('note.txt').read())"
    call = Invocation(cwd="deep/er")
    assert says(sandboxes, sandbox, code, files=files, invocation=call) == "mine /deep/er here\n"
    assert says(sandboxes, sandbox, "import os; print(os.getcwd()[-10:], os.listdir('deep/er'))") == (
        "/workspace ['note.txt']\n"
    )


def test_a_directory_that_is_not_there(sandboxes: Any, sandbox: Any) -> None:
    if sandboxes.name == "fake":
        pytest.skip("the fake driver leaves that to the host")
    for env in ({}, {f"V{number}": "x" * 50_000 for number in range(6)}):  # more than its pipe holds: it ends unread
        result = sandboxes.run(sandbox, "print(1)", env=env, invocation=Invocation(cwd="nowhere"))
        assert (result.ended.exit_code, result.ended.cause, result.stdout) == (126, "exit", "")
        assert "nowhere" in result.stderr
        assert says(sandboxes, sandbox, "print('well')") == "well\n"


def test_a_command_in_place_of_code(sandboxes: Any, sandbox: Any) -> None:
    call = Invocation(command=["/bin/sh", "-c", "cat; basename $PWD; ls; exit 5"], stdin=b"in\n", cwd="place")
    result = sandboxes.run(sandbox, "", files={"place/file": b""}, invocation=call)
    assert (result.stdout, result.ended.exit_code) == ("in\nplace\nfile\n", 5)


@pytest.mark.parametrize(
    ("command", "code"), [(["no-such-program"], 127), (["./text"], 126), (["/workspace"], 126), (["./missing"], 127)]
)
def test_a_command_that_can_not_be_started_ends_as_under_a_shell(
    sandboxes: Any, sandbox: Any, command: list[str], code: int
) -> None:
    if sandboxes.name == "fake":
        pytest.skip("the fake driver leaves that to the host")
    result = sandboxes.run(sandbox, "", files={"text": b"just text"}, invocation=Invocation(command=command))
    assert (result.ended.exit_code, result.ended.cause) == (code, "exit")
    assert command[0] in result.stderr
    assert says(sandboxes, sandbox, "print('well')") == "well\n"


@pytest.mark.parametrize("language", soak_the_rest(["node", "typescript"], 1))
def test_other_languages_are_called_in_the_same_way(sandboxes: Any, language: str) -> None:
    sandbox = shared(sandboxes, language)
    code = "console.log(JSON.stringify([process.argv.slice(2), process.cwd(), require('fs').readFileSync(0, 'utf8')]))"
    code = code.replace("require('fs')", "process.getBuiltinModule('fs')")
    call = Invocation(["a", "b c"], "grüße".encode(), "in/side")
    answer = says(sandboxes, sandbox, code, files={"in/side/x": b""}, invocation=call)
    assert answer.startswith('[["a","b c"],"')
    assert answer.endswith('/in/side","grüße"]\n')
    assert says(sandboxes, sandbox, code, invocation=CODE_ALONE).startswith("[[],")

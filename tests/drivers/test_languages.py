"""Every language in every kind of sandbox: one program in each, which does what the variable MODE says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from era import languages
from era.core.program import Invocation
from tests.drivers.as_user import opened
from tests.drivers.sandboxes import Sandboxes, Weakness
from tests.gvisor import needs_gvisor

DRIVERS = ["bubblewrap", "bubblewrap as a user", "gvisor", "gvisor as a user"]


@dataclass(frozen=True)
class Sample:
    """A program, the line on which it throws, and the exit code after that."""

    program: str
    line: int
    code: int = 1


_NODE = """const fs = require('node:fs');
if (process.env.MODE === 'throw') {
  throw new Error('mine');
}
console.log('grüße', process.env.GIVEN, process.argv.length, fs.readFileSync(0, 'utf8').length);
console.error('told');
if (process.env.MODE === 'wait') setInterval(() => {}, 1000);
else {
  const data = JSON.parse(fs.readFileSync('.session_data.json', 'utf8'));
  fs.writeFileSync('.session_data.json', JSON.stringify({ n: data.n + 1 }));
  fs.writeFileSync('copy.txt', fs.readFileSync('given.txt', 'utf8'));
  process.exitCode = 7;
}
"""

SAMPLES = {
    "python": Sample(
        """import json, os, sys, time
if os.environ['MODE'] == 'throw':
    raise ValueError('mine')
print('grüße', os.environ.get('GIVEN'), len(sys.argv) + 1, len(sys.stdin.read()))
print('told', file=sys.stderr)
if os.environ['MODE'] == 'wait': time.sleep(60)
data = json.load(open('.session_data.json'))
json.dump({'n': data['n'] + 1}, open('.session_data.json', 'w'))
open('copy.txt', 'w').write(open('given.txt').read())
sys.exit(7)
""",
        3,
    ),
    "node": Sample(_NODE, 3),
    "typescript": Sample(_NODE.replace("const data =", "const data: { n: number } ="), 3),
    "deno": Sample(
        """enum Way { Out = 2 }
if (Deno.env.get('MODE') === 'throw') {
  throw new Error('mine');
}
const given: string = await new Response(Deno.stdin.readable).text();
console.log('grüße', Deno.env.get('GIVEN'), Deno.args.length + Way.Out, given.length);
console.error('told');
if (Deno.env.get('MODE') === 'wait') setInterval(() => {}, 1000);
else {
  const data = JSON.parse(Deno.readTextFileSync('.session_data.json'));
  Deno.writeTextFileSync('.session_data.json', JSON.stringify({ n: data.n + 1 }));
  Deno.writeTextFileSync('copy.txt', Deno.readTextFileSync('given.txt'));
  Deno.exitCode = 7;
}
""",
        3,
    ),
    "go": Sample(
        """package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"
)

func main() {
	if os.Getenv("MODE") == "throw" {
		panic("mine")
	}
	stdin, _ := io.ReadAll(os.Stdin)
	given, there := os.LookupEnv("GIVEN")
	if !there {
		given = "nothing"
	}
	fmt.Println("grüße", given, len(os.Args)+1, len(stdin))
	fmt.Fprintln(os.Stderr, "told")
	if os.Getenv("MODE") == "wait" {
		time.Sleep(time.Minute)
	}
	var data struct{ N int `json:"n"` }
	text, _ := os.ReadFile(".session_data.json")
	json.Unmarshal(text, &data)
	data.N++
	text, _ = json.Marshal(data)
	os.WriteFile(".session_data.json", text, 0o644)
	text, _ = os.ReadFile("given.txt")
	os.WriteFile("copy.txt", text, 0o644)
	os.Exit(7)
}
""",
        13,
        2,
    ),
    "shell": Sample(
        """set -e
if [ "$MODE" = throw ]; then
  mine
fi
echo "grüße ${GIVEN-undefined} $(($# + 2)) $(($(wc -c)))"
echo told >&2
if [ "$MODE" = wait ]; then sleep 60; fi
echo "{\\"n\\": $(($(tr -dc 0-9 <.session_data.json) + 1))}" >.session_data.json
cp given.txt copy.txt
exit 7
""",
        3,
        127,
    ),
}

CALLED = {
    "python": "import os, sys; print(sys.argv[1:], os.getcwd(), sys.stdin.read())",
    "node": "console.log(process.argv.slice(2), process.cwd(), require('fs').readFileSync(0, 'utf8'))",
    "typescript": "import fs from 'fs';\nconsole.log(process.argv.slice(2), process.cwd(), String(fs.readFileSync(0)))",
    "deno": "console.log(Deno.args, Deno.cwd(), await new Response(Deno.stdin.readable).text())",
    "go": """package main

import ("fmt"; "io"; "os")

func main() {
	stdin, _ := io.ReadAll(os.Stdin)
	directory, _ := os.Getwd()
	fmt.Println(os.Args[1:], directory, string(stdin))
}
""",
    "shell": 'echo "$@ $PWD $(cat)"',
}
"""Programs that print their arguments, directory and standard input."""


@pytest.fixture(scope="module", params=DRIVERS)
def every_sandbox(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with opened(request.param, tmp_path_factory.mktemp("sandboxes")) as made:
        yield made


def test_every_language_is_here() -> None:
    assert set(SAMPLES) == set(languages.LANGUAGES) == set(languages.runtimes())


@pytest.mark.parametrize("driver", ["bubblewrap", pytest.param("gvisor", marks=needs_gvisor)])
def test_a_driver_tests_each_language_when_it_starts(tmp_path: Path, driver: str) -> None:
    """Other tests' drivers are content with Python."""
    made = Sandboxes(tmp_path, Weakness(), driver, self_tested=languages.LANGUAGES)
    made.stop()
    assert set(made.driver.self_tested) == set(SAMPLES) - {"go"}, "Go's compiler would take too long"


@pytest.mark.parametrize("language", SAMPLES)
def test_a_language(every_sandbox: Any, language: str) -> None:
    sandboxes, sample = every_sandbox, SAMPLES[language]
    name = languages.DEFINITIONS[language].entry
    sandbox = sandboxes.make(language)

    def run(mode: str, **more: Any) -> Any:
        env = {"MODE": mode, **more.pop("env", {})}
        return sandboxes.run(sandbox, sample.program, env=env, timeout=120, **more)

    result = run("", env={"GIVEN": "süß"}, state=b'{"n": 1}', files={"given.txt": "日本\n".encode()})
    assert (result.stdout, result.stderr) == ("grüße süß 2 0\n", "told\n")
    assert (result.ended.exit_code, result.ended.cause, json.loads(result.ended.state)) == (7, "exit", {"n": 2})
    assert (sandbox.workspace / "copy.txt").read_text() == "日本\n"
    assert not (sandbox.workspace / name).exists()

    # The file that the session has itself is left alone, and what was given to one run is no other's.
    (sandbox.workspace / name).write_text(owned := "" if language != "go" else "package main\n")
    result = run("throw")
    assert (result.ended.exit_code, result.ended.cause) == (sample.code, "exit")
    place = f"main.go:{sample.line}" if language == "go" else f"__main__{name.removeprefix('main')}"
    assert "mine" in result.stderr
    assert place in result.stderr
    assert (sandbox.workspace / name).read_text() == owned
    (sandbox.workspace / name).unlink()

    result = run("throw")
    line = {"python": f'{name}", line {sample.line}', "shell": f"{name}: line {sample.line}"}
    assert line.get(language, f"{name}:{sample.line}") in result.stderr
    assert "/era/" not in result.stderr

    result = run("wait", meanwhile="kill")
    missing = {"python": "None", "go": "nothing"}.get(language, "undefined")
    assert result.stdout == f"grüße {missing} 2 0\n"
    assert (result.ended.exit_code, result.ended.cause) == (137, "killed")
    sandboxes.close(sandbox)


@pytest.mark.parametrize("language", CALLED)
def test_how_it_is_called(every_sandbox: Any, language: str) -> None:
    sandboxes = every_sandbox
    sandbox = sandboxes.make(language)
    # A program of Go's has its own directory for its package, whichever it starts in.
    call = Invocation(["one", "two words"], b"given", "in/side")
    result = sandboxes.run(sandbox, CALLED[language], files={"in/side/x": b""}, invocation=call, timeout=120)
    assert result.ended.exit_code == 0, result.stderr
    shown = result.stdout.translate(str.maketrans("", "", "[]',\"")).split()
    assert shown == ["one", "two", "words", "/workspace/in/side", "given"]
    assert (sandbox.workspace / "in/side/x").exists()
    result = sandboxes.run(sandbox, CALLED[language], timeout=120)
    assert result.stdout.translate(str.maketrans("", "", "[]',\"")).split() == ["/workspace"]
    sandboxes.close(sandbox)

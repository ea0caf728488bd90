"""Go programs that were built before aren't built again; whatever they are made of, a change shows."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from era import languages
from tests.drivers.sandboxes import LIMITS, Sandboxes, Weakness

pytestmark = pytest.mark.skipif("go" not in languages.runtimes(), reason="there is no Go")

PROGRAM = """package main

import (
	"fmt"
	"os"
	"syscall"
)

var given string

func main() {
	about, _ := os.Stat("/proc/self/exe")
	fmt.Println(about.Sys().(*syscall.Stat_t).Ino, TEXT, given)
}
"""
GIVEN = b"""//go:build given

package main

func init() { given = "variable" }
"""
EMBEDDED = """package main

import (
	_ "embed"
	"fmt"
)

//go:embed part.txt
var part string

func main() { fmt.Println(0, part) }
"""


FAULTS_OF_CHILDREN = """package main

import "syscall"

func main() {
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_CHILDREN, &usage)
	println(usage.Minflt > 0)
}
"""
ASSEMBLED = "package main\n\nfunc value() int64\n\nfunc main() { println(value()) }\n"
ASSEMBLER = """#include "value.h"

TEXT ·value(SB), 4, $0-8
	MOVQ $VALUE, ret+0(FP)
	RET
"""


@pytest.fixture(scope="module")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandboxes]:
    made = Sandboxes(tmp_path_factory.mktemp("go"), Weakness())
    yield made
    made.stop()


def test_what_was_built_is_run_again_and_every_change_shows(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make("go")

    def run(program: str, *, env: dict[str, str] | None = None, **files: bytes) -> list[str]:
        """What it prints: the number of its file first."""
        named = {name.replace("_", "."): content for name, content in files.items()}
        result = sandboxes.run(sandbox, program, env=env, files=named, timeout=300)
        assert result.ended.exit_code == 0, result.stderr
        return result.stdout.split()

    first, other = PROGRAM.replace("TEXT", '"first"'), PROGRAM.replace("TEXT", '"other"')
    number, *said = run(first, given_go=GIVEN)
    assert said == ["first"]
    assert run(other)[1:] == ["other"]
    assert run(first) == [number, "first"], "it was built again"
    variables = "-buildvcs=false -modcacherw -tags=given"
    assert run(first, env={"GOFLAGS": variables})[1:] == ["first", "variable"]
    assert run(first) == [number, "first"]

    parts = PROGRAM.replace("TEXT", "part")
    assert run(parts, part_go=b"package main\n\nconst part = 1\n")[1:] == ["1"]
    assert run(parts, part_go=b"package main\n\nconst part = 2\n")[1:] == ["2"]
    (sandbox.workspace / "part.go").unlink()
    (sandbox.workspace / "part.go").symlink_to("linked")
    assert run(parts, linked=b"package main\n\nconst part = 3\n")[1:] == ["3"]
    assert run(parts, linked=b"package main\n\nconst part = 4\n")[1:] == ["4"]
    (sandbox.workspace / "part.go").unlink()

    assert run(EMBEDDED, part_txt=b"5") == ["0", "5"]
    assert run(EMBEDDED, part_txt=b"6") == ["0", "6"]
    sandboxes.close(sandbox)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its assembler is of this machine")
def test_what_assembler_includes_shows(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make("go")
    for value in ("1", "2"):
        files = {"value_amd64.s": ASSEMBLER.encode(), "value.h": f"#define VALUE {value}\n".encode()}
        assert sandboxes.run(sandbox, ASSEMBLED, files=files, timeout=300).stderr == f"{value}\n"
    sandboxes.close(sandbox)


def test_no_other_process_is_started_for_a_program_that_was_built(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make("go")
    built, again = (sandboxes.run(sandbox, FAULTS_OF_CHILDREN, timeout=300).stderr for _ in range(2))
    assert built == "true\n"
    assert again == "false\n"
    sandboxes.close(sandbox)


def test_sources_may_be_larger_than_a_programs_memory(tmp_path: Path) -> None:
    sandboxes = Sandboxes(tmp_path / "s", Weakness(limits=replace(LIMITS, disk_bytes=1 << 30)))
    sandbox = sandboxes.make("go")
    unused = sandbox.workspace / "unused"
    unused.mkdir()
    for number in range(17):
        (unused / f"{number}.h").touch()
        os.truncate(unused / f"{number}.h", 16 << 20)
    for _ in range(2):
        result = sandboxes.run(sandbox, "package main\n\nfunc main() { println(1) }\n", timeout=300)
        assert (result.stderr, result.ended.cause) == ("1\n", "exit")
    sandboxes.stop()


def test_another_package_than_main_is_no_program(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make("go")
    for _ in range(2):
        result = sandboxes.run(sandbox, "package other\n\nfunc main() {}\n", timeout=300)
        assert (result.stderr, result.ended.exit_code) == ("main.go is not of package main\n", 1)
    sandboxes.close(sandbox)


def test_four_programs_are_kept(sandboxes: Sandboxes) -> None:
    sandbox = sandboxes.make("go")
    numbers = []
    for text in (*"abcde", "e", "a"):
        result = sandboxes.run(sandbox, PROGRAM.replace("TEXT", f'"{text}"'), timeout=300)
        number, said = result.stdout.split()
        assert said == text
        numbers.append(number)
    assert numbers[4] == numbers[5], "the last one is there still"
    assert numbers[0] != numbers[6], "the first one had to make way"
    sandboxes.close(sandbox)

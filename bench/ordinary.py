"""Ordinary programs inside a warm sandbox and outside, by the driver alone: what isolation costs what people run.

Both sides start the same command with the same variables, in a directory on the same disk that holds the same files. A
sandbox may use all processors here, as the host's program may.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping

from bench.arena import Arena
from bench.cases import Case, Probe, Ratio
from bench.drivers import shared
from era.drivers import guest

_SOURCE = "\n".join(
    f"double f{n}(double x) {{ for (int i = 0; i < {n}; i++) x = x * x + i; return x; }}" for n in range(80)
)
_DIGITS = "0 1 2 3 4 5 6 7 8 9"
_TREE = f"for d in {_DIGITS}; do mkdir -p tree/$d; for f in {_DIGITS}; do seq $d$f 400 >tree/$d/$f; done; done"

PREPARE = f"""\
cat >many.c <<'END'
{_SOURCE}
int main(void) {{ return 0; }}
END
seq 200000 | sort -R --random-source=many.c >lines
{_TREE}
"""

_LOOP = "s = 0\nfor n in range(1_000_000): s += n * n % 7"
_SQLITE = """\
import os, sqlite3
db = sqlite3.connect('rows.sqlite')
db.execute('create table t (n integer primary key, s text)')
db.executemany('insert into t values (?, ?)', ((n, str(n)) for n in range(50_000)))
db.commit()
for n in range(20):
    db.execute('update t set s = s + 1 where n = ?', (n,))
    db.commit()
os.remove('rows.sqlite')"""
_FILES = """\
import os
for n in range(1000):
    with open(f'f{n}', 'w') as file: file.write(str(n))
for n in range(1000):
    os.stat(f'f{n}'), open(f'f{n}').read(), os.remove(f'f{n}')"""
_PRINTS = "for n in range(50_000): print(n, flush=True)"


def _python(code: str) -> list[str]:
    return [guest.INTERPRETER, "-c", code]


PROGRAMS: Mapping[str, list[str]] = {
    "compile": ["gcc", "-O2", "-o", "many", "many.c"],
    "sort": ["sort", "-n", "-o", "sorted", "lines"],
    "sqlite": _python(_SQLITE),
    "git": ["sh", "-c", "git init -q r && cp -r tree r && cd r && git add . && "
            "git -c user.name=b -c user.email=b@b commit -qm all && git log --oneline && cd .. && rm -rf r"],
    "tar": ["sh", "-c", "for n in 1 2 3; do "
            "tar czf t.tgz tree && mkdir out && tar xzf t.tgz -C out && rm -r out t.tgz; done"],
    "grep": ["sh", "-c", "for n in $(seq 11 50); do grep -rc $n tree; done"],
    "loop": _python(_LOOP),
    "files": _python(_FILES),
    "prints": _python(_PRINTS),
}  # fmt: skip


def _needs(name: str) -> str:
    return {"compile": "gcc", "git": "git"}.get(name, "sh")


def inside(name: str, kind: str) -> Callable[[Arena], Probe]:
    """One of the programs in a warm sandbox of a driver."""

    def start(arena: Arena) -> Probe:
        driver = shared(arena, kind)
        sandbox = driver.create()
        driver.command(sandbox, ["sh", "-c", PREPARE])
        return Probe(lambda _: driver.command(sandbox, PROGRAMS[name]))

    return start


def outside(name: str) -> Callable[[Arena], Probe]:
    """The same on the host."""

    def start(arena: Arena) -> Probe:
        directory = arena.scratch / f"ordinary-{name}"
        directory.mkdir()
        variables = {**guest.program_environment("python"), "PYTHONPATH": ""}

        def run(command: list[str]) -> bytes:
            argv = [guest.PYTHON if command[0] == guest.INTERPRETER else command[0], *command[1:]]
            return subprocess.run(argv, cwd=directory, env=variables, stdout=subprocess.PIPE, check=True).stdout

        run(["sh", "-c", PREPARE])
        return Probe(lambda _: run(PROGRAMS[name]))

    return start


KINDS = ["bubblewrap", *(["gvisor"] if shutil.which("runsc") else [])]
NAMES = [name for name in PROGRAMS if shutil.which(_needs(name))]

CASES = [
    case
    for name in NAMES
    for case in (
        *(Case(f"{kind} {name}", f"{name} in a warm sandbox", inside(name, kind), burst=2) for kind in KINDS),
        Case(f"ordinary {name}", f"{name} on the host", outside(name), burst=2),
    )
]
RATIOS = [
    Ratio(f"{kind} {name}", f"ordinary {name}", goal=1.05 if kind == "bubblewrap" else 5 if name == "prints" else None)
    for kind in KINDS
    for name in NAMES
]

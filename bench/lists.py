"""What is measured, and what it is compared with. A new case is an entry of CASES, a new ratio one of RATIOS."""

from __future__ import annotations

import os
import shutil

from bench import (
    capacity,
    clients,
    cluster,
    crowd,
    download,
    drivers,
    gateway,
    installs,
    large,
    live,
    live_servers,
    many,
    neighbours,
    ordinary,
    paint,
    podman,
    postgres,
    rivals,
    shares,
    storage,
    walls,
    world,
)
from bench.cases import (
    COUNTER,
    PROGRAMS,
    Case,
    Ratio,
    commit,
    create,
    create_and_run,
    first,
    health,
    http,
    program,
    relayed,
    warm,
)
from era.core.models import Language

_NEIGHBOURS = {name: each for name, each in neighbours.NEIGHBOURS.items() if world.IS_THERE or not each.outside}

SETTLED = 0.2
"""Seconds after which a sandbox that has reported ready is idle, in any language."""

# More than enough seconds for each language's next spare to be ready.
_PAUSES = {"python": 0.05, "node": 0.1, "typescript": 0.2, "deno": 0.2, "go": 0.1}
_HOST = {
    "python": rivals.python(PROGRAMS["python"]),
    "node": rivals.node(PROGRAMS["node"]),
    "typescript": rivals.typescript(PROGRAMS["typescript"]),
    "deno": rivals.deno(PROGRAMS["deno"]),
    "go": rivals.go(PROGRAMS["go"]),
}

_WALLED: dict[str, tuple[Language, str]] = {
    "python": ("python", PROGRAMS["python"]),
    "node": ("node", PROGRAMS["node"]),
    "typescript": ("typescript", PROGRAMS["typescript"]),
    "imports": ("python", walls.IMPORTS),
}

CASES = [
    *(
        case
        for language, code in PROGRAMS.items()
        for case in (
            Case(
                f"{language} warm",
                "a run in a warm session, alone",
                warm(language, code),
                _PAUSES[language],
                processor=True,
            ),
            Case(
                f"{language} host",
                "the interpreter on the host",
                program(_HOST[language]),
                _PAUSES[language],
                processor=True,
            ),
            Case(f"{language} burst", "such runs back to back", warm(language, code), processor=True),
            Case(f"{language} host burst", "such starts back to back", program(_HOST[language]), processor=True),
            Case(f"{language} first", "the first run of a new session", first(language, code), SETTLED, burst=2),
        )
    ),
    Case(
        "python change",
        "a warm run that changes data",
        warm("python", COUNTER),
        _PAUSES["python"],
        processor=True,
    ),
    Case("hundred changes", "one of 100 such runs in a row", warm("python", COUNTER), burst=100),
    Case("create and run", "a session created, and its first run", create_and_run(PROGRAMS["python"])),
    Case(
        "create and keep",
        "the same, for its processor time: sessions stay",
        capacity.create_and_keep,
        processor=True,
    ),
    Case(
        "eight clients",
        "80 runs of 8 clients in 8 warm sessions",
        capacity.eight_clients,
        burst=1,
        processor=True,
    ),
    Case(
        "two loops",
        "80 starts of python3 -c by two loops",
        capacity.two_loops,
        burst=1,
        processor=True,
    ),
    Case(
        "python bwrap",
        "the interpreter in a new bubblewrap sandbox",
        program(rivals.bwrap(PROGRAMS["python"])),
        _PAUSES["python"],
    ),
    *(
        case
        for name, (language, code) in _WALLED.items()
        for case in (
            Case(
                f"walls {name}",
                "a run in a warm sandbox, without commit and HTTP",
                walls.warm_run(language, code, weak=False),
                _PAUSES[language],
            ),
            Case(
                f"no walls {name}",
                "the same without seccomp filters and Landlock",
                walls.warm_run(language, code, weak=True),
                _PAUSES[language],
            ),
        )
    ),
    Case("relayed", "a call of a public URL, answered by a run", relayed(PROGRAMS["python"]), _PAUSES["python"]),
    Case("forwarded", "a call of a live server in a session", live_servers.forwarded, burst=20),
    Case("direct", "the same server, called directly", live_servers.direct, burst=20),
    Case("quiet", "a warm run, alone", crowd.run_beside(()), _PAUSES["python"], burst=20),
    *(
        Case(name, f"the same beside {what}", crowd.run_beside(programs), _PAUSES["python"], burst=20, goal=goal)
        for name, what, programs, goal in (
            ("crowded", "7 that take all they can", crowd.CROWD, None),
            ("eight burners", "8 sessions that burn processors", (crowd.CPU,) * 8, neighbours.GOAL_MS),
            ("eight queries", "endless SQL of 8 sessions", (neighbours.ENDLESS_SQL,) * 8, neighbours.GOAL_MS),
        )
    ),
    *(
        case
        for name, neighbour in _NEIGHBOURS.items()
        for case in (
            Case(
                f"beside {name}",
                f"the same beside a neighbour's {neighbour.what}",
                neighbours.run_beside(name),
                neighbour.pause,
                burst=10,
                goal=neighbours.GOAL_MS,
            ),
            Case(
                f"health beside {name}",
                f"GET /health beside {neighbour.what}",
                neighbours.health_beside(name),
                neighbour.pause,
                burst=10,
                goal=neighbours.GOAL_MS,
            ),
        )
    ),
    Case("creates at once", "100 sessions created and run, all at once", capacity.creates_at_once, SETTLED, burst=1),
    Case("warm among 32", "a warm run while 31 others run all the time", capacity.warm_among_others, burst=100),
    Case("in turn", "the next of 300 sessions for 16 clients, 32 warm", capacity.in_turn, burst=30),
    Case("wake files", "a run in a session with 10,000 files, put away", capacity.wake_files, burst=2),
    Case("wake data", "the same with 500 MiB in one file", capacity.wake_data, burst=2),
    Case("file of one", "a run that changes the only file", large.change_one_file(of_many=False), 0.05),
    Case("file of many", "the same among 10,000 files", large.change_one_file(of_many=True), 0.05),
    Case("checkpoint", "what a process changed among 10,000 files", large.checkpoint, 0.05, goal=20.0),
    Case("duplicate", "a copy of 1 GiB in 2,000 files", large.duplicate),
    Case("rollback", "back to 1 GiB in 2,000 files", large.rollback),
    Case("files page", "100 of 10,000 files listed", large.first_page_of_files),
    Case("sessions page", "50 of 100,000 sessions, by a label", many.page_of_sqlite),
    Case("storage run", "a warm run that gets a value of the storage", storage.run("python"), _PAUSES["python"]),
    Case("storage run node", "the same in Node", storage.run("node"), _PAUSES["node"]),
    Case("storage 100", "a warm run that gets a value 100 times", storage.many("python"), _PAUSES["python"]),
    Case("storage http", "the same value over HTTP, once", storage.http),
    Case("storage put", "a value set over HTTP", storage.put),
    Case("storage sql", "a SELECT over HTTP", storage.sql),
    Case("setup again", "a session with packages that another has, ready", installs.again, goal=100),
    *(
        case
        for name in installs.FIRST
        for state in ("cold", "warm")
        for case in (
            Case(
                f"setup {name} {state}",
                f"the first session with {name}, ready; {state} cache",
                installs.first(name, cold=state == "cold"),
                burst=1,
            ),
            Case(
                f"tool {name} {state}",
                f"uv or npm by hand, {state} cache",
                installs.by_hand(name, cold=state == "cold"),
                burst=1,
            ),
        )
    ),
    Case(
        "tool requests compiled",
        "uv by hand with --compile-bytecode, warm cache",
        installs.by_hand("requests", cold=False, options=("--compile-bytecode",)),
        burst=1,
    ),
    *(
        Case(
            f"packages {language}",
            "a warm run with large packages that it doesn't import",
            installs.run_beside_packages(language, PROGRAMS[language]),
            _PAUSES[language],
        )
        for language in ("python", "node")
    ),
    Case("session create", "creating a session", create),
    Case("health", "HTTP and one read of the database", health),
    Case("http floor", "GET of a file that can't be: HTTP alone", http),
    Case("commit floor", "a durable commit of SQLite, same disk", commit),
    *live.CASES,
    *ordinary.CASES,
    *clients.CASES,
    *gateway.CASES,
    *podman.CASES,
]

RATIOS = [
    Ratio("python warm", "python host", goal=0.5),
    Ratio("create and run", "python host", goal=2),
    Ratio("create and keep", "python host burst", goal=2, processor=True),
    Ratio("eight clients", "two loops", goal=0.6),
    Ratio("deno warm", "deno host", goal=0.4),
    Ratio("go warm", "go host", goal=0.15),
    Ratio("node warm", "node host", goal=0.35),
    Ratio("typescript warm", "typescript host"),
    Ratio("python burst", "python host burst"),
    Ratio("node burst", "node host burst"),
    Ratio("typescript burst", "typescript host burst"),
    Ratio("python change", "python host", goal=0.4),
    Ratio("python warm", "python bwrap"),
    Ratio("relayed", "python warm", goal=1.3),
    Ratio("forwarded", "direct"),
    *(Ratio(f"walls {name}", f"no walls {name}", goal=1.2) for name in _WALLED),
    Ratio("python first", "python host"),
    Ratio("python first", "python bwrap"),
    Ratio("node first", "node host"),
    Ratio("typescript first", "typescript host"),
    Ratio("crowded", "quiet", goal=3, quantile=0.95),
    Ratio("eight burners", "quiet", goal=5),
    Ratio("eight queries", "quiet", goal=5),
    *(Ratio(f"beside {name}", "quiet") for name in _NEIGHBOURS),
    *(Ratio(f"health beside {name}", "health") for name in _NEIGHBOURS),
    Ratio("creates at once", "python host", goal=capacity.AT_ONCE),
    Ratio("hundred changes", "hundred changes", goal=1.8, quantile=0.99, rival_quantile=0.5),
    Ratio("warm among 32", "warm among 32", goal=3, quantile=0.99, rival_quantile=0.5),
    Ratio("in turn", "in turn", goal=3, quantile=0.99, rival_quantile=0.5),
    Ratio("in turn", "python host"),
    Ratio("wake files", "python host", goal=10),
    Ratio("wake data", "python host", goal=6),
    Ratio("file of many", "file of one", goal=1.3),
    Ratio("duplicate", "session create"),
    Ratio("rollback", "session create"),
    Ratio("files page", "health"),
    Ratio("sessions page", "health"),
    Ratio("storage run", "python warm"),
    Ratio("storage run node", "node warm"),
    Ratio("storage http", "http floor"),
    Ratio("storage put", "commit floor"),
    *(
        Ratio(f"setup {name} {state}", f"tool {name} {state}", goal=1.5)
        for name in installs.FIRST
        for state in ("cold", "warm")
    ),
    Ratio("setup requests warm", "tool requests compiled"),
    *(Ratio(f"packages {language}", f"{language} warm", goal=1.1) for language in ("python", "node")),
    Ratio("session create", "commit floor"),
    Ratio("python warm", "http floor"),
    *live.RATIOS,
    *ordinary.RATIOS,
    *clients.RATIOS,
    *gateway.RATIOS,
    *podman.RATIOS,
]

if world.IS_THERE:
    CASES += [
        Case("download", f"{download.MEGABYTES} MiB, in a session", download.in_session, burst=1),
        Case("download direct", "the same on the host", download.direct, burst=1),
    ]
    RATIOS.append(Ratio("download", "download direct", goal=2))

if postgres.IS_THERE:
    CASES += [
        Case("million page", "50 of 1,000,000 in PostgreSQL, by that label", many.page_of_postgresql("half"), goal=50),
        Case("million page few", "the same by a label of the 100 oldest", many.page_of_postgresql("few"), goal=50),
        Case("home run", "a warm run that changes data, in a cluster, at its home", cluster.run_at(0), burst=20),
        Case("hop run", "the same through another host", cluster.run_at(1), burst=20),
        Case("take-over", "a run elsewhere, from its home's pause on", cluster.take_over, burst=1, goal=10_000),
        Case("drain", "100 live sessions of a host that stops, elsewhere", cluster.drain, burst=1, goal=30_000),
    ]
    RATIOS.append(Ratio("hop run", "home run", goal=1.6))
    if os.geteuid() == 0:
        told = f"{shares.RUNS} runs at each of the hosts, which have a quarter of a processor each"
        CASES += [Case(f"shares {count}", told, shares.runs_at(count), burst=1) for count in (1, 2, 4)]
        RATIOS += [Ratio("shares 2", "shares 1", goal=1.25), Ratio("shares 4", "shares 1", goal=1.25)]

if paint.IS_THERE:
    CASES += [
        Case("paint", "the dashboard's first paint in Chromium", paint.dashboard, burst=3, goal=300),
        Case("paint floor", "that of a page of one word", paint.floor, burst=3),
    ]
    RATIOS.append(Ratio("paint", "paint floor"))

if shutil.which("runsc"):
    # By the driver, without the service, as `runsc do` has neither HTTP nor a commit.
    CASES += [
        Case("gvisor warm", "a run in a warm gVisor sandbox, alone", drivers.warm(PROGRAMS["python"]), 0.3),
        Case(
            "gvisor bwrap",
            "the same in a warm bubblewrap sandbox",
            drivers.warm(PROGRAMS["python"], "bubblewrap"),
            0.05,
        ),
        Case("gvisor runsc", "the interpreter in a new gVisor sandbox", program(rivals.runsc(PROGRAMS["python"])), 0.3),
        Case("gvisor new", "creating a gVisor sandbox", drivers.new, 0.3, burst=2),
    ]
    RATIOS += [
        Ratio("gvisor warm", "gvisor runsc", goal=0.2),
        Ratio("gvisor warm", "gvisor bwrap"),
    ]

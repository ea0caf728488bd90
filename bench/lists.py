"""What is measured, and against what. A new case is an entry of CASES, a new ratio one of RATIOS."""

from __future__ import annotations

from bench import crowd, large, rivals
from bench.cases import (
    COUNTER,
    PROGRAMS,
    Case,
    Ratio,
    commit,
    create,
    first,
    health,
    no_such_path,
    program,
    warm,
)

SETTLED = 0.2
"""Seconds after which a sandbox that said it is ready has nothing left to do, in any language."""

# How long each language's spare takes to be ready again, generously.
_PAUSES = {"python": 0.05, "node": 0.1, "typescript": 0.2}
_HOST = {
    "python": rivals.python(PROGRAMS["python"]),
    "node": rivals.node(PROGRAMS["node"]),
    "typescript": rivals.typescript(PROGRAMS["typescript"]),
}

CASES = [
    *(
        case
        for language, code in PROGRAMS.items()
        for case in (
            Case(f"{language} warm", "a run in a live session, alone", warm(language, code), _PAUSES[language]),
            Case(f"{language} host", "the interpreter on the host", program(_HOST[language]), _PAUSES[language]),
            Case(f"{language} burst", "such runs back to back", warm(language, code)),
            Case(f"{language} host burst", "such starts back to back", program(_HOST[language])),
            Case(f"{language} first", "the first run of a new session", first(language, code), SETTLED, burst=2),
        )
    ),
    Case("python change", "a warm run that changes data", warm("python", COUNTER), _PAUSES["python"]),
    Case(
        "python bwrap",
        "the interpreter in a new bubblewrap",
        program(rivals.bwrap(PROGRAMS["python"])),
        _PAUSES["python"],
    ),
    Case("quiet", "a warm run, alone", crowd.run_beside(()), _PAUSES["python"], burst=20),
    Case("crowded", "the same beside 7 that burn", crowd.run_beside(crowd.CROWD), _PAUSES["python"], burst=20),
    Case("file of one", "a run that changes the only file", large.change_one_file(of_many=False), 0.05),
    Case("file of many", "the same among 10,000 files", large.change_one_file(of_many=True), 0.05),
    Case("duplicate", "a copy of 1 GiB in 2,000 files", large.duplicate),
    Case("rollback", "back to 1 GiB in 2,000 files", large.rollback),
    Case("files page", "100 of 10,000 files listed", large.first_page_of_files),
    Case("sessions page", "50 of 100,000 sessions, by a label", large.page_of_sessions),
    Case("session create", "a session made", create),
    Case("health", "HTTP and one read of the database", health),
    Case("http floor", "GET of no such path: HTTP alone", no_such_path),
    Case("commit floor", "a durable commit of SQLite, same disk", commit),
]

RATIOS = [
    Ratio("python warm", "python host", goal=0.5),
    Ratio("node warm", "node host"),
    Ratio("typescript warm", "typescript host"),
    Ratio("python burst", "python host burst"),
    Ratio("node burst", "node host burst"),
    Ratio("typescript burst", "typescript host burst"),
    Ratio("python change", "python host"),
    Ratio("python warm", "python bwrap"),
    Ratio("python first", "python host"),
    Ratio("python first", "python bwrap"),
    Ratio("node first", "node host"),
    Ratio("typescript first", "typescript host"),
    Ratio("crowded", "quiet", goal=3, quantile=0.95),
    Ratio("file of many", "file of one", goal=1.3),
    Ratio("duplicate", "session create"),
    Ratio("rollback", "session create"),
    Ratio("files page", "health"),
    Ratio("sessions page", "health"),
    Ratio("session create", "commit floor"),
    Ratio("python warm", "http floor"),
]

"""Following a run: its output as it comes, its exit code at the end, and Ctrl-C, which asks it to stop."""

from __future__ import annotations

import sys
from collections.abc import Callable

from era.client.output import notice
from era.sdk.events import Gap, Stderr
from era.sdk.sync.runs import RunStream
from era.sdk.sync.sessions import Session

_INTERRUPTED = 130


def follow(session: Session, start: Callable[[], RunStream]) -> int:
    """Print the output of a run that `start` starts or finds; returns its exit code. At Ctrl-C the run is asked to
    stop, and the rest of its output is printed; at the next one it is left."""
    stopped = False
    stream: RunStream | None = None
    while True:
        try:
            if stream is None:
                stream = start()
            for event in stream:
                if isinstance(event, Gap):
                    notice("some output is no longer kept")
                    continue
                output = sys.stderr if isinstance(event, Stderr) else sys.stdout
                output.write(event.content)
                output.flush()
            break
        except KeyboardInterrupt:
            if stopped or stream is None or stream.run_id is None:
                _leave(session)
                return _INTERRUPTED
            notice("asking the run to stop; Ctrl-C once more leaves it")
            stopped = True
            try:
                run = session.runs.run(stream.run_id)
                run.stop()
                stream = run.stream(stream.position)
            except KeyboardInterrupt:
                _leave(session)
                return _INTERRUPTED
    result = stream.result
    for shown in result.results or []:
        text = shown["data"].get("text/plain", f"<{', '.join(shown['data'])}>")
        print(text, flush=True)
    if result.status not in ("ok", "failed") and not stopped:
        notice(f"{result.status} after {result.answer['duration']}")
    for name in ("stdout", "stderr"):
        if result.answer[f"{name}_truncated"]:
            notice(f"{name} is not all there, it was too long")
    if not result.state.committed:
        notice(f"nothing was kept of this run: {result.state.reason}")
    return _INTERRUPTED if stopped else result.exit_code


def _leave(session: Session) -> None:
    if not session.ephemeral:  # that one is deleted now, and its run with it
        notice(f"the run may be going on: `era runs list {session.id}`")

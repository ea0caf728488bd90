"""A Jupyter kernel whose cells run in a context of a session: `python -m era.adapters.jupyter install`.

The kernel is a process beside Jupyter that runs no code of the notebook. It passes each cell to the server, and to
Jupyter what the cell prints and shows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipykernel.kernelapp import IPKernelApp
from ipykernel.kernelbase import Kernel
from IPython.core.inputtransformer2 import TransformerManager
from IPython.utils.tokenutil import line_at_cursor, token_at_cursor
from jupyter_client.kernelspec import KernelSpecManager

from era.common.run_notes import GAP, run_notes
from era.errors import EraError, Expired, NotFound
from era.sdk.events import CellError, ClearOutput, Gap, RunEvent, Shown, Stderr, Stdout
from era.sdk.sync.client import Era
from era.sdk.sync.sessions import Context

if TYPE_CHECKING:
    from era.sdk.options import NewSession

_SESSION, _LANGUAGE, _TIMEOUT = "ERA_JUPYTER_SESSION", "ERA_JUPYTER_LANGUAGE", "ERA_JUPYTER_TIMEOUT"
_ABANDONED_SECONDS = 7 * 24 * 3600
"""After so long without a cell a kernel's own session goes, which one that was killed could not delete."""

_MESSAGES = {"display": "display_data", "update_display": "update_display_data", "result": "execute_result"}
"""Jupyter's messages for what a cell shows."""

_TRACEBACK = re.compile(r"-{20}|Traceback |  Cell |  File |Uncaught ")
"""How tracebacks on stderr begin: IPython's, Python's, those of syntax errors, Node's."""

_QUERY_SECONDS = 10.0
"""How long a query for completions or documentation may take."""

_QUERY = """
shell = get_ipython()
history = shell.history_manager
shell.execution_count -= 1
del history.input_hist_parsed[-1], history.input_hist_raw[-1]
history._i00, history._i, history._ii = history._i, history._ii, history._iii
shell.display_pub.publish({"application/json": query(shell)})
"""
"""Publishes what the function `query` gives, as a cell that leaves no trace in IPython's counter and history."""

_COMPLETE = """
def query(shell):
    text, matches = shell.complete("", LINE, CURSOR)
    return {"text": text, "matches": list(matches)}
"""
_INSPECT = """
def query(shell):
    try:
        found = shell.object_inspect_mime(NAME, LEVEL)
    except KeyError:
        return {}
    return {"text/plain": found["text/plain"]}
"""

_SUFFIXES = {"python": ".py", "node": ".js", "typescript": ".ts"}


class EraKernel(Kernel):  # type: ignore[misc,unused-ignore]  # there may be no ipykernel
    """A kernel that has one context. Its session is a named one, which stays, or one of its own, which ends with it."""

    implementation = "era"
    implementation_version = "1"
    banner = "Cells run in a session of an ERA server."
    language_info: dict[str, Any] = {}  # noqa: RUF012  as the base class has it

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        language = os.environ.get(_LANGUAGE) or "python"
        self.language_info = {"name": language, "file_extension": _SUFFIXES.get(language, ".txt")}
        self._timeout = float(os.environ.get(_TIMEOUT) or 600)
        self._language = language
        # A kernel that Jupyter starts anew has the file and the key of the one before, and so its name, also where that
        # was killed. No other has this key.
        file = f"{platform.node()} {self.parent.connection_file} {self.session.key.hex()}"
        self._name = f"jupyter-{hashlib.sha256(file.encode()).hexdigest()[:12]}"
        self._era = Era()
        self._cells: Context | None = None
        self._is_own = not os.environ.get(_SESSION)
        self._session = os.environ.get(_SESSION) or self._name
        self._history: list[tuple[int, str]] = []
        """The number of each cell, and its code."""

        self._held_notes: list[str] = []
        """Notes on queries, which the next cell shows."""

    async def do_execute(
        self,
        code: str,
        silent: bool,
        store_history: bool = True,
        user_expressions: Any = None,
        allow_stdin: bool = False,
        **_: Any,
    ) -> dict[str, Any]:
        # This blocks the channel of cells, of which one runs at a time. Interrupts come in a thread of their own.
        if store_history and not silent:
            self._history.append((self.execution_count, code))
        try:
            return self._execute(code, silent)
        except EraError as error:
            return self._failed(error.code, f"{error.message} {error.hint}".strip())

    def _execute(self, code: str, silent: bool) -> dict[str, Any]:
        stream = self._context().stream(code, timeout=self._timeout)
        held = ""  # of stderr, where it may be the traceback, which Jupyter shows with the error
        for event in stream:
            if silent:
                continue
            if isinstance(event, Stderr) and (held or _TRACEBACK.match(event.content)):
                held += event.content
                continue
            if isinstance(event, CellError):
                before, _, after = held.rpartition(f"{event.traceback}\n")
                held = before.removesuffix("Uncaught ") + after
            if held:
                self._print("stderr", held)
                held = ""
            self._publish(event)
        if held:
            self._print("stderr", held)
        result = stream.result
        if not silent:
            notes, self._held_notes = [*self._held_notes, *run_notes(result.answer)], []
            for note in notes:
                self._print("stderr", f"{note}\n")
        if result.error:
            error = result.error
            return self._failed(error["name"], error["value"], error["traceback"].splitlines())
        if result.status not in ("ok", "failed"):
            return self._failed(result.status, f"The cell ended as {result.status}, exit code {result.exit_code}.")
        return {"status": "ok", "execution_count": self.execution_count, "payload": [], "user_expressions": {}}

    async def do_is_complete(self, code: str) -> dict[str, Any]:
        """Say whether Python code is a whole cell, as IPython does: the code is parsed here, and not run. Consoles ask
        this to decide whether Enter runs the cell or begins another line."""
        if self._language != "python":
            return {"status": "unknown"}
        transformer: Any = TransformerManager  # IPython has no types for it
        status, indent = transformer().check_complete(code)
        return {"status": status, "indent": " " * (indent or 0)} if status == "incomplete" else {"status": status}

    async def do_complete(self, code: str, cursor_pos: int) -> dict[str, Any]:
        """Complete the name at the cursor, as the context's IPython does. Other languages have no completion."""
        line, offset = line_at_cursor(code, cursor_pos)
        found = self._query(_COMPLETE, LINE=line, CURSOR=cursor_pos - offset)
        return {
            "status": "ok",
            "matches": found.get("matches", []),
            "cursor_start": cursor_pos - len(found.get("text", "")),
            "cursor_end": cursor_pos,
            "metadata": {},
        }

    async def do_inspect(
        self, code: str, cursor_pos: int, detail_level: int = 0, omit_sections: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Describe the object at the cursor, as the context's IPython does. Other languages have no inspection."""
        name = token_at_cursor(code, cursor_pos)
        found = self._query(_INSPECT, NAME=name, LEVEL=detail_level)
        return {"status": "ok", "found": bool(found), "data": found, "metadata": {}}

    def _query(self, query: str, **values: object) -> dict[str, Any]:
        """Run a query in the context, between cells. Empty where it fails or the language isn't Python."""
        if self._language != "python":
            return {}
        code = f"__import__('builtins').exec({query + _QUERY!r}, {values!r})"
        try:
            result = self._context().run(code, timeout=_QUERY_SECONDS, record_code=False)
        except EraError as error:
            self.log.warning("The context was not asked: %s", error.message)
            return {}
        self._held_notes += run_notes(result.answer)
        shown = [shown["data"].get("application/json") for shown in result.results or []]
        return shown[-1] if shown and isinstance(shown[-1], dict) else {}

    async def do_history(
        self,
        hist_access_type: str,
        output: bool,
        raw: bool,
        session: int | None = None,
        start: int | None = None,
        stop: int | None = None,
        n: int | None = None,
        pattern: str | None = None,
        unique: bool = False,
    ) -> dict[str, Any]:
        """List cells since the kernel started, which is session 1: the last, a range of numbers, or a search."""
        found = self._history
        if hist_access_type == "range":
            first, end = start or 0, float("inf") if stop is None else stop
            found = [cell for cell in found if first <= cell[0] < end] if session in (None, 0, 1) else []
        elif hist_access_type == "search":
            found = [cell for cell in found if fnmatchcase(cell[1], pattern or "*")]
            if unique:
                found = sorted({code: (number, code) for number, code in found}.values())
        if hist_access_type != "range" and n is not None:
            found = found[-n:] if n else []
        return {"status": "ok", "history": [(1, number, (code, None) if output else code) for number, code in found]}

    def _publish(self, event: RunEvent) -> None:
        """Send an event of a cell to Jupyter. The error that it ends with is sent with the reply."""
        match event:
            case Gap():
                self._print("stderr", f"{GAP}\n")
            case Stdout() | Stderr():
                self._print("stderr" if isinstance(event, Stderr) else "stdout", event.content)
            case ClearOutput():
                self.send_response(self.iopub_socket, "clear_output", {"wait": event.wait})
            case Shown():
                content: dict[str, Any] = {"data": event.data, "metadata": event.metadata, "transient": {}}
                if event.display_id is not None:
                    content["transient"]["display_id"] = event.display_id
                if event.type == "result":
                    content["execution_count"] = self.execution_count
                self.send_response(self.iopub_socket, _MESSAGES[event.type], content)

    def _print(self, name: str, text: str) -> None:
        self.send_response(self.iopub_socket, "stream", {"name": name, "text": text})

    def _failed(self, name: str, value: str, traceback: Sequence[str] = ()) -> dict[str, Any]:
        content: dict[str, Any] = {"ename": name, "evalue": value, "traceback": list(traceback)}
        self.send_response(self.iopub_socket, "error", content)
        return {"status": "error", "execution_count": self.execution_count, **content}

    def _context(self) -> Context:
        """The kernel's context, made with the first cell. So a server that is away is told where people look."""
        if self._cells is None:
            own: NewSession = {"metadata": {"jupyter": self._name}, "ttl": _ABANDONED_SECONDS}
            options = own if self._is_own else {}
            try:
                session = self._era.sessions.get_or_create(self._language, self._session, **options)
            except Expired:
                if not self._is_own:
                    raise
                session = self._era.session(self._language, self._session, **options)
            with suppress(NotFound):
                session.context(self._name).delete()  # one that was killed could not, and a session has room for few
            self._cells = session.context(self._name)
        return self._cells

    async def interrupt_request(self, stream: Any, ident: Any, parent: Any) -> None:
        """Interrupt the cell under way. This is called in a thread of its own, so it has a client of its own."""
        content: dict[str, Any] = {"status": "ok"}
        try:
            if self._cells is not None:
                with Era() as era:
                    era.sessions.named(self._session).context(self._name).interrupt()
        except EraError as error:
            content = {"status": "error", "ename": error.code, "evalue": error.message, "traceback": []}
        self.session.send(stream, "interrupt_reply", content, parent, ident=ident)

    async def do_shutdown(self, restart: bool) -> dict[str, Any]:
        """End the context, and the session if it is the kernel's own and not started anew, which then finds its files.
        It may have had no cell since it was."""
        try:
            with Era() as era:
                if self._is_own and not restart:
                    era.sessions.delete(self._session, purge=True)
                elif self._cells is not None:
                    era.sessions.named(self._session).context(self._name).delete()
        except NotFound:
            pass
        except EraError as error:
            self.log.warning("The context was not ended: %s", error.message)
        return {"status": "ok", "restart": restart}


def install(arguments: list[str]) -> None:
    """Tell Jupyter of the kernel."""
    parser = argparse.ArgumentParser(
        prog="python -m era.adapters.jupyter install",
        description="Add a kernel to Jupyter whose cells run in a session of the server that ERA_URL names.",
    )
    parser.add_argument("--session", help="the session's id; made if there is none. Without it each kernel has its own")
    parser.add_argument("--language", default="python", choices=sorted(_SUFFIXES))
    parser.add_argument("--timeout", type=float, default=600, help="seconds that a cell may take (600)")
    parser.add_argument("--name", default="era", help="what Jupyter calls the kernel (era)")
    parser.add_argument("--prefix", help="install below this directory, and not for the user")
    given = parser.parse_args(arguments)
    title = f"ERA ({given.session or given.language})"
    specification = {
        "argv": [sys.executable, "-m", "era.adapters.jupyter", "-f", "{connection_file}"],
        "display_name": title,
        "language": given.language,
        "interrupt_mode": "message",
        "env": {_SESSION: given.session or "", _LANGUAGE: given.language, _TIMEOUT: str(given.timeout)},
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.json").write_text(json.dumps(specification, indent=1))
        where = KernelSpecManager().install_kernel_spec(
            folder, given.name, user=given.prefix is None, prefix=given.prefix
        )
    print(f"{title} is a kernel of Jupyter's now: {where}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["install"]:
        install(sys.argv[2:])
    else:
        IPKernelApp.launch_instance(kernel_class=EraKernel)

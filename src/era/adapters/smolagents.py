"""An executor of smolagents that is a context of a session: variables stay from one step of the agent to the next."""

from __future__ import annotations

import shlex
from base64 import b64decode
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any

import PIL.Image
from smolagents import AgentError
from smolagents.local_python_executor import CodeOutput
from smolagents.monitoring import AgentLogger, LogLevel
from smolagents.remote_executors import RemotePythonExecutor

from era.common.run_notes import run_notes
from era.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from era.sdk.answers import RunResult
    from era.sdk.options import CellOptions
    from era.sdk.sync.sessions import Session

_PICTURES = ("image/png", "image/jpeg")
_TEXTS = ("text/html", "image/svg+xml", "text/latex", "text/markdown", "application/json", "text/plain")


class SessionExecutor(RemotePythonExecutor):
    """An executor for `CodeAgent(executor=…)`. Each step of the agent is a cell of one context of a Python session.

    The agent's own objects go in and out as JSON, unless `allow_pickle` is set: then a program in the sandbox decides
    what is unpickled here, which is to run its code.
    """

    def __init__(
        self,
        session: Session,
        additional_imports: Sequence[str] = (),
        *,
        context: str = "smolagents",
        timeout: float | None = None,
        logger: AgentLogger | None = None,
        allow_pickle: bool = False,
    ) -> None:
        """`additional_imports` are packages to install first, `timeout` is in seconds, of each step; None: the
        session's own."""
        super().__init__(list(additional_imports), logger or AgentLogger(level=LogLevel.ERROR), allow_pickle)
        self._context = session.context(context)
        self._timeout = timeout
        self.installed_packages = self.install_packages(list(additional_imports))

    def run_code_raise_errors(self, code: str) -> CodeOutput:
        """Run a step. Raises AgentError with what the model must know where it fails."""
        options: CellOptions = {} if self._timeout is None else {"timeout": self._timeout}
        result = self._context.run(code, **options)
        written = result.stdout + result.stderr if result.error is None else result.stdout
        notes = run_notes(result.answer)
        logs = "\n".join(part for part in (written.rstrip("\n"), *notes) if part) if notes else written
        if result.error is None:
            if result.status != "ok":
                raise AgentError(
                    f"{logs}\nThe step ended as {result.status}, exit code {result.exit_code}.", self.logger
                )
            return CodeOutput(output=_value(result), logs=logs, is_final_answer=False)
        if result.error["name"] == self.FINAL_ANSWER_EXCEPTION:
            answer = self._deserialize_final_answer(result.error["value"], self.allow_pickle)
            return CodeOutput(output=answer, logs=logs, is_final_answer=True)
        raise AgentError(f"{logs}\nExecuting code yielded an error:\n{result.error['traceback']}", self.logger)

    def install_packages(self, additional_imports: list[str]) -> list[str]:
        """Install packages into the session, where they stay. Raises AgentError with what pip says where it fails."""
        if additional_imports:
            done = self.run_code_raise_errors(f"%pip install --quiet {shlex.join(additional_imports)}\n_exit_code")
            if done.output != "0":  # the magic itself raises nothing
                raise AgentError(f"{done.logs}\npip ended with {done.output}.", self.logger)
        return additional_imports

    def cleanup(self) -> None:
        """End the context, if there is one; the session stays."""
        with suppress(NotFound):  # no step was taken, or the session is gone
            self._context.delete()


def _value(result: RunResult) -> Any:
    """The value of a step's last expression, as the agent is shown it."""
    for shown in result.results or []:
        if not shown["main"]:
            continue
        data = shown["data"]
        for kind in _PICTURES:
            if kind in data:
                return PIL.Image.open(BytesIO(b64decode(data[kind])))
        return next((data[kind] for kind in _TEXTS if kind in data), None)
    return None

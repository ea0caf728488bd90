"""The arguments of the tools: their descriptions are what a model reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from era.common.few_errors import FewErrors, TextByName, Texts

SessionId = Annotated[str, Field(description="The session's id, as era_create_session or era_list_sessions gave it.")]
Language = Literal["python", "node", "typescript", "deno", "go", "shell"]
Path = Annotated[str, Field(description="Path below the session's working directory, such as src/app.py.")]


class Arguments(FewErrors):
    """The arguments of a tool. Unknown ones are refused, so that a misspelt one isn't overlooked."""

    model_config = ConfigDict(extra="forbid")


class Called(Arguments):
    """How a program is called."""

    args: Texts = Field(default_factory=list, description="Arguments of the program.")
    stdin: str = Field("", description="Standard input.")
    env: TextByName = Field(default_factory=dict, description="Environment variables of this run only.")
    timeout: float | None = Field(None, gt=0, description="Seconds until it is ended; 30 unless you say otherwise.")


class Once(Called):
    """Code that runs once, in a sandbox of its own."""

    code: str = Field(description="The program.")
    files: TextByName = Field(
        default_factory=dict, description="Text files that lie beside the program: content by path."
    )
    allowInternetAccess: bool = Field(True, description="Whether the program may connect to the internet.")


class OnceInLanguage(Once):
    language: Language


class Command(Arguments):
    command: str = Field(description="A line for `sh -c`.")
    stdin: str = Field("", description="Standard input.")
    env: TextByName = Field(default_factory=dict, description="Environment variables of this run only.")
    timeout: float | None = Field(None, gt=0, description="Seconds until it is ended; 30 unless you say otherwise.")
    session_id: str | None = Field(
        None, description="Run in this session, with its files; left out: once, in a sandbox of its own."
    )
    files: TextByName = Field(
        default_factory=dict, description="Text files for a run without a session: content by path."
    )


class CreateSession(Arguments):
    language: Language = "python"
    session_id: str | None = Field(None, description="An id of your choice; left out: one is made.")
    persistent: bool = Field(True, description="Whether its files stay from run to run; its state always does.")
    data: dict[str, Any] = Field(
        default_factory=dict,
        description="The first state, a JSON object: programs find it in .session_data.json, and may change it.",
    )
    metadata: dict[str, Any] = Field(default_factory=dict, description="Labels to find it by; programs don't see them.")
    setup: dict[str, Any] | None = Field(
        None,
        description="Packages to install once: {'pip': ['numpy'], 'npm': ['lodash'], 'commands': ['…']}.",
    )
    allowInternetAccess: bool = Field(True, description="Whether its programs may connect to the internet.")
    default_timeout: float | None = Field(None, gt=0, description="Seconds that its runs may take.")
    ttl: float | None = Field(None, gt=0, description="Seconds without a call after which it expires; left out: never.")


class RunInSession(Called):
    session_id: SessionId
    code: str | None = Field(
        None, description="The program, in the session's language. Left out, without a command: its stored code."
    )
    command: str | None = Field(None, description="A line for `sh -c`, in place of code.")
    cwd: str = Field("", description="Directory to start in, below the working directory.")
    atomic: bool = Field(False, description="Keep data and files only if the program exits with 0.")
    context: str | None = Field(
        None,
        description="Run the code as a notebook's cell, in the interpreter of this name, such as main: its variables "
        "and imports are there for the next cell. The first cell makes it. Python, Node and TypeScript have them; "
        "not with command, args or atomic.",
    )


class ListSessions(Arguments):
    language: Language | None = Field(None, description="Only sessions of this language.")
    limit: int = Field(20, ge=1, le=100, description="How many, newest first.")
    cursor: str | None = Field(None, description="next_cursor of the page before.")


class OneSession(Arguments):
    session_id: SessionId


class UpdateSession(Arguments):
    session_id: SessionId
    data: dict[str, Any] | None = Field(None, description="Replaces the session's state.")
    metadata: dict[str, Any] | None = Field(None, description="Replaces its labels.")
    default_timeout: float | None = Field(None, gt=0, description="Seconds that its runs may take.")
    allowInternetAccess: bool | None = Field(None, description="Whether its programs may connect to the internet.")
    allowPublicAccess: bool | None = Field(None, description="Whether anybody may call its public URL.")


class UploadFile(Arguments):
    session_id: SessionId
    path: Path
    content: str = Field(description="The file's content, as text or as base64.")
    encoding: Literal["text", "base64"] = "text"


class ReadFile(Arguments):
    session_id: SessionId
    path: Path
    offset: int = Field(0, ge=0, description="Characters of text to leave out at the beginning.")
    limit: int = Field(20_000, ge=1, le=100_000, description="Characters of text to read at most.")


class EditFile(Arguments):
    session_id: SessionId
    path: Path
    old: str = Field(min_length=1, description="The text to replace, exactly as in the file, where it must be once.")
    new: str = Field(description="The text to put in its place; may be empty.")


class StartProcess(Arguments):
    session_id: SessionId
    command: str = Field(description="A line for `sh -c`.")
    cwd: str = Field("", description="Directory to start in, below the working directory.")
    env: TextByName = Field(default_factory=dict, description="Environment variables of this process only.")
    stdin: bool = Field(False, description="Whether era_send_input may write to it; else its standard input is empty.")
    tag: str | None = Field(None, description="A name of your choice, to use in place of the id while it runs.")
    timeout: float | None = Field(None, gt=0, description="Seconds after which the process is ended; left out: never.")


Process = Annotated[str, Field(description="The process's id or tag, as era_start_process gave it.")]


class OneProcess(Arguments):
    session_id: SessionId
    process: Process


class ReadProcess(OneProcess):
    after: int = Field(0, ge=0, description="Bytes of output to leave out: 'after' of the answer before.")
    wait: float = Field(
        1, ge=0, le=60, description="Seconds to wait for more output or the process's end, after all so far was read."
    )


class SendInput(OneProcess):
    input: str = Field("", description="Text to write; end a line with a newline.")
    close: bool = Field(False, description="Whether its standard input ends after this.")


class GetUrl(Arguments):
    session_id: SessionId
    port: int = Field(ge=1, le=65535, description="The port that a program of the session listens on.")

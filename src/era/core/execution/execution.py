"""One program in one sandbox, with its egress and its access to the storage, from its start to its end.

Runs, services, commands of a setup and builds of packages all go by an Execution. Processes and cells, which other
parts start, take their environment from the same Grants. What becomes of the state and the files that a program leaves
is for the caller to decide.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from era.core.execution.transcript import Transcript
from era.core.models import EMPTY, JsonObject, Language, Session, Snapshot, Status
from era.core.ports import Network, Sandbox, StorageAccesses
from era.core.program import CellEvent, Ended, Output, Program
from era.core.secrets import Secret, placeholders
from era.core.trees.allowance import bounded
from era.errors import CommitFailed

OURS = frozenset({"ERA_SESSION", "ERA_SESSION_ID", "ERA_LANGUAGE", "ERA_BASE_URL", "ERA_PROXY_URL", "ERA_STORAGE_URL"})
"""Variables that a caller can't set."""


@dataclass(frozen=True, slots=True)
class Grants:
    """What a program may use besides its sandbox, and the variables that tell it."""

    session_id: str
    """What the program finds as ERA_SESSION_ID."""

    owner: str
    """Who has it run."""

    language: Language
    internet: bool = False
    egress: JsonObject = field(default_factory=dict)
    """The session's setting, which may narrow the internet to an allowlist."""

    storage_owner: str | None = None
    """Whose storage it may use; None for nobody's."""

    base_url: str | None = None
    """This service's, as the request's sender reaches it; None where nobody has sent one."""

    secrets: Sequence[Secret] = ()
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Those of the session's setup, which a program's own override."""

    @classmethod
    def of(cls, session: Session, base_url: str | None = None, secrets: Sequence[Secret] = ()) -> Grants:
        """What the programs of a session may use. Without `base_url` they have no storage either."""
        return cls(
            session.id,
            session.owner,
            session.language,
            session.allow_internet,
            session.egress,
            session.owner if session.storage and base_url is not None else None,
            base_url,
            secrets,
            setup_variables(session.setup),
        )

    def environment(self, own: Mapping[str, str], storage_url: str | None) -> dict[str, str]:
        """A program's environment: `own`, and the service's, which win. Where it may use no storage there is no
        ERA_STORAGE_URL, even if the others have one; `storage_url` is None where that is at `base_url`."""
        env = {
            **self.variables,
            **own,
            **placeholders(self.secrets),
            "ERA_SESSION": "true",
            "ERA_SESSION_ID": self.session_id,
            "ERA_LANGUAGE": self.language,
        }
        env.pop("ERA_STORAGE_URL", None)
        if self.base_url is not None:
            env |= {"ERA_BASE_URL": self.base_url, "ERA_PROXY_URL": f"{self.base_url}/proxy/{self.session_id}"}
            if self.storage_owner is not None:
                env["ERA_STORAGE_URL"] = storage_url or self.base_url
        return env


class Execution:
    """A program, ready to run in a sandbox. `run` may be called once."""

    answer: JsonObject | None = None
    """What only cells answer (live/contexts.py)."""

    def __init__(
        self,
        sandbox: Sandbox,
        program: Program,
        grants: Grants,
        network: Network,
        storage: StorageAccesses | None = None,
        *,
        before: Snapshot = EMPTY,
        access: AbstractAsyncContextManager[Any] | None = None,
    ) -> None:
        """`program` has the variables of its own only. `before` is what the working directory holds already. `access`
        is entered as long as the program runs."""
        self.sandbox = sandbox
        self.state = program.state
        self.egress = network.run_egress(
            sandbox, owner=grants.owner, internet=grants.internet, egress=grants.egress, secrets=grants.secrets
        )
        self.enforced = self.egress.enforced
        """What network it has, for records."""

        reached = None if storage is None else storage.access(sandbox, grants.storage_owner)
        self._accesses = [each or nullcontext() for each in (reached, access)]
        self._before = before
        self.program = replace(
            program,
            env=grants.environment(program.env, None if reached is None else reached.url),
            certificates=self.egress.certificates,
            supervised=self.egress.supervised,
        )

    def report(self) -> JsonObject:
        """Where it connected, once it has ended."""
        return self.egress.report()

    async def run(self, write: Callable[[Output], Awaitable[None]]) -> Ended:
        """Run the program to its end; `write` gets its output as it comes, and is waited for.

        Raises SandboxFailed if the sandbox was found dead before the program began: it has not run then. Whatever else
        is raised, it may have.
        """
        ended: Ended | None = None
        storage, access = self._accesses
        async with self.egress, storage, access:
            async for event in bounded(self.sandbox, self.program, self._before):
                if isinstance(event, Ended):
                    ended = event
                else:
                    await write(event)
        if ended is None:
            # Not SandboxFailed, after which it would be run once more.
            raise CommitFailed("The sandbox did not say how the program ended.")
        return ended


async def keep_output(transcript: Transcript, output: Output | CellEvent) -> None:
    """Keep what a program has written or a cell has shown. Raises CommitFailed where the disk fails."""
    try:
        if isinstance(output, CellEvent):
            await transcript.append_event(output.content)
        else:
            await transcript.append(output)
    except OSError as error:
        raise CommitFailed(f"the output of this run could not be kept: {error.strerror}") from error


def status_of(ended: Ended) -> Status:
    """The status of a run whose program ended so."""
    if ended.cause == "exit":
        return "ok" if ended.exit_code == 0 else "failed"
    return "killed" if ended.cause == "signal" else ended.cause


def setup_variables(setup: str | None) -> dict[str, str]:
    """The environment variables that a stored setup gives to every run."""
    envs: dict[str, str] = json.loads(setup).get("envs", {}) if setup else {}
    return envs

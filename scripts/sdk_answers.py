#!/usr/bin/env python3
"""sdk_answers.py [--check]: make src/era/sdk/generated/views.py of the models in src/era/wire. With --check, only say
whether it is up to date. `make types` calls it.

The SDK has a class for each object that answers and events show. It names the fields and their types for editors and
type checkers. A field that is missing in an answer, or null, is None; a value out of a list is a plain `str`, since a
newer server may know more.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from era.wire import (
    api_keys,
    contexts,
    files,
    inbox,
    processes,
    runs,
    server,
    sessions,
    setup,
    usage,
    versions,
    webhooks,
)

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src/era/sdk/generated/views.py"
HEAD = '''# Made by scripts/sdk_answers.py of the models in src/era/wire: change those, then run `make types`.
"""The fields of answers and events."""

from __future__ import annotations

from typing import Any

from era.sdk.view import View
'''
TYPES = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}


@dataclass(frozen=True)
class ViewClass:
    """A class of the SDK."""

    models: tuple[type[BaseModel], ...]
    """The models whose fields it has. A field that isn't in all of them may be None."""

    doc: str
    always: frozenset[str] = field(default_factory=frozenset)
    """Fields that aren't None where the SDK asks for them, though the server may leave them out."""


def view(doc: str, *models: type[BaseModel], always: str = "") -> ViewClass:
    return ViewClass(models, doc, frozenset(always.split()))


VIEWS = {
    "State": view("What a run did to the session's state.", runs.StateAnswer, runs.RecordedState, always="version"),
    "Artifact": view("A picture, document or table that a run wrote.", runs.ArtifactAnswer),
    "RunFields": view("The fields of a run in a session.", runs.RunAnswer, always="data"),
    "ExecuteFields": view("The fields of a run without a session.", runs.ExecuteAnswer),
    "RunRecord": view(
        "What is kept of a run. What isn't known (yet) is None.\n\n"
        "`code` or `command` is what ran: both are None where `record_code` was false. Lists have the first 200\n"
        "characters of `code`. `code_truncated` says whether anything of `code`, `command` or `args` is missing.",
        runs.RunRecordAnswer,
    ),
    "SessionInfo": view("A session as the server shows it.", sessions.SessionAnswer),
    "FileInfo": view(
        "A file of a session, or a link or directory. `type` is `file`, `link` or `dir`; `link` is a link's target.",
        files.ListedFile,
    ),
    "ProcessInfo": view(
        "A process of a live session. `status` is `running`, `ended` or `lost`; `reason`: why it was ended.",
        processes.ProcessAnswer,
    ),
    "Checkpoint": view(
        "A version that holds the files as they were; the newest version where nothing had changed.",
        processes.CheckpointAnswer,
    ),
    "Ticket": view("A secret that takes the place of a key in the address of one WebSocket.", processes.TicketAnswer),
    "ContextInfo": view(
        "An interpreter that stays. `status` is `busy` while a cell is under way, else `idle`.", contexts.ContextAnswer
    ),
    "StoredCode": view("The code that runs where none is sent.", runs.CodeAnswer),
    "Version": view(
        "One version of a session. `data` is there where a single one was asked for.",
        versions.VersionHeader,
        versions.VersionAnswer,
        always="data",
    ),
    "Diff": view(
        "The changes of a version. `data` has `{path, op, old?, new?}`; `files` has `added`, `changed` and `removed`.",
        versions.DiffAnswer,
    ),
    "InboxInfo": view(
        "The settings of a session's inbox, and how many deliveries it holds by status.", inbox.InboxAnswer
    ),
    "Delivery": view(
        "A delivery to an inbox. `query`, `headers`, `body` are there where a single one was asked for.",
        inbox.DeliveryAnswer,
        inbox.DeliveryContentAnswer,
    ),
    "ApiKey": view(
        "A key of an owner's. `key` itself is there when it has just been made, and never again.",
        api_keys.ApiKeyAnswer,
        api_keys.NewKeyAnswer,
    ),
    "Owner": view("An owner's quotas, and how much is used of each.", api_keys.OwnerAnswer, api_keys.QuotasAnswer),
    "DayOfUsage": view("What an owner has used on a day.", usage.DayAnswer),
    "Webhook": view(
        "A webhook. `secret`, which notices are signed with, is shown once, when it is made.",
        webhooks.WebhookAnswer,
        webhooks.NewWebhookAnswer,
    ),
    "Notice": view("A notice to a webhook: one that waits, was sent or was given up.", webhooks.NoticeAnswer),
    "AuditEntry": view("Something that somebody did.", usage.AuditEntryAnswer),
    "Language": view("A language that the server knows.", server.LanguageAnswer),
    "Stdout": view("Output of the program to standard output.", runs.OutputEvent),
    "Stderr": view("Output of the program to standard error.", runs.OutputEvent),
    "Shown": view(
        "Something that a cell shows. `type` is `display`, `update_display` or `result`: the value of the last\n"
        "expression. `data` has the value by MIME type; what isn't text as Base64.",
        contexts.DisplayEvent,
        contexts.UpdateDisplayEvent,
        contexts.ResultEvent,
    ),
    "ClearOutput": view(
        "The cell takes back all that it has shown and written so far; with `wait` only when something new comes.",
        contexts.ClearOutputEvent,
    ),
    "CellError": view("The error that a cell ends with. Its `traceback` is on stderr, too.", contexts.CellErrorEvent),
    "SetupLine": view("A line that a step of the setup wrote. `stream` is `stdout` or `stderr`.", setup.SetupLineEvent),
    "SetupStatus": view("The setup is `pending` or `running` now.", setup.SetupStatusEvent),
    "SetupDone": view("The setup has ended: `completed` or `failed`.", setup.SetupDoneEvent, always="setup_result"),
    "FileEvent": view(
        "What happened to a file: `type` is `watching`, `create`, `write`, `remove`, `rename`, `chmod`, `overflow` or\n"
        "`gap`.",
        files.WatchingEvent,
        files.FileChangedEvent,
        files.FileRenamedEvent,
        files.OverflowEvent,
    ),
    "ProcessOutputFields": view("The fields of a piece of a process's output.", processes.ProcessOutputEvent),
    "ProcessExit": view("The end of a process.", processes.ExitEvent),
}
NESTED = {model.__name__: name for name in ("State", "Artifact") for model in VIEWS[name].models}
"""Objects within objects that are views, too. All others are dicts."""


def views() -> str:
    """The text of the module, formatted."""
    models = list({model for item in VIEWS.values() for model in item.models})
    _, described = models_json_schema([(model, "serialization") for model in models])
    definitions = described["$defs"]
    text = HEAD + "\n".join(view_class(name, item, definitions) for name, item in VIEWS.items())
    ruff = [Path(sys.executable).parent / "ruff", "format", "--quiet", "--stdin-filename", TARGET, "-"]
    return subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout


def view_class(name: str, item: ViewClass, definitions: dict[str, Any]) -> str:
    """The text of one class."""
    schemas = [definitions[model.__name__] for model in item.models]
    fields = {key: described for schema in schemas for key, described in schema["properties"].items()}
    lines, converted = [f'"""{item.doc}"""\n'], []
    if secrets := [key for model in item.models for key, found in model.model_fields.items() if not found.repr]:
        lines.append(f"_secrets = {tuple(secrets)!r}")
    for key, described in fields.items():
        is_sure = key in item.always or all(key in schema.get("required", ()) for schema in schemas)
        wanted = type_of(described, definitions)
        if converter := conversion(wanted, key):
            converted.append(f"@property\ndef {key}(self) -> {wanted}:\n    return {converter}\n")
        elif key in item.always:
            lines.append(f"{key}: {wanted.removesuffix(' | None')}")
        else:
            lines.append(f"{key}: {wanted}{'' if is_sure or wanted.endswith(' | None') else ' | None'}")
    return f"\n\nclass {name}(View):\n" + indent("\n".join([*lines, "", *converted]), "    ")


def conversion(wanted: str, key: str) -> str | None:
    """The expression that makes views of a field; None for one that is shown as it is."""
    for name in NESTED.values():
        if wanted == name:
            return f'{name}(self.answer["{key}"])'
        if wanted == f"list[{name}]":
            return f'{name}.each(self.answer["{key}"])'
    return None


def type_of(described: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The type of a value in Python, by its JSON Schema."""
    if "$ref" in described:
        name = described["$ref"].rpartition("/")[2]
        return NESTED.get(name) or type_of(definitions[name], definitions)
    if "anyOf" in described:
        found = [type_of(each, definitions) for each in described["anyOf"]]
        return " | ".join(dict.fromkeys([*(each for each in found if each != "None"), *found]))
    match described.get("type"):
        case "array":
            return f"list[{type_of(described['items'], definitions)}]"
        case "object":
            values = [type_of(each, definitions) for each in described.get("properties", {}).values()]
            if isinstance(more := described.get("additionalProperties"), dict):
                values.append(type_of(more, definitions))
            return f"dict[str, {values[0] if len(set(values)) == 1 else 'Any'}]"
        case None:
            return "Any"
        case kind:
            return TYPES[kind]


def main() -> None:
    text = views()
    if "--check" not in sys.argv:
        TARGET.write_text(text)
    elif text != TARGET.read_text():
        sys.exit(f"{TARGET.relative_to(ROOT)} isn't what src/era/wire says: run `make types`")


if __name__ == "__main__":
    main()

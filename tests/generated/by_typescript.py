"""Writes the program that makes the calls with the types that openapi-typescript has made, and openapi-fetch."""

from __future__ import annotations

import json
from typing import Any

_START = """
import createClient from "openapi-fetch";
import type { paths } from "./api.js";

const [address, key] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl: address!, headers: { Authorization: `Bearer ${key}` } });

/** Content as the types have it, who take bytes for text: `fetch` takes it as it is. */
const raw = {
  headers: { "Content-Type": "application/octet-stream" },
  bodySerializer: (body: unknown) => body as BodyInit,
} as const;
const bytes = (content: string): string => Buffer.from(content, "base64") as unknown as string;

function tell(name: string, response: Response, found: unknown): void {
  const typed = found == null ? "NoneType" : typeof found;
  console.log(JSON.stringify([name, response.status, typed, JSON.stringify(found ?? null).slice(0, 300)]));
}
"""


def program(calls: list[dict[str, Any]], operations: dict[str, tuple[str, str, dict[str, Any]]]) -> str:
    """The program. `operations` are method, path and description by name."""
    return "\n".join(
        [_START, *(_call(number, call, *operations[call["operation"]]) for number, call in enumerate(calls))]
    )


def _call(number: int, call: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = {each["name"] for each in operation.get("parameters", []) if each["in"] == "path"}
    given = {
        "path": {name: value for name, value in call["path"].items() if name in parameters},
        "query": call["query"],
    }
    options = [f"params: {_literal({kind: values for kind, values in given.items() if values})}"]
    body = call["body"]
    if isinstance(body, dict) and "bytes" in body:
        content = body["bytes"]
        options.append(f"body: {content[1:] if content.startswith('$') else f'bytes({json.dumps(content)})'}, ...raw")
    elif body is not None:
        options.append(f"body: {_literal(body)}")
    answer = operation["responses"][str(call["status"] or min(operation["responses"]))]
    if "" in call["keep"].values():
        options.append('parseAs: "arrayBuffer"')
    elif not {"application/json"} >= answer["content"].keys():
        options.append('parseAs: "text"')
    lines = [f"const answer{number} = await client.{method}({json.dumps(path)}, {{ {', '.join(options)} }});"]
    lines.append(f'tell("{call["operation"]}", answer{number}.response, answer{number}.data ?? answer{number}.error);')
    for name, where in call["keep"].items():
        lines.append(f"const {name} = {_part(f'answer{number}.data!', where)};")
    return "\n".join(lines)


def _part(answer: str, where: str) -> str:
    """The expression of a part of an answer. Of a link, only its token."""
    if not where:
        return f"Buffer.from({answer} as ArrayBuffer) as unknown as string"
    parts = "".join(f"[{name}]!" if name.isdigit() else f".{name}" for name in where.split("."))
    return f"{answer}{parts}" + (".split('/').at(-1)!" if where == "url" else "")


def _literal(value: Any) -> str:
    """A value as TypeScript, with what was kept in the place of its `$NAME`s."""
    if isinstance(value, str) and value.startswith("$"):
        return value[1:]
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(name)}: {_literal(each)}" for name, each in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(_literal(each) for each in value)}]"
    return json.dumps(value)

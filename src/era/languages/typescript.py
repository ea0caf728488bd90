"""TypeScript, run by Node, which strips and transforms the types itself."""

from __future__ import annotations

from dataclasses import replace

from era.languages import node

LANGUAGE = replace(
    node.LANGUAGE,
    name="typescript",
    title="TypeScript",
    aliases=("ts",),
    endings=(".ts", ".mts"),
    entry="main.ts",
    find=lambda: node.find(
        "--experimental-transform-types", "--disable-warning=ExperimentalWarning", language="typescript"
    ),
)

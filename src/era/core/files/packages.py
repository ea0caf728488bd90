"""Installed packages in a session's tree: kept with its files, but none of them.

Theory of operation. What programs install, with pip or npm, has to last as files do: with the same commit, the same
versions, rollbacks, copies, capsules and limits. So it is part of the tree. But nobody wants to see it in a list of
files, and nobody should have to move it with them. So these entries of a root are packages:

  - PACKAGES, the directory that a sandbox has as its Python prefix. It lies beside the working directory.
  - `node_modules` in the working directory, if npm has made it: programs expect it there. One that a client has put is
    made of files like any other; npm's own list of what it has installed tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PACKAGES = "/packages"
"""The name of the entry in a root's tree object. No file can have it."""

NODE_MODULES = "node_modules"
NPM_LIST = ".package-lock.json"

type _ReadTree = Callable[[str], list[list[Any]]]


def on_disk(name: str) -> str:
    """The path of an entry, relative to the directory that has it."""
    return "../packages" if name == PACKAGES else name


def is_packages(read: _ReadTree, entry: list[Any]) -> bool:
    """Whether an entry of a root is packages."""
    kind, name, content, *_ = entry
    if name == PACKAGES:
        return True
    return kind == "dir" and name == NODE_MODULES and any(map(_is_npm_list, read(content)))


def own_entries(read: _ReadTree, root: str | None) -> list[list[Any]]:
    """The entries of a root that aren't packages."""
    return [entry for entry in read(root) if not is_packages(read, entry)] if root else []


def _is_npm_list(entry: list[Any]) -> bool:
    kind, name, *_ = entry
    return kind == "file" and name == NPM_LIST and len(entry) == 6  # a client's would have a seventh element

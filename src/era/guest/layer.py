"""What programs of the session have installed: the part of the prefix that they can write to (drivers/prefix.py)."""

from __future__ import annotations

import os
import sys

from workspace import empty_directory

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Sequence


class Layer:
    """The directory, as the supervisor and programs see it."""

    def __init__(self, directory: str, parts: Sequence[str], site: str) -> None:
        """`parts` are the directories that it always has, `site` is the path of the one that modules are in."""
        self._directory, self._parts, self._site = directory, parts, site

    def prepare(self) -> None:
        """Make what programs install into, where it isn't there: it has been emptied, or a program has removed it."""
        if os.path.isdir(self._site):
            return
        os.chmod(self._directory, 0o755)
        for name in self._parts:
            try:
                os.makedirs(f"{self._directory}/{name}", exist_ok=True)
            except OSError:
                pass  # a program has made something else of it, and finds that

    def empty(self) -> None:
        empty_directory(self._directory, 0o755)

    def look_anew(self) -> None:
        """Forget what Python remembers of the modules in there, which may be older than they or their directory are."""
        sys.path_importer_cache.pop(self._site, None)

    def act_upon_path_files(self) -> None:
        """Do in this process what Python does with `.pth` files when it starts: it started before they were there."""
        try:
            found = any(name.endswith(".pth") for name in os.listdir(self._site))
        except OSError:
            return
        if found:
            sys.modules["site"].addsitedir(self._site)

"""Where a Python spare waits for its run: as late in the interpreter's start as can be.

Theory of operation
===================

A child of the supervisor returns from the import of `sitecustomize`, and the interpreter goes on with its start: `site`
looks for a `usercustomize`, and Python asks whether `main.py` might be a directory or an archive with modules in it.
What is done by then needn't be done in the run, and memory that it writes to needn't be copied in the run. So the spare
waits no sooner than at that question, which Python puts to `sys.path_hooks`: there is a hook of ours before all others,
which waits, puts the list of hooks back as it was, and knows nothing of `main.py`. Then Python opens the file.

A warm run, alone, takes 0.80 of what it takes where the spare waits in the import of `sitecustomize` (quartiles 0.78 to
0.81; `python -m bench --only quiet --against` that build).

`usercustomize` is a module of the session's packages, if there is one, and thus a part of the program: then the spare
waits before that is run.
"""

from __future__ import annotations

import sys
from _frozen_importlib_external import PathFinder  # importlib.machinery would be more to load

TYPE_CHECKING = False  # as type checkers know it
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import NoReturn


class Waiting:
    """A finder of modules, and a hook for entries of `sys.path`, which Python asks before it runs `main.py`."""

    def __init__(self, path: str, wait: Callable[[], None]) -> None:
        """`path` is absolute. `wait` is called once, and returns when the program shall begin."""
        self._path = path
        self._wait: Callable[[], None] | None = wait
        self._hooks = sys.path_hooks
        self._with_ours = [self._hook, *sys.path_hooks]  # Python borrows it while it goes through: it must stay
        sys.path_hooks = self._with_ours
        sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "usercustomize":
            return None
        spec: ModuleSpec | None = PathFinder.find_spec(name, path, target)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)  # site expects it
        self._finish()
        return spec

    def _hook(self, path: str) -> NoReturn:
        if path == self._path:
            self._finish()
        raise ImportError

    def _finish(self) -> None:
        """Wait, and be gone."""
        wait, self._wait = self._wait, None
        if wait is not None:
            sys.meta_path.remove(self)
            sys.path_hooks = self._hooks
            wait()

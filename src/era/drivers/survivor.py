"""A process that outlives the service for a moment, and kills what the service's bubblewraps leave behind.

bubblewrap is two processes. The first is killed with the service (`--die-with-parent`). The second waits for the first
before it does anything, on an eventfd, which never says that nobody is there any more. If the service is killed in that
millisecond, the second would wait for ever, with all namespaces that have been made. So this process knows the groups
of those that have been started, and learns of the service's end as its pipe is closed.
"""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import IO

# A stop of a whole control group is for the service to carry out: signals that ask for an end are ignored.
_SCRIPT = """
trap '' HUP INT TERM
groups=' '
while read -r sign group; do
  case $sign in
    +) groups="$groups$group " ;;
    -) groups="${groups%% $group *} ${groups#* $group }" ;;
  esac
done
for group in $groups; do
  kill -s KILL -- "-$group"
done
"""


class Survivor:
    """That process, as the service sees it. It is started for the first group."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stdin: IO[bytes] | None = None

    def add(self, group: int) -> None:
        """Have this process group killed when the service ends. Called on the thread that starts sandboxes. Raises
        OSError."""
        if self._process is None:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                bufsize=0,
                start_new_session=True,
            )
            self._stdin = self._process.stdin
        self._tell(f"+ {group}\n")

    def remove(self, group: int) -> None:
        """Nothing is left of a process group that was added; its number may soon be another's. Any thread may call
        this."""
        self._tell(f"- {group}\n")

    def stop(self) -> None:
        """End it. Groups that it has still are killed."""
        self._stdin = None
        if self._process is not None:
            self._process.communicate()

    def _tell(self, line: str) -> None:
        stdin = self._stdin
        if stdin is not None:
            # Somebody has killed it, and what it is for happens once in many kills; or it is being stopped.
            with suppress(BrokenPipeError, ValueError):
                stdin.write(line.encode())

"""What the host sees of a sandbox, by its processes: nothing inside is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod

from era.core.process import HeldFiles
from era.drivers import processes


class OutsideView(ABC):
    """The part of ports.Sandbox that looks at processes."""

    @abstractmethod
    def _processes(self) -> list[int]:
        """pids, on the host, of all processes of the sandbox."""

    def memory_bytes(self) -> int:
        return processes.memory_bytes(self._processes())

    def wants_processor(self) -> bool:
        return processes.want_processor(self._processes())

    def unnamed_bytes(self, device: int) -> int:
        return processes.unnamed_bytes(self._processes(), device)

    def hides_files(self, device: int) -> bool:
        return processes.hide_files(self._processes(), device)

    def held_files(self, device: int) -> HeldFiles | None:
        return processes.held(self._processes(), device)

"""SQL databases of the storage, as the core asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Databases(Protocol):
    """SQL databases by owner and namespace; see store/d1_databases.py."""

    @property
    def total(self) -> int:
        """Bytes of all databases."""
        ...

    @property
    def most_bytes(self) -> int:
        """How large one may be."""
        ...

    def sizes(self, owner: str) -> Mapping[str, int]:
        """Bytes of an owner's databases, by namespace."""
        ...

    async def run(
        self,
        owner: str,
        namespace: str,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] = (),
        *,
        many: bool,
        room: int,
        asker: str = "",
    ) -> dict[str, Any]:
        """Run SQL as one transaction: one statement, or with `many` any number. The database may grow by `room` bytes.
        `asker` is whoever of the owner's asks, in turn with his others.

        Returns `results`, the rows, and `meta`. Raises BadRequest, Forbidden, TooLarge, Unavailable."""
        ...

    async def run_as_json(
        self,
        owner: str,
        namespace: str,
        sql: str,
        params: Sequence[Any] | Mapping[str, Any] = (),
        *,
        many: bool,
        room: int,
        asker: str = "",
    ) -> Sequence[bytes]:
        """Run SQL in the same way, with what `run` returns as JSON in pieces: it may be too much to parse it here."""
        ...

    async def drop(self, owner: str, namespace: str) -> bool:
        """Delete a database; whether there was one."""
        ...

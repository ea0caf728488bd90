"""What only one of the two clients has: in the blocking one, data and files are mappings, and a session is there at
once; with asyncio, `await era.session(…)` makes one, and `async with era.session(…)` does so, too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Generator, Iterator, Mapping, MutableMapping
from typing import Any

from era.errors import NotFound
from era.sdk.answers import FileInfo
from era.sdk.calls import Content

type Opening[T] = T


def opened[T](session: T) -> Opening[T]:
    return session


class AsyncOpening[T]:
    """A session that is about to be made: to be awaited, or entered with `async with`."""

    def __init__(self, session: Awaitable[T]) -> None:
        self._session = session
        self._entered: Any = None

    def __await__(self) -> Generator[Any, None, T]:
        return self._session.__await__()

    async def __aenter__(self) -> T:
        self._entered = await self._session
        entered: T = await self._entered.__aenter__()
        return entered

    async def __aexit__(self, *failure: object) -> None:
        await self._entered.__aexit__(*failure)


def async_opened[T](session: Awaitable[T]) -> AsyncOpening[T]:
    return AsyncOpening(session)


class AsyncDataSugar(ABC):
    """What a mapping has, as calls to be awaited."""

    @abstractmethod
    async def all(self) -> dict[str, Any]: ...

    @abstractmethod
    async def replace(self, data: Mapping[str, Any]) -> None: ...

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or `default`."""
        return (await self.all()).get(key, default)

    async def update(self, data: Mapping[str, Any]) -> None:
        """Set several keys at once. Between the look and the change somebody else's may be lost."""
        await self.replace({**await self.all(), **data})


class DataSugar(MutableMapping[str, Any]):
    """A session's data as a mapping. Each look is a call, and so is each change, which makes a version."""

    @abstractmethod
    def all(self) -> dict[str, Any]: ...

    @abstractmethod
    def replace(self, data: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def set(self, key: str, value: Any) -> None: ...

    @abstractmethod
    def delete(self, key: str) -> None: ...

    def update(self, data: Mapping[str, Any]) -> None:  # type: ignore[override]  # one call, not one for each key
        """Set several keys at once. Between the look and the change somebody else's may be lost."""
        self.replace({**self.all(), **data})

    def __getitem__(self, key: str) -> Any:
        return self.all()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: str) -> None:
        self.delete(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.all())

    def __len__(self) -> int:
        return len(self.all())

    def __repr__(self) -> str:
        return repr(self.all())


class AsyncFilesSugar:
    """`read`, `write`, `remove` and `list` are all there is."""


class FilesSugar(ABC):
    """Files by path: `files["a.txt"]` is bytes, and takes bytes, text, a pathlib.Path or an open file."""

    @abstractmethod
    def read(self, path: str) -> bytes: ...

    @abstractmethod
    def write(self, path: str, content: Content) -> object: ...

    @abstractmethod
    def remove(self, path: str) -> None: ...

    @abstractmethod
    def list(self) -> list[FileInfo]: ...

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    def __getitem__(self, path: str) -> bytes:
        try:
            return self.read(path)
        except NotFound as error:
            raise _missing(path, error) from None

    def __setitem__(self, path: str, content: Content) -> None:
        self.write(path, content)

    def __delitem__(self, path: str) -> None:
        try:
            self.remove(path)
        except NotFound as error:
            raise _missing(path, error) from None

    def __iter__(self) -> Iterator[str]:
        return (file.path for file in self.list())

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and self.exists(path)


def _missing(path: str, error: NotFound) -> Exception:
    """A KeyError where there is no such file; the error itself where there is no such session."""
    return KeyError(path) if error.code == "no_file" else error

"""The class of the objects that answers become."""

from __future__ import annotations

from typing import Any, ClassVar, Self


class View:
    """A JSON object of an answer, its fields as attributes. One that the server left out is None."""

    __slots__ = ("answer",)
    answer: dict[str, Any]
    _secrets: ClassVar[tuple[str, ...]] = ()
    """Fields whose values aren't shown: what is printed while somebody tries things ends in logs and notebooks."""

    def __init__(self, answer: dict[str, Any]) -> None:
        object.__setattr__(self, "answer", answer)

    def __getattr__(self, name: str) -> Any:
        if name in self.answer:
            return self.answer[name]
        if any(name in getattr(cls, "__annotations__", ()) for cls in type(self).__mro__):
            return None
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("what the server answered can't be changed")

    def __reduce__(self) -> tuple[type[Self], tuple[dict[str, Any]]]:
        return type(self), (self.answer,)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.answer == other.answer

    def __hash__(self) -> int:
        return hash((type(self), repr(self.answer)))

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.answer})

    def __repr__(self) -> str:
        shown = (f"{name}={'…' if name in self._secrets else repr(value)}" for name, value in self.answer.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    @classmethod
    def each(cls, answers: list[dict[str, Any]]) -> list[Self]:
        return [cls(answer) for answer in answers]

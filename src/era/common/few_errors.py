"""Models of what comes from outside, of which a check makes few errors however much is wrong.

pydantic looks at everything and makes an error for each thing that doesn't fit, for a value of a union several. A list
of wrong values in a body of 16 MiB makes a million, which takes seconds in which nobody else is answered, and the
answer would list them. So a list is given up at its first wrong item (pydantic's FailFast), of an object no more than
_SHOWN wrong values are looked at, and what still makes many errors makes one that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, BeforeValidator, FailFast, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import PydanticCustomError, PydanticKnownError

MOST_ERRORS = 100
"""Of one model."""

TOO_MANY = "too_many_errors"
"""The type of the error that stands for more than MOST_ERRORS."""

_SHOWN = 10
"""Wrong values, or unknown fields, of one object that are looked at."""


class FewErrors(BaseModel):
    """The base of models of what comes from outside."""

    @model_validator(mode="wrap")
    @classmethod
    def _few(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(cls._with_integers(cls._without_most_unknown(value)))
        except ValidationError as error:
            if error.error_count() <= MOST_ERRORS:
                raise
        raise PydanticCustomError(TOO_MANY, f"More than {MOST_ERRORS} of its values don't fit")

    @classmethod
    def field_names(cls) -> set[str]:
        """Return the names of the fields as clients send them."""
        return {field.alias or name for name, field in cls.model_fields.items()}

    @classmethod
    def _without_most_unknown(cls, value: Any) -> Any:
        """An object with no more than _SHOWN of its unknown fields, which are enough for it to be refused."""
        if not isinstance(value, dict) or len(value) <= MOST_ERRORS:
            return value
        known = cls.field_names()
        unknown = islice((name for name in value if name not in known), _SHOWN)
        return {name: value[name] for name in (*(known & value.keys()), *unknown)}

    @classmethod
    def _with_integers(cls, value: Any) -> Any:
        """Return an object whose floats without a fraction are integers in fields of integers: as in JSON Schema, `3.0`
        is one and `3.5` isn't."""
        if not isinstance(value, dict):
            return value
        changed = {
            name: int(found)
            for name, field in cls.model_fields.items()
            if isinstance(found := value.get(name), float) and found.is_integer() and _is_integer(field.annotation)
        }
        return {**value, **changed} if changed else value


def _is_integer(annotation: Any) -> bool:
    """Return whether a type takes integers and no floats."""
    kinds = {annotation, *(kind for each in get_args(annotation) for kind in (each, *get_args(each)))}
    return int in kinds and float not in kinds


def few_wrong(fits: Callable[[Any], bool]) -> BeforeValidator:
    """What leaves of an object with many wrong values only the first few, which are enough for it to be refused. `fits`
    says quickly whether a value is of a right type."""

    def cut(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        wrong = list(islice((name for name, each in value.items() if not fits(each)), _SHOWN))
        return {name: value[name] for name in wrong} if len(wrong) == _SHOWN else value

    return BeforeValidator(cut)


def at_most(count: int) -> BeforeValidator:
    """What refuses an object or list that has more values than this, in pydantic's words, before any of them is looked
    at. Of an object pydantic itself counts them in the end."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > count:
            kind = "Dictionary" if isinstance(value, dict) else "List"
            raise PydanticKnownError("too_long", {"field_type": kind, "max_length": count, "actual_length": len(value)})
        return value

    return BeforeValidator(check)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


Texts = Annotated[list[str], FailFast()]
TextByName = Annotated[dict[str, str], few_wrong(_is_text)]

"""Requests that don't fit their route: what is wrong with them, in the caller's words, and what was probably meant."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from starlette.datastructures import QueryParams

from era.api.routing.foreign_calls import field_hint
from era.common.few_errors import MOST_ERRORS, TOO_MANY
from era.common.spelling import did_you_mean
from era.errors import BadRequest

ANY_KEY = ".KEY"
"""Ends the documented name of a query parameter that stands for many: `metadata.KEY` for every `metadata.…`."""

_MOST_DETAILS = 20
"""Problems that an answer tells of."""

_NO_OBJECT = ("dict_type", "model_type", "model_attributes_type")
"""What pydantic calls a value that should be an object of JSON."""


def query_names(dependant: Dependant) -> frozenset[str]:
    """The names of all query parameters of a route, those of its dependencies included."""
    below = (query_names(each) for each in dependant.dependencies)
    return frozenset(field.alias for field in dependant.query_params).union(*below)


def check_query(query: QueryParams, known: Collection[str]) -> None:
    """Raises BadRequest for a query parameter that the route doesn't have. Names that begin with `_` are ignored:
    what goes round caches adds such."""
    for name in query:
        if name in known or name.startswith("_"):
            continue
        prefix, dot, _ = name.partition(".")
        if dot and prefix + ANY_KEY in known:
            continue
        listed = f"It takes {', '.join(sorted(known))}." if known else "It takes none."
        message = f"'{name[:80]}' is not a query parameter of this call."
        raise BadRequest(
            message,
            hint=did_you_mean(name, known, listed),
            code="invalid_field",
            details=[{"field": name[:80], "problem": "There is no such query parameter."}],
        )


def invalid(error: RequestValidationError, body: Any = None) -> BadRequest:
    """The error for a request that doesn't fit its model: the first problem in words, the first few in `details`, but
    never a value, which might be a secret of `env`. `body` is the type of the route's body."""
    items = error.errors()
    # A misspelt field comes before all that follows from it, such as the field that is missing for it.
    first = next((item for item in items if item["type"] == "extra_forbidden"), items[0])
    message, hint = _problem(first, body)
    details = [{"field": _field(item, body), "problem": item["msg"]} for item in items[:_MOST_DETAILS]]
    return BadRequest(message, hint=hint, code="invalid_field", details=details)


def body_hint(body: Any) -> str:
    """The hint for a body of this type that isn't JSON."""
    ((_, fields),) = _walk(body, ("",))
    return f"It must be a JSON object, with the fields {', '.join(fields)}. See /docs for what they are."


def _problem(item: dict[str, Any], body: Any) -> tuple[str, str]:
    """The message and the hint for one of pydantic's errors."""
    field = _field(item, body)
    if item["loc"] == ("body",) and item["type"] == "missing":
        return "The body is missing; it must be a JSON object.", "See /docs for the fields of this call."
    if item["type"] == TOO_MANY:
        what = f"'{field}'" if field else "The body"
        return f"{what} has more than {MOST_ERRORS} values that don't fit.", _about(item, body)
    if not field or item["loc"] == ("body",):
        return "The body must be a JSON object.", "Send it with the header 'Content-Type: application/json'."
    if item["type"] == "extra_forbidden":
        *_, (_, known) = _walk(body, item["loc"][1:])
        parent = field.rpartition(".")[0]
        what = f"'{parent}'" if parent else "this call"
        listed = f"Leave it out. The fields of {what} are {', '.join(known)}." if known else "Leave it out."
        name = str(item["loc"][-1])
        belongs = None if parent else field_hint(name, known)
        return f"'{field}' is not a field of {what}.", belongs or did_you_mean(name, known, listed)
    if item["type"] == "missing":
        return f"'{field}' is missing.", _about(item, body)
    problem = "It should be an object" if item["type"] in _NO_OBJECT else item["msg"].removeprefix("Value error, ")
    return f"'{field}' is not valid: {problem}.", _about(item, body)


def _about(item: dict[str, Any], body: Any) -> str:
    """A hint that says what the field is that one of pydantic's errors is about."""
    if item["loc"][0] != "body":
        return "See /docs for the fields of this call."
    *walked, (_, below) = _walk(body, (*item["loc"][1:], ""))
    part, fields = next((each for each in reversed(walked) if each[0]), ("", {}))
    said = []
    if part in fields and (description := fields[part].description):
        said.append(f"'{part}': {description}")
    if item["type"] in _NO_OBJECT and below:
        said.append(f"Its fields are {', '.join(below)}.")
    return " ".join(said) or "See /docs for the fields of this call."


def _field(item: dict[str, Any], body: Any) -> str:
    """The dotted name of the field that one of pydantic's errors is about, as the caller wrote it."""
    where, *parts = item["loc"]
    if where != "body":
        return ".".join(str(part)[:80] for part in parts)
    return ".".join(part for part, _ in _walk(body, parts) if part)


def _walk(annotation: Any, parts: Iterable[Any]) -> Iterator[tuple[str, Mapping[str, FieldInfo]]]:
    """Each part of the place of an error below a type, with the fields that there are at that place, by name.

    Where a field has one of several types, pydantic says in an extra part which of them the error is about; it is empty
    here, since the caller has no such name.
    """
    models, tagged = list(_models(annotation)), False
    for part in parts:
        fields = {field.alias or name: field for model in models for name, field in model.model_fields.items()}
        if tagged:
            # Of a model with a validator around it (few_errors.py) the part has the validator's name.
            models, tagged = [each for each in models if part in (each.__name__, "function-wrap[_few()]")], False
            yield "", {}
            continue
        yield str(part)[:80], fields
        if part in fields:
            annotation = fields[part].annotation
            models, tagged = list(_models(annotation)), _is_one_of_several(annotation)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for each in get_args(annotation):
        yield from _models(each)


def _is_one_of_several(annotation: Any) -> bool:
    """Whether a type is a union of more than one type and None."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    alternatives = [each for each in get_args(annotation) if each is not NoneType]
    return get_origin(annotation) in (Union, UnionType) and len(alternatives) > 1

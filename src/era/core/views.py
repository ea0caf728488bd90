"""A session's data as its clients see it: their own keys, and the fields of stored code where those are free."""

from __future__ import annotations

from era.core import jsontext
from era.core.models import JsonObject, Session, StoredCode, timestamp

_STORED_FIELDS = ("code", "code_description", "code_updated_at")


def _stored_fields(stored: StoredCode | None) -> JsonObject:
    if stored is None:
        return {}
    return dict(zip(_STORED_FIELDS, (stored.code, stored.description, timestamp(stored.updated_at)), strict=True))


def data_view(data: JsonObject, stored: StoredCode | None) -> JsonObject:
    """Add the fields of stored code to a session's data, but for those that the data has as keys of its own."""
    return data | {name: value for name, value in _stored_fields(stored).items() if name not in data}


def certainly_own(data: JsonObject) -> JsonObject:
    """Return the part of a client's data that `without_view` keeps whatever the session holds."""
    return {key: value for key, value in data.items() if key not in _STORED_FIELDS or not isinstance(value, str)}


async def without_view(data: JsonObject, session: Session) -> JsonObject:
    """Drop what `data_view` had added to data that a client sends back.

    A field is dropped where it is as the view shows it, and the session's data has no such key.
    """
    shown = {key for key, value in _stored_fields(session.stored).items() if key in data and data[key] == value}
    if shown:
        shown.difference_update(await jsontext.stored(session.data))
    return {key: value for key, value in data.items() if key not in shown}

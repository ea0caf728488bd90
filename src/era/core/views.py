"""How a session's data looks to its clients."""

from __future__ import annotations

from era.core.models import JsonObject, StoredCode, timestamp

_STORED_FIELDS = ("code", "code_description", "code_updated_at")


def stored_fields(stored: StoredCode | None) -> JsonObject:
    """The fields that stored code adds to the data that clients see. Programs don't see them."""
    if stored is None:
        return {}
    return dict(zip(_STORED_FIELDS, (stored.code, stored.description, timestamp(stored.updated_at)), strict=True))


def data_view(data: JsonObject, stored: StoredCode | None) -> JsonObject:
    """`data` as clients see it: with the fields of the stored code."""
    return {**data, **stored_fields(stored)}


def certainly_own(data: JsonObject) -> JsonObject:
    """Of data that a client sends, what is left `without_view` whatever the session's stored code is."""
    return {key: value for key, value in data.items() if key not in _STORED_FIELDS or not isinstance(value, str)}


def without_view(data: JsonObject, stored: StoredCode | None) -> JsonObject:
    """The reverse of `data_view`, for data that a client sends back: fields that it added and the client did not change
    are taken away."""
    added = stored_fields(stored)
    return {key: value for key, value in data.items() if key not in added or added[key] != value}

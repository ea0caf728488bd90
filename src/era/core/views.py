"""How a session's data looks to its clients."""

from __future__ import annotations

from era.core.models import JsonObject, StoredCode, timestamp


def stored_fields(stored: StoredCode | None) -> JsonObject:
    """The fields that stored code adds to the data that clients see. Programs don't see them."""
    if stored is None:
        return {}
    return {
        "code": stored.code,
        "code_description": stored.description,
        "code_updated_at": timestamp(stored.updated_at),
    }


def data_view(data: JsonObject, stored: StoredCode | None) -> JsonObject:
    """`data` as clients see it: with the fields of the stored code."""
    return {**data, **stored_fields(stored)}


def without_view(data: JsonObject, stored: StoredCode | None) -> JsonObject:
    """The reverse of `data_view`, for data that a client sends back: fields that it added and the client did not change
    are taken away."""
    added = stored_fields(stored)
    return {key: value for key, value in data.items() if key not in added or added[key] != value}

"""How a session's data looks to its clients."""

from __future__ import annotations

from era.core.models import JsonObject, StoredCode, timestamp


def stored_fields(stored: StoredCode | None) -> JsonObject:
    """What stored code adds to the data that clients see. Programs don't see it."""
    if stored is None:
        return {}
    return {
        "code": stored.code,
        "code_description": stored.description,
        "code_updated_at": timestamp(stored.updated_at),
    }


def data_view(data: JsonObject, stored: StoredCode | None) -> JsonObject:
    """`data` with the stored code."""
    return {**data, **stored_fields(stored)}


def without_view(data: JsonObject, stored: StoredCode | None) -> JsonObject:
    """`data` as a client sends it back after it has read it: what `data_view` had added is taken away again."""
    added = stored_fields(stored)
    return {key: value for key, value in data.items() if key not in added or added[key] != value}

"""Sessions: creating, changing, expiry, versions, idempotency keys."""

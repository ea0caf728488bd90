"""What routes share: services, ids and cursors, checked bodies, event streams, scopes."""

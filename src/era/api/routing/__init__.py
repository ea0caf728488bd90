"""Code shared by all routes: services, ids and cursors, checked bodies, event streams, scopes."""

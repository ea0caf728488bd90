"""The HTTP API. A route parses the request, makes one call of the core, and answers."""

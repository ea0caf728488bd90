"""Small modules that the client, the MCP server and the HTTP server share."""

"""Tools and resources for models, over the Model Context Protocol: the same behind /mcp and in `era mcp`."""

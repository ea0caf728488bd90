"""Installing packages: uv, npm and go fetch and unpack them on the host, and their own code runs in sandboxes only."""

"""The network of sandboxes: what programs may reach, and how their connections are made."""

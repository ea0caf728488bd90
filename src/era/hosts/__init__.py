"""Hosts own live sandboxes."""

"""Drivers make sandboxes."""

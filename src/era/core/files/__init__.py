"""Trees of files: looked at, made durable, changed, packed and unpacked."""

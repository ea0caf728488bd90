"""Content-addressed trees of files: scanned, restored, edited, compared, packed and unpacked."""

"""Trees of files: scanned, stored as snapshots, restored, edited, compared, packed into archives and unpacked."""

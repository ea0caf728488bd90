"""Content of files: on disk or in S3, marked and removed when no row names it."""

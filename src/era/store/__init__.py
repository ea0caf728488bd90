"""What outlives the process: rows (`metadata`) and content (`blobs`)."""

"""What outlives the process: rows (`metadata`), blobs (`blobs`, `s3_blobs`), databases (`d1_databases`)."""

"""KV, SQL databases and blobs of an owner."""

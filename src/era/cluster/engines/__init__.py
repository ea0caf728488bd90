"""What a cluster for trying needs besides its hosts, as children of whoever starts them: PostgreSQL, S3, Ray."""

"""Programs' SQL databases: a worker process for each, a replica for each host."""

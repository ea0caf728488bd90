"""Work of the service itself: removing blobs that no row names, readiness."""

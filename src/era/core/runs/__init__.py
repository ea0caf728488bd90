"""A run from the request to the commit, and the history of runs."""

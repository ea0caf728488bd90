"""Calls passed on between the hosts of a cluster: where a session is, the other hosts, signed requests."""

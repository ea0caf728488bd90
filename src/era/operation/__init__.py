"""Backing up, restoring and checking data directories, from outside the service that uses them."""

"""API keys, quotas, usage, audit and webhooks of owners."""

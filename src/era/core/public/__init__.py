"""What answers a session's public URL: a live server, its stored code, or its inbox."""

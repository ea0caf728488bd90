"""What answers a session's public URL: live servers, stored code, the inbox."""

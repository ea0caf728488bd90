"""Packages for sessions: fetched and unpacked on the host by uv and npm, none of their code run."""

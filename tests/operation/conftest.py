"""An S3 server, and backups that were taken under load."""

from __future__ import annotations

from tests.hostile.conftest import strace
from tests.store.s3 import bucket, s3

__all__ = ["bucket", "s3", "strace"]

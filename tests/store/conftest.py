from tests.store.s3 import bucket, faulty, s3

__all__ = ["bucket", "faulty", "s3"]

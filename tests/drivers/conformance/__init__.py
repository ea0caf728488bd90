"""One suite for all drivers: how a sandbox behaves, whatever makes it.

Where a driver is known to fall short stands in conftest.KNOWN, with the reason. Such a test must fail: one that passes
after all is an error, so that the table stays true.
"""

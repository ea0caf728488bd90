"""Runs test modules of Python's own test suite, and tells how each test went. It is run as a program, in a session and
outside: `cpython.py MODULE…` writes JSON, the outcome of each test by its name."""

import contextlib
import io
import json
import sys
import unittest
from typing import override


class Outcomes(unittest.TestResult):
    """Remembers how each test went: `ok`, `skipped`, or the end of what is said about its failure."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, str] = {}

    @override
    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.of.setdefault(test.id(), "ok")

    @override
    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.of[test.id()] = "skipped"

    @override
    def addError(self, test: unittest.TestCase, err: object) -> None:
        self._failed(test, err)

    @override
    def addFailure(self, test: unittest.TestCase, err: object) -> None:
        self._failed(test, err)

    @override
    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: object) -> None:
        if err is not None:
            self._failed(test, err)

    def _failed(self, test: unittest.TestCase, err: object) -> None:
        self.of[test.id()] = f"failed: {err[1]!r}"[:300]  # type: ignore[index]  # it is what sys.exc_info() returns


if __name__ == "__main__":
    from test import support  # type: ignore[import-not-found]  # type checkers don't know of it

    support.use_resources = []  # neither the internet nor gigabytes
    kept, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
    outcomes = Outcomes()
    with contextlib.suppress(unittest.SkipTest):  # a module that isn't for this machine has no tests
        unittest.defaultTestLoader.loadTestsFromNames([f"test.{name}" for name in sys.argv[1:]]).run(outcomes)
    print(json.dumps(outcomes.of), file=kept)

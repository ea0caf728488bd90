"""Tests of many small cases on one server: a table in one test, which pays for its fixtures once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any


def table(names: str, rows: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test once for each row, as `pytest.mark.parametrize` does, but within one test.

    Args:
        names: The test's arguments that a row gives, separated by commas.
        rows: A value for each row, or a tuple where there are several names. Of a mapping its keys are the rows.
    """
    arguments = [name.strip() for name in names.split(",")]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run_rows(**fixtures: Any) -> None:
            for row in rows:
                values = (row,) if len(arguments) == 1 else row
                try:
                    test(**fixtures, **dict(zip(arguments, values, strict=True)))
                except BaseException as error:
                    error.add_note(f"in the row {row!r:.300}")
                    raise

        signature = inspect.signature(test)
        rest = [each for name, each in signature.parameters.items() if name not in arguments]
        run_rows.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]  # what pytest reads
        return run_rows

    return decorate

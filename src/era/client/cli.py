"""The entry point of the `era` command."""

from __future__ import annotations

# The builtin that `signal` is made of: `signal` itself takes milliseconds, in which Ctrl-C would show a traceback.
import _signal  # type: ignore[import-not-found]  # it is private, and has no types

# Until there is something to clean up, Ctrl-C ends the process at once, without a traceback of what it was importing.
_signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import sys  # noqa: E402  after the line above

import era  # noqa: E402  the same


def main() -> None:
    """Run the command in sys.argv and exit: with its code, with 2 and a message if it can't be done, 130 on Ctrl-C."""
    if sys.argv[1:] == ["--version"]:  # needs none of the imports below, which take longer than all else
        print(era.__version__)
        return
    import signal

    from era.client.commands import app
    from era.client.failure import Failure
    from era.errors import EraError

    code, problem = 2, ""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = app(result_action="return_value") or 0
    except Failure as failure:
        problem = f"era: {failure}"
    except EraError as error:
        problem = f"era: {error.message}\n     {error.hint}".rstrip()
    except KeyboardInterrupt:
        code = 130
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a server has one of its own by now
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if problem:
        print(problem, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

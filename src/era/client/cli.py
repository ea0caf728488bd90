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
    words = sys.argv[1:]
    if words == ["--version"]:  # needs none of the imports below, which take longer than all else
        print(era.__version__)
        return
    import signal

    from era.client.failure import Failure, told
    from era.client.grammar import carry_out
    from era.errors import EraError

    code, problem = 2, ""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = carry_out(words)
    except (Failure, EraError) as error:
        problem = told(error, as_json="--json" in words)
    except KeyboardInterrupt:
        code = 130
    except UnicodeEncodeError:
        problem = "era: a word isn't UTF-8"
    except BrokenPipeError:  # whoever read our output has enough
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would say so once more
        code = 128 + signal.SIGPIPE
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a server has one of its own by now
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if problem:
        print(problem, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

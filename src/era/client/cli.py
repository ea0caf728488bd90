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

    from era.client.grammar import carry_out
    from era.client.output import Failure, told
    from era.errors import EraError

    code, problem = 2, ""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = carry_out(words)
        sys.stdout.flush()
    except (Failure, EraError) as error:
        problem = told(error, as_json="--json" in words)
    except KeyboardInterrupt:
        code = 130
    except UnicodeEncodeError:
        problem = "era: a word isn't UTF-8"
    except BrokenPipeError:  # whoever read our output has enough
        _drop_output()
        code = 128 + signal.SIGPIPE
    except OSError as error:  # of other files it is told where they are written
        import errno

        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        _drop_output()
        problem = told(Failure(f"standard output can't be written: {error.strerror}"), as_json="--json" in words)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a server has one of its own by now
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if problem:
        print(problem, file=sys.stderr)
    sys.exit(code)


def _drop_output() -> None:
    """Have the interpreter not write what it couldn't once more, and say so, when it ends."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()

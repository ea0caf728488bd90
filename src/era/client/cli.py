"""The entry point of the `era` command."""

from __future__ import annotations

import sys

import era


def main() -> None:
    """Run the command in sys.argv and exit: with its code, with 2 and a message if it can't be done, 130 on Ctrl-C."""
    if sys.argv[1:] == ["--version"]:  # needs none of the imports below, which take longer than all else
        print(era.__version__)
        return
    from era.client.commands import app
    from era.client.failure import Failure
    from era.errors import EraError

    try:
        sys.exit(app(result_action="return_value"))
    except Failure as failure:
        print(f"era: {failure}", file=sys.stderr)
        sys.exit(2)
    except EraError as error:
        print(f"era: {error.message}\n     {error.hint}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

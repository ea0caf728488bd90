"""ERA runs untrusted code in sessions that remember.

`from era import Era` gets the client; docs/sdk-python.md explains it. What is imported from here is loaded when it is
asked for, so that `import era` costs nothing.
"""

TYPE_CHECKING = False  # for type checkers this name is always true; importing it from typing would cost milliseconds

if TYPE_CHECKING:
    from era.errors import BadRequest as BadRequest
    from era.errors import Conflict as Conflict
    from era.errors import EraError as EraError
    from era.errors import Expired as Expired
    from era.errors import Forbidden as Forbidden
    from era.errors import NotFound as NotFound
    from era.errors import TooBusy as TooBusy
    from era.errors import TooLarge as TooLarge
    from era.errors import TooManyWaiting as TooManyWaiting
    from era.errors import Unauthorized as Unauthorized
    from era.errors import Unavailable as Unavailable
    from era.sdk.aio.client import AsyncEra as AsyncEra
    from era.sdk.aio.sessions import AsyncSession as AsyncSession
    from era.sdk.answers import ExecuteResult as ExecuteResult
    from era.sdk.answers import RunFailed as RunFailed
    from era.sdk.answers import RunResult as RunResult
    from era.sdk.errors import AnswerTimeout as AnswerTimeout
    from era.sdk.errors import ConnectionLost as ConnectionLost
    from era.sdk.errors import LocalError as LocalError
    from era.sdk.errors import NotEra as NotEra
    from era.sdk.errors import ServerAway as ServerAway
    from era.sdk.sync.client import Era as Era
    from era.sdk.sync.sessions import Session as Session

    __version__: str
else:
    _MODULES = {
        "era.errors": "BadRequest Conflict EraError Expired Forbidden NotFound TooBusy TooLarge TooManyWaiting "
        "Unauthorized Unavailable",
        "era.sdk.aio.client": "AsyncEra",
        "era.sdk.aio.sessions": "AsyncSession",
        "era.sdk.answers": "ExecuteResult RunFailed RunResult",
        "era.sdk.errors": "AnswerTimeout ConnectionLost LocalError NotEra ServerAway",
        "era.sdk.sync.client": "Era",
        "era.sdk.sync.sessions": "Session",
    }
    _NAMES = {name: module for module, names in _MODULES.items() for name in names.split()}
    """What `from era import …` gives, and the module that has it. It is imported when it is asked for."""

    def __getattr__(name: str) -> object:
        if name == "__version__":
            found = _installed_version()
        elif name in _NAMES:
            from importlib import import_module

            found = getattr(import_module(_NAMES[name]), name)
        else:
            raise AttributeError(f"module 'era' has no attribute {name!r}")
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), "__version__", *_NAMES})

    def _installed_version() -> str:
        """The version that the name of the distribution's directory tells. importlib.metadata looks there, too, but it
        takes 70 ms to load, which would be most of what `era --version` takes."""
        import os
        import sys

        for place in sys.path:
            try:
                names = os.listdir(place or ".")
            except OSError:
                continue
            for name in names:
                if name.startswith("era_sessions-") and name.endswith(".dist-info"):
                    return name.removeprefix("era_sessions-").removesuffix(".dist-info")
        from importlib.metadata import version

        return version("era-sessions")

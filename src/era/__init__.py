"""ERA runs untrusted code in sessions that remember."""

TYPE_CHECKING = False  # for type checkers this name is always true; importing it from typing would cost milliseconds

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Read `__version__` from the installed distribution when it is first used."""
        if name != "__version__":
            raise AttributeError(f"module 'era' has no attribute {name!r}")
        globals()["__version__"] = found = _installed_version()
        return found

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

"""ERA runs untrusted code in sessions that remember."""

TYPE_CHECKING = False  # for type checkers this name is always true; importing it from typing would cost milliseconds

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """Read `__version__` from the installed distribution when it is first used: importlib.metadata loads slowly."""
        if name != "__version__":
            raise AttributeError(f"module 'era' has no attribute {name!r}")
        from importlib.metadata import version

        globals()["__version__"] = found = version("era-sessions")
        return found

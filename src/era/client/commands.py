"""The tree of commands. What a command needs is imported when it runs, so that `era --help` is there at once."""

from __future__ import annotations

from cyclopts import App

import era
from era.client.capsules import export, import_
from era.client.keys import keys
from era.client.mcp import mcp
from era.client.run import run
from era.client.serve import doctor, serve
from era.client.sync import pull, push

app = App(
    name="era",
    help_format="plaintext",
    version=lambda: era.__version__,
    help="Run untrusted code in sessions that remember.\n\nStart a server with 'era serve', then 'era run hello.py'.",
)
for command in (serve, doctor, run, export, push, pull, mcp):
    app.command(command)
app.command(import_, name="import")
app.command(keys)

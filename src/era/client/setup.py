"""`era setup`: the installing of a session's packages."""

from __future__ import annotations

import sys
from typing import Any

from era.client.command import SESSION, Command, argument
from era.client.output import notice, print_json, table
from era.client.servers import connect
from era.sdk.events import SetupDone, SetupLine


def setup(named: Any) -> int:
    with connect(named) as era:
        session = era.sessions.named(named.session)
        if named.packages:
            found = session.packages()
            if named.json:
                print_json(found)
            else:
                kinds = ("pip", "npm", "go")
                table(("kind", "name", "version"), [(k, p["name"], p["version"]) for k in kinds for p in found[k]])
            return 0
        if named.again:
            session.set_up_again()
        for event in session.setup():
            if isinstance(event, SetupLine) and not named.json:
                print(event.text, file=sys.stderr if event.stream == "stderr" else sys.stdout, flush=True)
            elif isinstance(event, SetupDone):
                if named.json:
                    fields = dict(event.answer)
                    del fields["type"]
                    print_json(fields)
                elif event.setup_status != "completed":
                    notice(f"setup {event.setup_status}: {event.setup_result.get('error')}")
                return 0 if event.setup_status == "completed" else 1
    return 1


COMMANDS = {
    "setup": Command(
        "Follow the installing of a session's packages; leaves with 0 if it succeeds.",
        setup,
        ["era setup app", "era setup app --again", "era setup app --packages"],
        [
            SESSION,
            argument("--again", action="store_true", help="install them once more"),
            argument("--packages", action="store_true", help="list what is installed"),
        ],
    )
}

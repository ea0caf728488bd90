"""`era inbox`: a session's inbox and what was delivered to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from era.client.command import LIMIT_20, SESSION, Command, Group, argument, calls, lists, on_session
from era.client.failure import Failure
from era.client.output import pairs

if TYPE_CHECKING:
    from era.sdk.answers import InboxInfo
    from era.sdk.sync.sessions import Session

_DELIVERY = (SESSION, argument("delivery", metavar="DELIVERY"))


def _set(session: Session, named: Any) -> InboxInfo:
    verify = None
    if named.scheme or named.secret:
        if not (named.scheme and named.secret):
            raise Failure("--scheme and --secret belong together.")
        if named.secret not in os.environ:
            raise Failure(f"--secret names a variable, and there is no variable {named.secret} here.")
        verify = {"scheme": named.scheme, "secret": os.environ[named.secret]}
        if named.header:
            verify["header"] = named.header
    return session.inbox.set(verify=verify, retries=named.retries)


def _show(found: Any) -> None:
    pairs(found.answer)


COMMANDS = {
    "inbox": Group(
        "Webhooks that are stored first, then run in order.",
        {
            "show": Command(
                "Show a session's inbox.",
                calls(on_session(lambda session, _: session.inbox.get()), _show),
                ["era inbox show app"],
                [SESSION],
            ),
            "set": Command(
                "Give a session an inbox, or change it.",
                calls(on_session(_set), _show),
                ["era inbox set app --scheme github --secret HOOK_SECRET"],
                [
                    SESSION,
                    argument("--retries", type=int, metavar="N", help="how often one that failed is tried again"),
                    argument("--scheme", choices=("github", "stripe", "hmac"), help="how deliveries are signed"),
                    argument("--secret", metavar="VARIABLE", help="the variable here that has the secret"),
                    argument("--header", help="the header that has the signature"),
                ],
            ),
            "delete": Command(
                "Remove an inbox with all its deliveries.",
                calls(on_session(lambda session, _: {"success": True, "deleted_deliveries": session.inbox.delete()})),
                ["era inbox delete app"],
                [SESSION],
            ),
            "list": Command(
                "List deliveries, newest first.",
                lists(
                    on_session(lambda session, named: session.inbox.deliveries(named.status, named.limit)),
                    "deliveries",
                    {
                        "delivery": "id",
                        "received": "received_at",
                        "status": "status",
                        "attempts": "attempts",
                        "request": lambda delivery: f"{delivery.method} {delivery.path}",
                    },
                ),
                ["era inbox list app --status failed"],
                [SESSION, argument("--status", choices=("pending", "running", "done", "failed")), LIMIT_20],
            ),
            "delivery": Command(
                "Show a delivery with its request.",
                calls(on_session(lambda session, named: session.inbox.delivery(named.delivery)), _show),
                ["era inbox delivery app dlv_…"],
                _DELIVERY,
            ),
            "replay": Command(
                "Run a delivery once more.",
                calls(on_session(lambda session, named: session.inbox.replay(named.delivery)), _show),
                ["era inbox replay app dlv_…"],
                _DELIVERY,
            ),
        },
    )
}

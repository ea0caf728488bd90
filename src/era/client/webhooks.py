"""`era inbox` and `era webhooks`: what is delivered to a session, and where the server tells of what happens."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from era.client.command import LIMIT_20, SESSION, Command, Group, argument, calls, does, lists, on_session
from era.client.output import Failure, notice, pairs

if TYPE_CHECKING:
    from era.sdk.answers import InboxInfo, Webhook
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


_WEBHOOK = argument("webhook", metavar="WEBHOOK_ID")


def _show_new(webhook: Webhook) -> None:
    notice(f"{webhook.id} is made. Its notices are signed with this secret, which is not shown again:")
    print(webhook.secret)


COMMANDS = {
    "inbox": Group(
        "Webhooks that are stored first, then run in order.",
        {
            "get": Command(
                "Show a session's inbox.",
                calls(on_session(lambda session, _: session.inbox.get()), _show),
                ["era inbox get app"],
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
    ),
    "webhooks": Group(
        "Have a server tell what happens to your sessions: create, list and delete webhooks.",
        {
            "create": Command(
                "Have events POSTed to URL, and print the secret that they are signed with. It is not shown again.",
                calls(lambda era, named: era.webhooks.create(named.url, named.event, named.description), _show_new),
                [
                    "era webhooks create https://example.com/era",
                    "era webhooks create https://example.com/era --event run.ended --event quota.reached",
                ],
                [
                    argument("url", metavar="URL"),
                    argument(
                        "--event",
                        action="append",
                        metavar="EVENT",
                        help="session.created, session.expired, run.ended or quota.reached; may be given again; "
                        "all without it",
                    ),
                    argument("--description", default="", help="what it is for"),
                ],
                summary="create a webhook",
            ),
            "list": Command(
                "List your webhooks: id, URL, events, how many notices wait.",
                lists(
                    lambda era, _: era.webhooks.list(),
                    "webhooks",
                    {
                        "id": "id",
                        "url": "url",
                        "events": lambda webhook: ",".join(webhook.events),
                        "waiting": "pending",
                        "failed": "failed",
                        "description": "description",
                    },
                ),
                ["era webhooks list"],
                summary="list your webhooks",
            ),
            "deliveries": Command(
                "List the notices that wait, and those that were sent last or given up.",
                lists(
                    lambda era, named: era.webhooks.deliveries(named.webhook),
                    "deliveries",
                    {
                        "id": "id",
                        "event": "event",
                        "status": "status",
                        "tries": "tries",
                        "created": "created_at",
                        "http": "http_status",
                        "reason": "reason",
                    },
                ),
                ["era webhooks deliveries wh_…"],
                [_WEBHOOK],
                summary="list what was sent to a webhook",
            ),
            "replay": Command(
                "Send a notice once more that was sent or given up, after those that wait; one that waits skips its "
                "delay.",
                calls(
                    lambda era, named: era.webhooks.replay(named.webhook, named.delivery),
                    lambda again: notice(f"{again.id} is sent once more."),
                ),
                ["era webhooks replay wh_… evt_…"],
                [_WEBHOOK, argument("delivery", metavar="DELIVERY_ID")],
                summary="send a notice once more",
            ),
            "delete": Command(
                "Delete a webhook, with the notices that wait for it.",
                does(lambda era, named: era.webhooks.delete(named.webhook), id="webhook"),
                ["era webhooks delete wh_…"],
                [_WEBHOOK],
                summary="delete a webhook",
            ),
        },
    ),
}

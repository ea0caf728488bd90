"""`era webhooks`: where the server tells of what happens to sessions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from era.client.command import Command, Group, argument, calls, does, lists
from era.client.output import notice

if TYPE_CHECKING:
    from era.sdk.answers import Webhook

_WEBHOOK = argument("webhook", metavar="WEBHOOK_ID")


def _show_new(webhook: Webhook) -> None:
    notice(f"{webhook.id} is made. Its notices are signed with this secret, which is not shown again:")
    print(webhook.secret)


COMMANDS = {
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
    )
}

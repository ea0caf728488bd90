"""`era webhooks`: where the server tells of what happens to sessions."""

from __future__ import annotations

from typing import Any

from era.client.grammar import Parser
from era.client.output import notice, print_json, table
from era.client.servers import connect


def add(parser: Parser) -> None:
    command = parser.group("Have a server tell what happens to your sessions: create, list and delete webhooks.")
    each = command("create", "create a webhook")
    each.describe(
        create,
        "Have events POSTed to URL, and print the secret that they are signed with. It is not shown again.",
        (
            "era webhooks create https://example.com/era",
            "era webhooks create https://example.com/era --event run.ended --event quota.reached",
        ),
    )
    each.add_argument("url", metavar="URL")
    each.add_argument(
        "--event",
        action="append",
        metavar="EVENT",
        help="session.created, session.expired, run.ended or quota.reached; may be given again; all without it",
    )
    each.add_argument("--description", default="", help="what it is for")
    each = command("list", "list your webhooks")
    each.describe(list_, "List your webhooks: id, URL, events, how many notices wait.", ("era webhooks list",))
    each = command("deliveries", "list what was sent to a webhook")
    each.describe(
        deliveries,
        "List the notices that wait, and those that were sent last or given up.",
        ("era webhooks deliveries wh_…",),
    )
    each.add_argument("webhook", metavar="WEBHOOK_ID")
    each = command("replay", "send a notice once more")
    each.describe(
        replay,
        "Send a notice once more that was sent or given up, after those that wait; one that waits skips its delay.",
        ("era webhooks replay wh_… evt_…",),
    )
    each.add_argument("webhook", metavar="WEBHOOK_ID")
    each.add_argument("delivery", metavar="DELIVERY_ID")
    each = command("delete", "delete a webhook")
    each.describe(delete, "Delete a webhook, with the notices that wait for it.", ("era webhooks delete wh_…",))
    each.add_argument("webhook", metavar="WEBHOOK_ID")


def create(named: Any) -> None:
    with connect(named) as era:
        webhook = era.webhooks.create(named.url, named.event, named.description)
    if named.json:
        print_json(webhook.answer)
        return
    notice(f"{webhook.id} is made. Its notices are signed with this secret, which is not shown again:")
    print(webhook.secret)


def list_(named: Any) -> None:
    with connect(named) as era:
        found = era.webhooks.list()
    if named.json:
        print_json({"webhooks": [webhook.answer for webhook in found], "count": len(found)})
        return
    names = ("id", "url", "events", "waiting", "failed", "description")
    table(names, [(w.id, w.url, ",".join(w.events), w.pending, w.failed, w.description) for w in found])


def deliveries(named: Any) -> None:
    with connect(named) as era:
        found = era.webhooks.deliveries(named.webhook)
    if named.json:
        print_json({"deliveries": [each.answer for each in found], "count": len(found)})
        return
    names = ("id", "event", "status", "tries", "created", "http", "reason")
    table(names, [(d.id, d.event, d.status, d.tries, d.created_at, d.http_status, d.reason) for d in found])


def replay(named: Any) -> None:
    with connect(named) as era:
        again = era.webhooks.replay(named.webhook, named.delivery)
    if named.json:
        print_json(again.answer)
        return
    notice(f"{again.id} is sent once more.")


def delete(named: Any) -> None:
    with connect(named) as era:
        era.webhooks.delete(named.webhook)
    if named.json:
        print_json({"success": True, "id": named.webhook})

"""The body of a request as one message, read before the application reads it."""

from __future__ import annotations

from starlette.types import Message, Receive


async def whole_body(receive: Receive) -> Message:
    """The body of a request in one message, or the last message where the client hangs up. The client decides how many
    pieces its bytes come in, and a message takes far more memory than a byte: so no more than one is kept."""
    message, content = await receive(), bytearray()
    while message.get("more_body"):
        content += message.get("body", b"")
        message = await receive()
    if not content or message["type"] != "http.request":
        return message
    return {**message, "body": bytes(content + message.get("body", b""))}


def again(message: Message, receive: Receive) -> Receive:
    """A `receive` that gives this message once more, lets go of it, and then goes on."""
    kept = [message]

    async def receive_again() -> Message:
        return kept.pop() if kept else await receive()

    return receive_again

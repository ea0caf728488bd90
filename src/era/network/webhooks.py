"""Sends notices of webhooks to where programs may connect, too, and nowhere else.

Theory of operation. Whoever has a key names the URL, so this is a way to have the service itself connect somewhere.
What holds for programs holds here, by the same rules (policy.py): the name is resolved, the address is judged, and the
connection is made to that very address, so a name that leads elsewhere a moment later leads nowhere. TLS still checks
the name. An answer's redirect isn't followed: it is an answer like any other, and not a good one. Of the answer only
the status is read.

A lookup can't be cut short, so it is waited for however long it takes: who calls bounds how many there are of one owner
at a time.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

import h11

from era import __version__
from era.core.allowlist import Address
from era.core.concurrency.streams import write
from era.core.owners.webhooks import MAX_URL, Unsent
from era.errors import BadRequest
from era.network import dialing
from era.network.dialing import Resolve, resolve
from era.network.policy import Policy

_SECONDS = 15.0
_MAX_HEAD = 64 << 10
_MAX_INFORMATIONAL = 16
"""Informational responses (1xx) that may come before an answer. 64 KiB may be thousands of them, to parse at once."""

_NAMED = 3
"""Addresses that an error names at most."""


class WebhookSender:
    """Sends notices to webhooks: the adapter of `Sender` in core/owners/webhooks.py."""

    def __init__(self, policy: Policy, lookup: Resolve = resolve) -> None:
        self._policy = policy
        self._resolve = lookup
        self._tls: ssl.SSLContext | None = None

    async def check(self, url: str) -> None:
        """See Sender.check. A name that can't be resolved now may be later, so it is let through."""
        target = _parsed(url)
        try:
            addresses = await self._resolve(target.hostname or "", _port(target))
        except (OSError, UnicodeError):
            return
        try:
            self._allowed(addresses)
        except Unsent as refused:
            raise BadRequest(
                f"'url' can't be a webhook's: {refused}",
                hint="A webhook may lead where programs may connect: to public addresses, and to private ones in the "
                "server's ERA_EGRESS_PRIVATE.",
                code="webhook_refused",
            ) from None

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """See Sender.send."""
        try:
            target = _parsed(url)
            addresses = self._allowed(await self._resolve(target.hostname or "", _port(target)))
            if target.scheme == "https" and self._tls is None:
                # To read all certificates of authorities takes long.
                self._tls = await asyncio.to_thread(ssl.create_default_context)
            async with asyncio.timeout(_SECONDS):
                return await self._post(await _connected(addresses, _port(target)), target, headers, body)
        except BadRequest as error:
            raise Unsent(error.message) from error
        except TimeoutError:
            raise Unsent(f"There was no answer within {_SECONDS:g} seconds.") from None
        except ssl.SSLError as error:
            raise Unsent(f"TLS failed: {getattr(error, 'verify_message', None) or error.reason or error}.") from error
        except (OSError, UnicodeError) as error:
            raise Unsent(f"It can't be reached: {getattr(error, 'strerror', None) or error}.") from error
        except (h11.ProtocolError, EOFError):
            raise Unsent("The answer was not HTTP.") from None

    def _allowed(self, addresses: Sequence[Address]) -> Sequence[Address]:
        """Those that may be connected to. Raises Unsent where there is none."""
        refused = [(address, self._policy.refuses(address)) for address in addresses]
        if allowed := [address for address, rule in refused if rule is None]:
            return allowed
        told = [f"{address} is refused, since {rule.why}." for address, rule in refused[:_NAMED] if rule is not None]
        raise Unsent(" ".join(told) or "Its name has no address.")

    async def _post(self, sock: socket.socket, target: SplitResult, headers: Mapping[str, str], body: bytes) -> int:
        """POST on a connection, which is closed then; the status of the answer."""
        tls, name = (self._tls, target.hostname) if target.scheme == "https" else (None, None)
        try:
            reader, writer = await asyncio.open_connection(sock=sock, limit=_MAX_HEAD, ssl=tls, server_hostname=name)
        except BaseException:
            sock.close()
            raise
        try:
            http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
            path = (target.path or "/") + (f"?{target.query}" if target.query else "")
            fields = {
                "Host": target.netloc,
                "User-Agent": f"era/{__version__}",
                "Content-Length": str(len(body)),
                "Connection": "close",
                **headers,
            }
            request = h11.Request(method="POST", target=path, headers=list(fields.items()))
            events: tuple[h11.Request | h11.Data | h11.EndOfMessage, ...] = (
                request,
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            for event in events:
                write(writer, http.send(event) or b"")
            await writer.drain()
            informational = 0
            while True:
                received = http.next_event()
                if isinstance(received, h11.Response):
                    return received.status_code
                if received is h11.NEED_DATA:
                    if not (data := await reader.read(_MAX_HEAD)):
                        raise Unsent("It hung up without an answer.")
                    http.receive_data(data)
                elif not isinstance(received, h11.InformationalResponse):
                    raise EOFError
                else:
                    informational += 1
                    if informational > _MAX_INFORMATIONAL:
                        raise Unsent("It announces an answer again and again, and gives none.")
        finally:
            writer.transport.abort()


async def _connected(addresses: Sequence[Address], port: int) -> socket.socket:
    """A connection to the first address that answers. Raises OSError."""
    *others, last = addresses
    for address in others:
        with suppress(OSError):
            return await dialing.connect(address, port)
    return await dialing.connect(last, port)


def _port(target: SplitResult) -> int:
    return target.port or (443 if target.scheme == "https" else 80)


def _parsed(url: str) -> SplitResult:
    """A webhook's URL in its parts. Raises BadRequest."""
    problem = None
    try:
        target = urlsplit(url)
        _port(target)
        target.netloc.encode("ascii")
        if target.scheme not in ("https", "http") or not target.hostname:
            problem = "it must begin with https:// or http://, and name a host"
        elif target.username is not None or target.password is not None:
            problem = "it has a user or a password"
        elif target.fragment or not (url.isascii() and url.isprintable()) or " " in url or len(url) > MAX_URL:
            problem = f"it may have up to {MAX_URL} printable ASCII characters, without spaces and '#'"
    except ValueError:
        problem = "it is no URL"
    if problem is not None:
        raise BadRequest(
            f"'url' can't be a webhook's: {problem}.",
            hint="Write it as https://example.com/path. Notices are signed, so the URL needs no password.",
            code="invalid_field",
        )
    return target

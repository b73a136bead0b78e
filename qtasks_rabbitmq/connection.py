"""The connection to RabbitMQ: one channel per purpose, opened on demand, reopened if it breaks."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from qtasks_core.drivers import importing_driver
from qtasks_core.errors import ConfigurationError, ServerTooOld, Unavailable, chain_of
from qtasks_core.urls import redact
from qtasks_rabbitmq.servers import Server, servers_of

if TYPE_CHECKING:
    from aiormq.abc import AbstractConnection

    from qtasks_rabbitmq.channel import Channel, Sending
    from qtasks_rabbitmq.frames import FrameReader

PATIENCE = 4.0
"""Seconds after which a server that does not answer counts as unreachable."""
SLOWEST = 500
"""Messages a second that a server at least delivers, drops or takes back."""
OLDEST = (3, 10)
"""The oldest supported version: the first with at-least-once dead-lettering on quorum queues."""
MOST_AT_ONCE = 1000
MOST_BYTES_AT_ONCE = 4 * 2**20
"""The most messages and bytes that are written before the server's confirms are awaited."""
CONSUMER_TIMEOUT = 1800.0
"""A server's consumer timeout in seconds, unless somebody has configured another one."""
NOT_ALLOWED = 530
HARD_LIMIT = 512 * 2**20
"""The highest possible `max_message_size` of a server, in bytes."""
TLS_REFUSALS = frozenset(
    {
        "CERTIFICATE_VERIFY_FAILED",
        "NO_PROTOCOLS_AVAILABLE",
        "SSLV3_ALERT_BAD_CERTIFICATE",
        "SSLV3_ALERT_CERTIFICATE_UNKNOWN",
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
        "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "TLSV1_ALERT_INSUFFICIENT_SECURITY",
        "TLSV1_ALERT_PROTOCOL_VERSION",
        "TLSV1_ALERT_UNKNOWN_CA",
        "UNSUPPORTED_PROTOCOL",
        "WRONG_VERSION_NUMBER",
    }
)
"""Reasons for which a handshake fails every time, until the configuration of one side changes."""

Opened: TypeAlias = "tuple[AbstractConnection, FrameReader | None]"
Setup = Callable[["Channel", str, tuple[int, ...]], Awaitable[None]]
"""Prepares a new channel. Its arguments are the channel, the purpose and the server's version."""

logger = logging.getLogger("qtasks.rabbitmq")


class Connection:
    """Owns a connection for one purpose. `heartbeat` is in whole seconds.

    If the server hears nothing for two to three heartbeats, it drops the connection and gives its
    deliveries to others. If the URL names several servers, the connection stays with one that
    answers.
    """

    def __init__(self, url: str, purpose: str, heartbeat: int, setup: Setup) -> None:
        self._url = url
        self._servers = servers_of(url)
        self._purpose = purpose
        self._heartbeat = heartbeat
        self._setup = setup
        self._connection: AbstractConnection | None = None
        self._reader: FrameReader | None = None
        self._channels: dict[str, Channel] = {}
        self._opening = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self.version: tuple[int, ...] = ()
        """The server's release, known after the first connect."""
        self.server = ""
        """Product and version, known after the first connect."""
        self.consumer_timeout = CONSUMER_TIMEOUT
        """Seconds after which the server takes a delivery back. It says so when it first does."""
        self.largest: int | None = None
        """The server's limit for a message in bytes, known once it has refused a larger one."""

    @property
    def open(self) -> bool:
        """Whether a connection is open now."""
        return self._connection is not None and self._connection.is_opened

    async def channel(self, purpose: str = "") -> Channel:
        """Return the channel for a purpose. Connect if needed.

        The channel without a purpose is the first of a connection, and is set up before all others.
        Raises `Unavailable`, `ConfigurationError`, `MissingDriver`, `ServerTooOld`.
        """
        if reason := self._blocked:
            raise Unavailable(f"{redact(self._url)} takes no messages now: {reason}")
        if (channel := self._living(purpose)) is not None:
            return channel
        async with self._opening:
            for each in dict.fromkeys(("", purpose)):
                if self._living(each) is None:
                    self._channels[each] = await self._open(each)
            return self._channels[purpose]

    async def registered(self) -> None:
        """Wait until new queues of all channels survive a crash. See `Channel.registered`."""
        for channel in list(self._channels.values()):
            await channel.registered()

    @asynccontextmanager
    async def answering(self, messages: int = 0) -> AsyncIterator[None]:
        """Raise `Unavailable` if the code inside takes longer than `PATIENCE` seconds.

        If the server has to do something with each of many messages, it may take longer.
        """
        try:
            async with asyncio.timeout(PATIENCE + messages / SLOWEST):
                yield
        except TimeoutError:
            why = f"takes no messages now: {self._blocked}" if self._blocked else "does not answer"
            raise Unavailable(f"{redact(self._url)} {why}") from None

    @asynccontextmanager
    async def asking(self) -> AsyncIterator[Channel]:
        """Give the channel without a purpose, for questions that the server answers at once.

        If it does not answer within `PATIENCE` seconds, drop the connection and raise
        `Unavailable`.
        """
        channel = await self.channel()
        try:
            async with self.answering():
                yield channel
        except Unavailable:
            self.discard("the server did not answer in time", only=channel)
            raise

    async def publish(self, sendings: Sequence[Sending]) -> dict[int, str]:
        """Publish in one write. Return the refused messages, by index, with the reason.

        It waits until the server would remember the queues that were created on this connection.
        If a message is too large, the server closes the channel. Then its limit is known, and all
        other messages are published again. Raises `Unavailable`, `ConfigurationError`.
        """
        while True:
            channel = await self.channel()
            await self.registered()
            most = self.largest or HARD_LIMIT
            refused = {
                at: f"{len(sending.body)} bytes are over the server's max_message_size of {most}"
                for at, sending in enumerate(sendings)
                if len(sending.body) > most
            }
            fitting = [at for at in range(len(sendings)) if at not in refused]
            if not fitting:
                return refused
            try:
                async with self.answering():
                    answers = await channel.publish([sendings[at] for at in fitting])
            except Unavailable:
                if channel.largest is not None:
                    self.largest = channel.largest
                    continue
                self.discard("the server did not confirm in time", only=channel)
                raise
            return refused | {fitting[index]: reason for index, reason in answers.items()}

    def discard(self, reason: str, only: Channel | None = None) -> None:
        """Drop the connection. `channel` opens a new one.

        With `only`: if this channel belongs to it, and unless the server blocks the connection. A
        blocked one would block again, and it works on by itself when the alarm of the server ends.
        """
        if only is not None and (only not in self._channels.values() or self._blocked):
            return
        connection, self._connection = self._connection, None
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.fail(reason)
        if connection is not None and not connection.is_closed:
            closing = asyncio.create_task(_close(connection))
            self._retiring.add(closing)
            closing.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """Close the connection. The server gets back all unsettled deliveries. Idempotent."""
        self.discard("the connection was closed")
        if self._retiring:
            await asyncio.wait(self._retiring)

    @property
    def _blocked(self) -> str:
        """Why the server does not read this connection: an alarm of its memory or disk."""
        return self._reader.blocked if self._reader is not None and self.open else ""

    def _living(self, purpose: str) -> Channel | None:
        channel = self._channels.get(purpose)
        return channel if channel is not None and channel.lost is None else None

    async def _open(self, purpose: str) -> Channel:
        connection = self._connection
        if connection is None or not connection.is_opened:
            self.discard("reconnecting")
            connection, self._reader = await self._connect()
            self._connection = connection
            self.largest = None
        # Import it after `connect`: it needs the driver, and `connect` reports a missing driver
        # clearly.
        from qtasks_rabbitmq.channel import Channel

        try:
            async with self.answering():
                self.version = self._check(connection.server_properties)
                channel = Channel(connection, redact(self._url))
                await channel.open()
                await self._setup(channel, purpose, self.version)
        except BaseException:
            # Another server may do what this one cannot.
            self.discard("the connection could not be set up")
            raise
        return channel

    async def _connect(self) -> Opened:
        """Connect to the first server that answers. Try the last good server first."""
        # Not within the timeout: on a busy machine, the import alone may take that long.
        with importing_driver("amqp://", ".[rabbitmq]"):
            import aiormq  # noqa: F401
            import yarl  # noqa: F401
        error = Unavailable(f"{redact(self._url)} names no server")
        for server in list(self._servers):
            try:
                async with asyncio.timeout(PATIENCE / len(self._servers)):
                    return await connect(server, self._purpose, self._heartbeat)
            except TimeoutError:
                error = Unavailable(f"{redact(server.url)} does not answer")
            except Unavailable as unavailable:
                error = unavailable
            self._servers.append(self._servers.pop(0))
        raise error

    def _check(self, properties: Any) -> tuple[int, ...]:
        name, text = properties.get("product", "?"), str(properties.get("version", "?"))
        self.server = f"{name} {text}"
        version = tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
        if version < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise ServerTooOld(
                f"{redact(self._url)} is {self.server}; it must be {needed} or newer"
            )
        return version


async def connect(server: Server, purpose: str, heartbeat: int) -> Opened:
    """Open a connection of the driver. Return it with its reader.

    Or raise the matching error of the contracts.

    Only this function tells a wrong configuration from an outage. Every error that is not known to
    be final becomes `Unavailable`.
    """
    import aiormq
    from yarl import URL

    from qtasks_rabbitmq.transport import Transport

    shown = redact(server.url)
    transport = Transport(await server.context())
    try:
        named = URL(server.url).update_query(heartbeat=str(heartbeat), name=f"qtasks {purpose}")
        return await aiormq.connect(named, transport_factory=transport), transport.reader
    except aiormq.exceptions.ProbableAuthenticationError as error:
        raise ConfigurationError(
            f"{shown} refuses the user or password: set them as in amqp://USER:PASSWORD@HOST "
            f"({error})"
        ) from error
    except aiormq.AuthenticationError as error:
        raise ConfigurationError(
            f"{shown} does not take this way to log in: {error.reason % error.args}; the option "
            "auth= of the URL chooses it"
        ) from error
    except (OSError, aiormq.AMQPError, EOFError) as error:
        raise _meaning(error, shown, transport.reader) from error
    except ValueError as error:
        raise ConfigurationError(f"{shown} is no URL of a RabbitMQ server: {error}") from None


def _meaning(error: Exception, shown: str, reader: FrameReader | None) -> Exception:
    """Return the error that a failed connect means."""
    for each in chain_of(error):
        if isinstance(each, ssl.SSLError) and (each.reason or "") in TLS_REFUSALS:
            detail = getattr(each, "verify_message", "") or each.reason
            return ConfigurationError(
                f"{shown}: the TLS handshake failed ({detail}). cafile= in the URL names the "
                "authority that signed the server's certificate, certfile= and keyfile= your own "
                "certificate; amqps:// needs the server's TLS port"
            )
    if reader is not None and reader.tls:
        return ConfigurationError(f"{shown} answers in TLS: write amqps:// instead of amqp://")
    if reader is not None and reader.closed is not None:
        code, text = reader.closed
        if code == NOT_ALLOWED and _names_wrong_vhost(text):
            return ConfigurationError(
                f"{shown} has no such virtual host, or the user may not use it: the path of the "
                f"URL names it ({text})"
            )
        return Unavailable(f"{shown} does not take connections now: {text}")
    return Unavailable(f"{shown} cannot be reached: {error}")


def _names_wrong_vhost(text: str) -> bool:
    """Return whether the virtual host itself is wrong. A limit of connections may pass."""
    return "not found" in text or ("refused for user" in text and "limit" not in text)


async def _close(connection: AbstractConnection) -> None:
    """Close a connection, even if its server is frozen or gone."""
    try:
        async with asyncio.timeout(PATIENCE):
            await connection.close()
    except TimeoutError:
        logger.debug("a connection did not close in time")

"""One connection to RabbitMQ with one channel: opened on demand, and again after it broke."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from qtasks_core.errors import ConfigurationError, MissingDriver, ServerTooOld, Unavailable
from qtasks_core.urls import redact

if TYPE_CHECKING:
    from aiormq.abc import AbstractConnection

    from qtasks_rabbitmq.channel import Channel

PATIENCE = 4.0
"""Seconds in which the server must answer, or it counts as unreachable."""
OLDEST = (3, 10)
"""The first release with at-least-once dead-lettering on quorum queues."""

Setup = Callable[["Channel", tuple[int, ...]], Awaitable[None]]
"""What to declare on each new channel, given it and the server's version."""

log = logging.getLogger(__name__)


class Connection:
    """Owns a connection of one purpose; `heartbeat` is in whole seconds.

    The server drops a connection, and hands its deliveries to others, two to three heartbeats
    after it last heard of it.
    """

    def __init__(self, url: str, purpose: str, heartbeat: int, setup: Setup) -> None:
        self._url = url
        self._purpose = purpose
        self._heartbeat = heartbeat
        self._setup = setup
        self._connection: AbstractConnection | None = None
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self.server = ""
        """Product and version, once it was connected."""

    async def channel(self) -> Channel:
        """Return the channel, connecting where there is none.

        Raises `Unavailable`, `ConfigurationError`, `MissingDriver`, `ServerTooOld`.
        """
        if self._channel is not None and self._channel.lost is None:
            return self._channel
        async with self._opening:
            if self._channel is None or self._channel.lost is not None:
                self.discard("reconnecting")
                async with self.answering():
                    self._channel = await self._open()
                await self._channel.registered()
            return self._channel

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[None]:
        """Bound what is inside by `PATIENCE`; past it raise `Unavailable`."""
        try:
            async with asyncio.timeout(PATIENCE):
                yield
        except TimeoutError:
            raise Unavailable(f"{redact(self._url)} does not answer") from None

    def discard(self, reason: str, only: Channel | None = None) -> None:
        """Give the connection up (if it is that of `only`); `channel` will make another."""
        if only is not None and only is not self._channel:
            return
        connection, self._connection = self._connection, None
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.fail(reason)
        if connection is not None and not connection.is_closed:
            closing = asyncio.create_task(_close(connection))
            self._retiring.add(closing)
            closing.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """Close the connection; what it held goes back to the server. Idempotent."""
        self.discard("the connection was closed")
        if self._retiring:
            await asyncio.wait(self._retiring)

    async def _open(self) -> Channel:
        connection = await connect(self._url, self._purpose, self._heartbeat)
        # Only now: it needs the driver, whose absence `connect` tells in one line.
        from qtasks_rabbitmq.channel import Channel

        try:
            version = self._check(connection.server_properties)
            channel = Channel(connection, redact(self._url))
            await channel.open()
            await self._setup(channel, version)
        except BaseException:
            self._connection = connection
            self.discard("the connection could not be set up")
            raise
        self._connection = connection
        return channel

    def _check(self, properties: Any) -> tuple[int, ...]:
        name, text = properties.get("product", "?"), str(properties.get("version", "?"))
        self.server = f"{name} {text}"
        version = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
        if version < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise ServerTooOld(
                f"{redact(self._url)} is {self.server}; it must be {needed} or newer"
            )
        return version


async def connect(url: str, purpose: str, heartbeat: int) -> AbstractConnection:
    """Open a connection of the driver, or raise what its failure means."""
    try:
        import aiormq
        from yarl import URL
    except ModuleNotFoundError as error:
        raise MissingDriver(url.partition("://")[0] + "://", ".[rabbitmq]") from error
    try:
        named = URL(url).update_query(heartbeat=str(heartbeat), name=f"qtasks {purpose}")
        return await aiormq.connect(named)
    except (aiormq.exceptions.ProbableAuthenticationError, aiormq.AuthenticationError) as error:
        raise ConfigurationError(
            f"{redact(url)} refuses the user or password: set them as in amqp://USER:PASSWORD@HOST"
        ) from error
    except aiormq.exceptions.InvalidFrameError as error:
        # The driver expected the virtual host to be opened; the server closed instead.
        if "Connection.Close" in str(error):
            raise ConfigurationError(
                f"{redact(url)} has no such virtual host, or the user may not use it: the path of "
                f"the URL names it"
            ) from error
        raise Unavailable(f"{redact(url)} does not speak AMQP: {error}") from error
    except (OSError, aiormq.AMQPError, EOFError) as error:
        raise Unavailable(f"{redact(url)} cannot be reached: {error}") from error
    except ValueError as error:
        raise ConfigurationError(f"{redact(url)} is no URL of a RabbitMQ server: {error}") from None


async def _close(connection: AbstractConnection) -> None:
    """Close a connection, though its server may be frozen or gone."""
    try:
        async with asyncio.timeout(PATIENCE):
            await connection.close()
    except TimeoutError:
        log.debug("a connection did not close in time")

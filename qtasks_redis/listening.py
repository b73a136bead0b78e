"""Following a channel of the server: commands, and changes of shared values."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from qtasks_core.errors import Closed, Unavailable
from qtasks_redis.connection import Connection

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

_PING_AFTER: Final = 5.0
"""Seconds of silence after which a listener sends a PING, to notice a dead connection."""
_PONG_WITHIN: Final = 2.5


class Listeners:
    """The connections of the iterators of a broker or storage, so that `stop` finishes them all."""

    def __init__(self) -> None:
        self._lines: set[AbstractConnection] = set()

    async def follow(self, connection: Connection, channel: str) -> AsyncIterator[bytes]:
        """Yield empty bytes once the server has confirmed the channel, then each push.

        Raises `Unavailable` when the connection breaks: pushes may be missing then.
        """
        line = await connection.line()
        self._lines.add(line)
        try:
            with connection.reachable():
                await line.send_command("SUBSCRIBE", channel)
            while line in self._lines:
                reply = await self._next(connection, line)
                if reply is None or line not in self._lines:
                    continue
                if reply[0] == b"subscribe":
                    yield b""
                elif reply[0] == b"message":
                    yield reply[2]
        except Unavailable:
            if line in self._lines:
                raise
        finally:
            self._lines.discard(line)
            await line.disconnect(nowait=True)
        raise Closed("the broker or storage is stopped")

    async def _next(self, connection: Connection, line: AbstractConnection) -> Any:
        """Return the next reply, or None if the server has only answered a PING."""
        for patience in (_PING_AFTER, _PONG_WITHIN):
            try:
                with connection.reachable():
                    async with asyncio.timeout(patience) as silence:
                        return await line.read_response(timeout=math.inf, disconnect_on_error=False)
            except Unavailable:
                if not silence.expired():
                    raise
            if patience == _PING_AFTER:
                with connection.reachable():
                    await line.send_command("PING")
        raise Unavailable("the server does not answer PING")

    async def stop(self) -> None:
        """Finish all iterators."""
        lines = list(self._lines)
        self._lines.clear()
        for line in lines:
            await line.disconnect(nowait=True)

"""A proxy in front of a server, which cuts its connections after so many bytes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Literal, Self

Direction = Literal["sent", "answered"]
"""Which bytes are counted: those that clients send, or those that the server answers."""


class Proxy:
    """Listens while its block runs, on `port` (0: any), and connects to `to` on this machine."""

    def __init__(self, to: int, port: int = 0) -> None:
        self._to = to
        self.port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._direction: Direction | None = None
        self._left = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._cut()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cut_after(self, count: int, direction: Direction) -> None:
        """Let `count` more bytes pass in one direction; then cut all connections."""
        self._left, self._direction = count, direction

    @property
    def was_cut(self) -> bool:
        """Whether the connections were cut since `cut_after`."""
        return self._direction is None

    def disarm(self) -> None:
        """Let everything pass."""
        self._direction = None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._carry(reader, writer)
        except* OSError:
            writer.transport.abort()  # the server is away, or an end was cut
        finally:
            self._tasks.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to = await asyncio.open_connection("127.0.0.1", self._to)
        ends = {writer, to}
        self._writers |= ends
        for each in ends:
            # `drain` then waits until the kernel has all of it: a cut loses no byte before it.
            each.transport.set_write_buffer_limits(0)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, to, "sent"))
                group.create_task(self._pump(there, writer, "answered"))
        finally:
            self._writers -= ends
            for each in ends:
                each.transport.abort()

    async def _pump(
        self, source: asyncio.StreamReader, to: asyncio.StreamWriter, direction: Direction
    ) -> None:
        while data := await source.read(65536):
            if self._direction == direction:
                data, over = data[: self._left], len(data) > self._left
                self._left -= len(data)
                to.write(data)
                with suppress(OSError):
                    await to.drain()
                if over:
                    self._direction = None
                    self._cut()
                    return
            else:
                to.write(data)
                await to.drain()
        to.transport.abort()

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

"""Ports: in front of a server, under the control of a test, and those of a cluster's nodes."""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from typing import Any, Self

from qtasks.testing.native import OUTGOING
from qtasks.testing.recipes import PASSWORD

BUS = 10_000
"""How far above its port a node of a cluster has the one that other nodes connect to."""


def has_bus(port: int) -> bool:
    """Return whether a node with this port can have that other one, which no client may take."""
    bus = port + BUS
    if bus >= int(OUTGOING.read_text().split()[0]):
        return False
    with socket.socket() as candidate:
        try:
            candidate.bind(("127.0.0.1", bus))
        except OSError:
            return False
    return True


class Port(ABC):
    """Listens while its block runs; `serve` is what becomes of each connection."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://:{PASSWORD}@127.0.0.1:{port}/0"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        await self.serve(task, reader, writer)

    @abstractmethod
    async def serve(
        self, task: asyncio.Task[Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Serve a connection; cancelled at the end of the block."""

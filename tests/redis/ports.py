"""A port in front of a server, which a test has under its control."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import Any, Self

from qtasks.testing.recipes import PASSWORD


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

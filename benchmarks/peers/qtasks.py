"""QTasks as a peer, for every backend."""

from __future__ import annotations

from typing import Any

from benchmarks.peers.peer import CONCURRENCY, Peer, begun, by_callers
from qtasks.asyncio import QueueTasks


class QTasks(Peer):
    """The broker on one server, the storage on the same or on another."""

    package = "qtasks"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.app = QueueTasks("peers", broker=url, storage=self.results)

        @self.app.task(name="nothing")
        async def nothing() -> None:
            begun()

        self.nothing = nothing
        self.handle: Any = None

    async def start(self) -> None:
        await self.app.start()

    async def stop(self) -> None:
        await self.app.stop()

    async def enqueue(self, count: int) -> None:
        await by_callers(self.nothing.add_task, count - 1)
        self.handle = await self.nothing.add_task()

    async def bulk(self, count: int) -> None:
        self.handle = (await self.nothing.map([()] * count))[-1]

    async def last(self) -> None:
        await self.handle.wait_result(timeout=600)

    def work(self) -> None:
        self.app.run_forever(concurrency=CONCURRENCY)

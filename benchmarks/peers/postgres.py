"""The peers that use PostgreSQL."""

from __future__ import annotations

import asyncio
from typing import Any

from benchmarks.peers.peer import CONCURRENCY, Peer, begun, by_callers


class Procrastinate(Peer):
    """A table of jobs with their states. It stores no results."""

    package = "procrastinate"
    notes = "stores no results; its state is polled every 5 ms"

    def __init__(self, url: str) -> None:
        from procrastinate import App, PsycopgConnector

        super().__init__(url)
        self.app = App(connector=PsycopgConnector(conninfo=url, max_size=10))

        @self.app.task(name="nothing")
        async def nothing() -> None:
            begun()

        self.nothing: Any = nothing
        self.id = 0

    async def start(self) -> None:
        await self.app.open_async()
        await self.app.schema_manager.apply_schema_async()

    async def stop(self) -> None:
        await self.app.close_async()

    async def enqueue(self, count: int) -> None:
        await by_callers(self.nothing.defer_async, count - 1)
        self.id = await self.nothing.defer_async()

    async def bulk(self, count: int) -> None:
        """Enqueue `count` tasks at once."""
        self.id = (await self.nothing.batch_defer_async(*[{}] * count))[-1]

    async def last(self) -> None:
        while True:
            status = await self.app.job_manager.get_job_status_async(self.id)
            if status.value == "succeeded":
                return
            await asyncio.sleep(0.005)

    def work(self) -> None:
        async def receive() -> None:
            async with self.app.open_async():
                await self.app.run_worker_async(concurrency=CONCURRENCY)

        asyncio.run(receive())


class PgQueuer(Peer):
    """A table of jobs; finished ones move to a log table. It stores no results."""

    package = "pgqueuer"
    notes = "stores no results; its state is polled every 5 ms; batches of 100"

    async def start(self) -> None:
        import asyncpg
        from pgqueuer import AsyncpgPoolDriver, Queries

        self.pool: Any = await asyncpg.create_pool(self.url)
        self.queries: Any = Queries(AsyncpgPoolDriver(self.pool))
        await self.queries.install()
        self.id: Any = None

    async def stop(self) -> None:
        await self.pool.close()

    async def enqueue(self, count: int) -> None:
        await by_callers(lambda: self.queries.enqueue("nothing", None), count - 1)
        (self.id,) = await self.queries.enqueue("nothing", None)

    async def bulk(self, count: int) -> None:
        """Enqueue `count` tasks at once."""
        ids = await self.queries.enqueue(["nothing"] * count, [None] * count, [0] * count)
        self.id = ids[-1]

    async def last(self) -> None:
        while True:
            for _, status in await self.queries.job_status([self.id]):
                if status == "successful":
                    return
            await asyncio.sleep(0.005)

    def work(self) -> None:
        async def receive() -> None:
            import asyncpg
            from pgqueuer import PgQueuer as App

            async with asyncpg.create_pool(self.url) as pool:
                app = App.from_asyncpg_pool(pool)

                @app.entrypoint("nothing")
                async def nothing(_: Any) -> None:
                    begun()

                # The default of 10 is meant for long tasks.
                await app.run(batch_size=CONCURRENCY, max_concurrent_tasks=2 * CONCURRENCY)

        asyncio.run(receive())

"""The peers that use Redis."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

from benchmarks.peers.peer import CONCURRENCY, Peer, begun, by_callers


class Taskiq(Peer):
    """Streams with acknowledgements; results in keys."""

    package = "taskiq"

    def __init__(self, url: str) -> None:
        from taskiq_redis import RedisAsyncResultBackend

        super().__init__(url)
        results: Any = RedisAsyncResultBackend(self.results)
        self.broker = self.make_broker().with_result_backend(results)

        @self.broker.task(task_name="nothing")
        async def nothing() -> None:
            begun()

        self.nothing = nothing
        self.handle: Any = None

    def make_broker(self) -> Any:
        from taskiq_redis import RedisStreamBroker

        return RedisStreamBroker(self.url)

    async def start(self) -> None:
        await self.broker.startup()

    async def stop(self) -> None:
        await self.broker.shutdown()

    async def enqueue(self, count: int) -> None:
        await by_callers(self.nothing.kiq, count - 1)
        self.handle = await self.nothing.kiq()

    async def last(self) -> None:
        await self.handle.wait_result(timeout=600)

    def work(self) -> None:
        from taskiq.api import run_receiver_task

        async def receive() -> None:
            await self.broker.startup()
            await run_receiver_task(self.broker, max_async_tasks=CONCURRENCY)

        self.broker.is_worker_process = True
        asyncio.run(receive())


class Streaq(Peer):
    """Streams with a consumer group; results in keys."""

    package = "streaq"
    notes = "bulk by enqueue_many"

    def __init__(self, url: str) -> None:
        from streaq import Worker

        super().__init__(url)
        self.worker: Any = Worker(redis_url=url, concurrency=CONCURRENCY)

        @self.worker.task(name="nothing")
        async def nothing() -> None:
            begun()

        self.nothing: Any = nothing
        self.handle: Any = None

    async def start(self) -> None:
        await self.worker.__aenter__()

    async def stop(self) -> None:
        await self.worker.__aexit__(None, None, None)

    async def enqueue(self, count: int) -> None:
        async def add() -> None:
            await self.nothing.enqueue()

        await by_callers(add, count - 1)
        self.handle = await self.nothing.enqueue()

    async def bulk(self, count: int) -> None:
        tasks = [self.nothing.enqueue() for _ in range(count)]
        await self.worker.enqueue_many(tasks)
        self.handle = tasks[-1]

    async def last(self) -> None:
        await self.handle.result(600)

    def work(self) -> None:
        self.worker.run_sync()


class Saq(Peer):
    """A list; each job and its result in one key."""

    package = "saq"
    notes = "concurrent callers, at most 20 at the server at once, its default"

    async def start(self) -> None:
        self.queue = self._queue()
        await self.queue.connect()
        self.job: Any = None

    async def stop(self) -> None:
        await self.queue.disconnect()

    async def enqueue(self, count: int) -> None:
        await by_callers(lambda: self.queue.enqueue("nothing"), count - 1)
        self.job = await self.queue.enqueue("nothing")

    async def last(self) -> None:
        while not self.job.completed:
            try:
                await self.job.refresh(until_complete=1)
            except TimeoutError:
                continue

    def work(self) -> None:
        from saq import Worker

        async def nothing(_: Any) -> None:
            begun()

        async def receive() -> None:
            functions: Any = [("nothing", nothing)]
            await Worker(self._queue(), functions, concurrency=CONCURRENCY).start()

        asyncio.run(receive())

    def _queue(self) -> Any:
        from redis.asyncio import Redis
        from saq.queue.redis import RedisQueue

        # The driver's default of 100 is too few for a worker that runs 100 tasks.
        return RedisQueue(Redis.from_url(self.url, max_connections=2 * CONCURRENCY))


class Dramatiq(Peer):
    """A list, and a set of messages in flight; a plain function in threads."""

    package = "dramatiq"
    notes = "blocking client; 8 threads, its default"

    def __init__(self, url: str) -> None:
        import dramatiq
        from dramatiq.results import Results
        from dramatiq.results.backends import RedisBackend

        super().__init__(url)
        self.broker = self.make_broker()
        results = RedisBackend(url=self.results)
        self.broker.add_middleware(Results(backend=results, store_results=True))
        dramatiq.set_broker(self.broker)

        def nothing() -> int:
            begun()
            return 0  # it does not store None

        self.actor: Any = dramatiq.actor(nothing, broker=self.broker)
        self.handle: Any = None

    def make_broker(self) -> Any:
        from dramatiq.brokers.redis import RedisBroker

        return RedisBroker(url=self.url)

    async def enqueue(self, count: int) -> None:
        for _ in range(count):
            self.handle = self.actor.send()

    async def last(self) -> None:
        from dramatiq.results import ResultTimeout

        while True:
            try:
                # In milliseconds, and below the 5 s of the driver's socket timeout.
                self.handle.get_result(block=True, timeout=2000)
                return
            except ResultTimeout:
                continue

    def work(self) -> None:
        from dramatiq import Worker

        Worker(self.broker).start()
        signal.pause()


class Celery(Peer):
    """A list; results in keys; a plain function in a pool of processes."""

    package = "celery"
    notes = "blocking client; one process per core; acks_late"

    def __init__(self, url: str) -> None:
        from celery import Celery as App

        super().__init__(url)
        self.app = App("peers", broker=url, backend=self.results)
        self.app.conf.update(task_acks_late=True, broker_connection_retry_on_startup=True)

        @self.app.task(name="nothing")
        def nothing() -> None:
            begun()

        self.nothing: Any = nothing
        self.handle: Any = None

    async def enqueue(self, count: int) -> None:
        for _ in range(count):
            self.handle = self.nothing.delay()

    async def last(self) -> None:
        self.handle.get(timeout=600)

    def work(self) -> None:
        cores = str(os.cpu_count())
        self.app.worker_main(["worker", "--loglevel", "ERROR", "--concurrency", cores])

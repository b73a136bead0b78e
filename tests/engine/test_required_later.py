"""What tasks require is compared again while an app runs: its servers' settings can change."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest
from msgspec.structs import replace
from redis.asyncio import Redis

from qtasks import ConfigurationError, Requires
from qtasks.asyncio import QueueTasks
from qtasks.client import requirements
from qtasks_core import Guarantees
from qtasks_core.schemas import Order, Survives
from qtasks_memory import MemoryBroker, MemoryStorage
from tests.processes import PATIENCE
from tests.services import Service


@asynccontextmanager
async def administered(service: Service) -> AsyncIterator[Redis]:
    """Yield a client; afterwards, the server has its settings again."""
    server: Redis = Redis.from_url(service.url)
    before = await server.config_get("append*")
    try:
        yield server
    finally:
        await server.aclose()
        async with Redis.from_url(service.url) as again:  # the server may have been restarted
            for name in ("appendonly", "appendfsync"):
                await again.config_set(name, str(before[name]))


async def change(server: Redis, name: str, value: str) -> None:
    """Change a setting and cut the connections of all others, as a restart does."""
    await server.config_set(name, value)
    await server.client_kill_filter(_type="normal", skipme=True)


class Bank:
    """An app with a task that requires something, and one that does not."""

    def __init__(self, url: str, survives: Survives) -> None:
        self.app = QueueTasks(f"bank-{uuid4().hex[:8]}", url)
        self.opened = asyncio.Event()
        """The task `charge` waits for it."""

        @self.app.task(name="charge", requires=Requires(survives=survives))
        async def charge(order: int) -> int:
            await self.opened.wait()
            return order

        @self.app.task(name="greet")
        async def greet() -> str:
            return "hello"

        self.charge, self.greet = charge, greet

    async def refusal(self) -> str:
        """Enqueue tasks until one is refused; return why."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await self.charge.add_task(0)
                except ConfigurationError as error:
                    return str(error)

    async def accepted(self) -> None:
        """Enqueue tasks until one is not refused."""
        async with asyncio.timeout(PATIENCE):
            while True:
                with suppress(ConfigurationError):
                    await self.charge.add_task(0)
                    return


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "qtasks" and r.levelno == level]


async def test_a_client_on_redis(
    redis_server: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "FRESH", 0.05)
    bank = Bank(redis_server.url, "server crash")
    async with administered(redis_server) as server, bank.app:
        await bank.charge.add_task(1)
        await change(server, "appendonly", "no")
        why = await bank.refusal()
        assert why.startswith(
            f"'charge' is not enqueued: the servers of the app {bank.app.name!r} have changed "
            "since its start. charge requires survives='server crash', but RedisBroker has "
            "survives='client crash' (appendonly no: at most snapshots); set appendonly yes, "
        )
        for call in (bank.charge.add_task(1), bank.app.add_tasks([bank.charge.call(1)])):
            with pytest.raises(ConfigurationError, match="'charge' is not enqueued"):
                await call
        with pytest.raises(ConfigurationError, match="'charge' is not enqueued"):
            await bank.charge.add_task(1, timeout=PATIENCE)
        # Other tasks go on, also those of one batch.
        await asyncio.gather(*(bank.greet.add_task() for _ in range(3)))
        batch = [bank.greet.add_task(), bank.charge.add_task(2), bank.greet.add_task()]
        results = await asyncio.gather(*batch, return_exceptions=True)
        assert [isinstance(r, ConfigurationError) for r in results] == [False, True, False]
        # Once for each server that has changed, however many tasks were refused.
        for part in ("RedisBroker", "RedisStorage"):
            (line,) = [line for line in said(caplog, logging.ERROR) if f"but {part} " in line]
            assert f"the servers of the app {bank.app.name!r} have changed: charge requires" in line
            assert line.endswith("not enqueued any more; those in the queues still run")
        await change(server, "appendonly", "yes")
        await bank.accepted()
        again = f"the servers of the app {bank.app.name!r} guarantee again what is required"
        assert said(caplog, logging.WARNING).count(again) == 1
        assert len(said(caplog, logging.ERROR)) == 2


async def test_after_an_outage_the_first_call_compares(
    redis_server: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "FRESH", math.inf)
    bank = Bank(redis_server.url, "machine crash")
    async with administered(redis_server) as server:
        await server.config_set("appendfsync", "always")
        async with bank.app:
            await bank.charge.add_task(1)
            await asyncio.to_thread(redis_server.kill)
            try:
                during = asyncio.create_task(bank.charge.add_task(2))
                # The call must have seen the outage, or it is accepted before anybody can know.
                await until(lambda: bank.app.client.requirements.asked_at is None)
            finally:
                await asyncio.to_thread(redis_server.restart)  # with the settings of its start
            with pytest.raises(
                ConfigurationError, match=r"survives='server crash' \(appendonly yes"
            ):
                await during


async def test_a_worker_on_redis(
    redis_server: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "PERIOD", 0.1)
    bank = Bank(redis_server.url, "server crash")
    async with administered(redis_server) as server, bank.app.worker(concurrency=1) as worker:
        await until(lambda: worker.ready)
        running, waiting = await bank.app.add_tasks([bank.charge.call(1), bank.charge.call(2)])
        await change(server, "appendonly", "no")
        await until(lambda: not worker.ready and len(said(caplog, logging.ERROR)) == 2)
        # What was enqueued is run all the same.
        bank.opened.set()
        for task, order in ((running, 1), (waiting, 2)):
            assert (await task.wait_result(timeout=PATIENCE)).returning == order
        assert not worker.ready
        await change(server, "appendonly", "yes")
        await until(lambda: worker.ready)


async def test_postgres(postgres_server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "FRESH", 0.05)
    name = f"bank_{uuid4().hex}"
    url = urlsplit(postgres_server.url)._replace(path=f"/{name}").geturl()
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f"CREATE DATABASE {name}")
    bank = Bank(url, "machine crash")

    async def change_to(setting: str) -> None:
        await admin.execute(f"ALTER DATABASE {name} SET synchronous_commit = {setting}")
        await admin.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name
        )

    try:
        async with bank.app:
            await bank.charge.add_task(1)
            await change_to("off")
            why = await bank.refusal()
            assert "survives='client crash' (fsync=on, synchronous_commit=off, full_page_" in why
            own = await asyncpg.connect(url)
            async with own.transaction():
                with pytest.raises(ConfigurationError, match="'charge' is not enqueued"):
                    await bank.charge.add_task(1, transaction=own)
                await bank.greet.add_task(transaction=own)
            await own.close()
            await change_to("on")
            await bank.accepted()
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


class Fading(MemoryBroker):
    """A broker whose server loses a setting, and that counts how often it was asked."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.asked = 0
        self.order: Order = "queue"

    @property
    def guarantees(self) -> Guarantees:
        return replace(super().guarantees, part="Fading", order=self.order)

    async def refresh(self) -> None:
        self.asked += 1


async def test_what_the_app_requires_it_requires_for_all_its_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requirements, "FRESH", 0.0)
    broker = Fading(uuid4().hex)
    requires = Requires(order="queue")
    app = QueueTasks("shop", broker, MemoryStorage(uuid4().hex), requires=requires)

    @app.task(name="one")
    async def one() -> None: ...

    async with app:
        await one.add_task()
        broker.order = "partition"
        with pytest.raises(
            ConfigurationError, match=r"'one' is not enqueued: .* the app requires o"
        ):
            await one.add_task()
        with pytest.raises(ConfigurationError, match="late requires order='queue'"):

            @app.task(name="late", requires=requires)
            async def late() -> None: ...

        assert "late" not in app.definitions


async def test_nothing_is_asked_where_nothing_is_required() -> None:
    name = uuid4().hex
    broker = Fading(name)
    app = QueueTasks("shop", broker, MemoryStorage(name))

    @app.task(name="one")
    async def one() -> int:
        return 1

    async with app.worker():
        assert (await one.add_task(timeout=PATIENCE)).returning == 1
    assert broker.asked == 0

"""How much is logged of a server that is away, or well: by QTasks and by its driver."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from uuid import uuid4

import pytest

from qtasks.asyncio import QueueTasks
from tests.life.app import pid
from tests.life.setting import Setting
from tests.pairs import Pair
from tests.processes import until
from tests.services import Service

SERVERS = ("redis", "postgres", "rabbitmq", "kafka")
DEAD = {
    "redis": "redis://127.0.0.1:1/0",
    "postgres": "postgresql://u:p@127.0.0.1:1/x",
    "rabbitmq": "amqp://127.0.0.1:1/",
    "kafka": "kafka://127.0.0.1:1",
}
DRIVERS = ("redis", "asyncpg", "aio_pika", "aiormq", "aiokafka")


@pytest.fixture(autouse=True)
def unset() -> Iterator[None]:
    """Let no test leave a driver's logger set."""
    yield
    for name in DRIVERS:
        logging.getLogger(name).setLevel(logging.NOTSET)


class Count(logging.Handler):
    """Counts what is logged, by the package whose logger it was."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")

    def of(self, *packages: str) -> list[str]:
        return [line for line in self.lines if line.partition(":")[0].split(".")[0] in packages]


@pytest.fixture
def count() -> Iterator[Count]:
    handler = Count()
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


async def attempts(url: str, number: int) -> None:
    """Fail to start so many times: what a driver says at each attempt adds up."""
    app = QueueTasks(f"logs-{uuid4().hex[:8]}", url)
    starting = asyncio.create_task(app.start(60.0))
    made, enough = 0, asyncio.Event()
    wake_up = asyncio.get_running_loop().call_soon_threadsafe
    part = type(app.broker)
    begin = part.start

    async def counted(self: object, namespace: str) -> None:
        nonlocal made
        made += 1
        if made >= number:
            wake_up(enough.set)  # from the I/O thread
        await begin(app.broker, namespace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part, "start", counted)
        async with asyncio.timeout(60):
            await enough.wait()
    starting.cancel()
    await asyncio.wait({starting})
    await app.stop()  # waits for what was cancelled, which goes on for a moment on the I/O thread


@pytest.mark.parametrize("server", SERVERS)
async def test_a_dead_server_is_a_line_of_qtasks_and_at_most_one_of_its_driver(
    server: str, count: Count
) -> None:
    await attempts(DEAD[server], 6)
    assert len(count.of("qtasks")) == 1, count.lines
    assert len(count.of(*DRIVERS)) <= 1, count.lines


@pytest.mark.parametrize("server", ["rabbitmq", "kafka"])
async def test_a_driver_whose_logger_is_set_says_what_it_likes(server: str, count: Count) -> None:
    for name in DRIVERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    await attempts(DEAD[server], 4)
    assert len(count.of(*DRIVERS)) >= 4, count.lines


async def test_a_driver_is_as_it_was_after_the_stop(count: Count) -> None:
    heard = logging.getLogger("aiormq.connection")
    async with QueueTasks(f"logs-{uuid4().hex[:8]}", "memory://", "memory://"):
        heard.warning("not used")
    assert len(count.of("aiormq")) == 1
    with pytest.raises(Exception, match="cannot be reached"):
        await QueueTasks("logs", DEAD["rabbitmq"]).start(0.0)
    count.lines.clear()
    heard.warning("not used any more")
    assert len(count.of("aiormq")) == 1


@pytest.mark.full
@pytest.mark.parametrize("server", SERVERS)
async def test_an_outage_of_a_minute_and_a_time_without_one(
    server: str, request: pytest.FixtureRequest
) -> None:
    service: Service = request.getfixturevalue(f"{server}_server")
    setting = Setting(Pair(service.url, service.url, 30.0))
    async with setting.app() as app:
        with setting.worker() as worker:
            await pid.using(app).add_task(timeout=120)
            well = said(worker.output())
            assert well == [], "nothing is wrong"
            service.kill()
            await asyncio.to_thread(until, lambda: said(worker.output()) != [], "a line")
            await asyncio.sleep(65)
            service.restart()
            await pid.using(app).add_task(timeout=60)
            lines = said(worker.output())
    # At the begin, once a minute, at the end: of the worker, its driver, what reads beside it.
    assert len(lines) <= 10, "\n".join(lines)


def said(output: str) -> list[str]:
    return [line for line in output.splitlines() if " WARNING " in line or " ERROR " in line]

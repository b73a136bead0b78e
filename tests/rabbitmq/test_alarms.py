"""A server that runs out of memory or disk blocks those who publish: an outage, not a hang."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from qtasks_core import DONE, Ack, Task
from qtasks_core.errors import Unavailable
from qtasks_rabbitmq import RabbitMQBroker, RabbitMQStorage
from tests.rabbitmq.test_broker import collect, message
from tests.rabbitmq.test_channels import patient
from tests.services.rabbitmq import RabbitMQServer

MOST_SECONDS = 240

Alarm = Callable[[str], None]


@pytest.fixture
def alarm(rabbitmq_server: RabbitMQServer) -> Iterator[Alarm]:
    """Raise an alarm for a resource, or end it with an empty name."""
    raised: list[str] = []

    def turn(name: str) -> None:
        while raised:
            ended = raised.pop()
            rabbitmq_server.control(
                "eval", f"rabbit_alarm:clear_alarm({{resource_limit, {ended}, node()}})."
            )
        if name:
            rabbitmq_server.control(
                "eval", f"rabbit_alarm:set_alarm({{{{resource_limit, {name}, node()}}, []}})."
            )
            raised.append(name)

    yield turn
    turn("")


@pytest.mark.parametrize("resource", ["memory", "disk"])
async def test_an_alarm_is_an_outage_of_publishers_that_ends_by_itself(
    rabbitmq_server: RabbitMQServer, namespace: str, alarm: Alarm, resource: str
) -> None:
    """Those who receive and settle work on."""
    broker = RabbitMQBroker(rabbitmq_server.url, lease=300.0)
    storage = RabbitMQStorage(rabbitmq_server.url)
    record = Task(uuid="u", task_name="t", status="success")
    try:
        await broker.start(namespace)
        await storage.start(namespace)
        subscription = await broker.subscribe({"q": 1})
        await broker.publish([message(), message()])
        held = await collect(subscription, "q", 1)
        await asyncio.to_thread(alarm, resource)  # else the leases would be lost meanwhile
        async with asyncio.timeout(MOST_SECONDS):
            with pytest.raises(Unavailable, match=f"takes no messages now: low on {resource}"):
                await broker.publish([message()])
            with pytest.raises(Unavailable, match=f"takes no messages now: low on {resource}"):
                await storage.save([record])
            assert await subscription.extend(held) == held
            await subscription.settle([Ack(held[0])])
            held = await collect(subscription, "q", 1)
            await asyncio.to_thread(alarm, "")
            # What was written before the alarm counts only when it is confirmed.
            assert await patient(broker.publish, [message()]) == [DONE]
            (saved,) = await patient(storage.save, [record])
            assert saved.status == "done"
            assert await subscription.extend(held) == held
    finally:
        await broker.stop()
        await storage.stop()

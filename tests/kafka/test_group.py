"""A member of a group that wants partitions, or none, at any moment of a rebalance."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from qtasks_core import DONE, Ack
from qtasks_kafka import KafkaBroker
from qtasks_kafka.assignor import KeepingAssignor
from qtasks_kafka.subscription import KafkaSubscription
from tests.kafka.test_control import MOST_SECONDS, collect, messages, uuids
from tests.services import Service


async def test_who_wants_partitions_again_during_a_rebalance_gets_them(
    kafka_server: Service, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has told the group that it wants none, and the driver forgets what comes meanwhile."""
    broker = KafkaBroker(kafka_server.url, lease=6.0, partitions=2)
    await broker.start(namespace)
    try:
        subscription = await broker.subscribe({"q": 1})
        assert isinstance(subscription, KafkaSubscription)
        await broker.publish(messages("before", 1))
        (delivery,) = await collect(subscription, 1)
        assert await subscription.settle([Ack(delivery)]) == [DONE]
        member, assign = subscription._member, KeepingAssignor.assign

        def assigning(*arguments: Any) -> Any:
            member.want(True)
            return assign(*arguments)

        monkeypatch.setattr(KeepingAssignor, "assign", assigning)
        member.want(False)  # as after some seconds without a receive
        async with asyncio.timeout(MOST_SECONDS):
            await member.changed
        await broker.publish(messages("after", 4))
        assert uuids(await collect(subscription, 4)) == {f"after{n}" for n in range(4)}
    finally:
        await broker.stop()

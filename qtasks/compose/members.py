"""The brokers that another one is made of, and the subscriptions at them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from qtasks_core import Broker, Subscription
from qtasks_core.errors import Closed
from qtasks_core.receivers import Shielded

PAUSE = 1.0
"""Seconds before a broker that has failed is asked again, while others are there."""


class Member:
    """One of the brokers. It is started when it is first needed, so others need not wait for it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.away_until = 0.0
        """The monotonic time before which `ComposedBroker.at_one` prefers another one."""
        self._namespace: str | None = None
        self._starting: asyncio.Lock | None = None
        self._started = False

    async def ready(self) -> Broker:
        """Return the broker, started. Raises the errors of `Broker.start`, and `Closed`."""
        if self._namespace is None or self._starting is None:
            raise Closed("the broker is not started, or stopped")
        if not self._started:
            async with self._starting:
                if not self._started:
                    await self.broker.start(self._namespace)
                    self._started = True
        return self.broker

    async def start(self, namespace: str) -> None:
        """Start the broker."""
        self._namespace, self._starting = namespace, asyncio.Lock()
        await self.ready()

    async def stop(self) -> None:
        """Stop the broker. Idempotent."""
        self._namespace, self._started = None, False
        await self.broker.stop()


class Branch:
    """What a subscription has of one member. It is opened when the member is there."""

    def __init__(self, member: Member, queues: Mapping[str, int]) -> None:
        self.member = member
        self.queues = queues
        self.retry_at = 0.0
        """The time of the loop before which it is not asked again, if another one can be asked."""
        self.away = False
        """Whether its last call of `receive` has failed."""
        self._opening: Shielded[Subscription] = Shielded()
        self._subscription: Subscription | None = None

    async def subscription(self) -> Subscription:
        """Return the member's subscription. Raises the errors of `Broker.subscribe`."""
        if self._subscription is None:
            # Others answer meanwhile, and so cancel the caller again and again.
            self._subscription = await self._opening.run(self._open)
        return self._subscription

    async def _open(self) -> Subscription:
        return await (await self.member.ready()).subscribe(self.queues)

    async def close(self) -> None:
        """Close the subscription, if there is one."""
        subscription = self._subscription or await self._opening.abandon()
        if subscription is not None:
            await subscription.close()

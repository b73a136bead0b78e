"""What the broker in memory holds on to."""

from __future__ import annotations

import gc
from weakref import ref

from qtasks_memory import MemoryBroker


async def test_a_subscription_that_is_closed_is_let_go() -> None:
    broker = MemoryBroker()
    await broker.start("lets-go")
    subscription = await broker.subscribe({"q": 1})
    await subscription.close()
    kept = ref(subscription)
    del subscription
    gc.collect()
    assert kept() is None
    await broker.stop()

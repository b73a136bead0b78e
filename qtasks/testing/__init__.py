"""Helpers for your tests: an app in memory, what it has enqueued, and a clock that you move.

    from qtasks.testing import AsyncTester

    async def test_order() -> None:
        with AsyncTester(app) as tester:
            await place_order("tea")
            assert tester.enqueued(send_mail, args=["ann@example.com"])
            await tester.drain()

`qtasks.testing.pytest` has fixtures, also for servers.
"""

from qtasks.testing.enqueued import Enqueued, EnqueuedCall
from qtasks.testing.testers import AsyncTester, SyncTester

__all__ = ["AsyncTester", "Enqueued", "EnqueuedCall", "SyncTester"]

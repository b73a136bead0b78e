"""A connection that is cut after any number of bytes, in the middle of a call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar, get_args
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from qtasks_core import DONE, Ack, Broker, Completion, Delivery, Storage, Task, TaskMessage
from qtasks_core.errors import Unavailable
from qtasks_core.lookup import resolve_broker, resolve_storage
from qtasks_core.separate import compose
from tests.faults.proxy import Direction, Proxy
from tests.pairs import LEASES, SERVERS, with_lease
from tests.services import KafkaServer, Service

T = TypeVar("T")
CALLS = ("submit", "receive", "extend", "complete", "get")
PATIENCE = 120.0
"""Seconds for what takes a few on an idle machine."""
QUIET = max(LEASES.values()) + 2.0
"""Seconds without a delivery after which nothing can be left."""
MOST = 1_000_000
"""Bytes; more than any of the calls sends or gets."""


def ladder(full: bool) -> Iterator[int]:
    """Yield byte counts: each once at the beginning, where headers are, then in growing steps."""
    at = 0
    while at < MOST:
        yield at
        at = max(at + 1, int(at * (1.25 if full else 4)))


class Trial:
    """Calls on a pair behind a proxy that cuts them, and a pair that is not cut."""

    def __init__(self, proxy: Proxy, cut: tuple[Broker, Storage], whole: tuple[Broker, Storage]):
        self.proxy = proxy
        self.broker, self.storage = cut
        self.pair, self.whole = compose(*cut), compose(*whole)
        self.published: set[str] = set()
        self.cuts = 0
        self._to_cut = ""

    async def subscribe(self) -> None:
        self.subscription = await again(lambda: self.broker.subscribe({"q": 10}))

    async def go(self, name: str, at: int, direction: Direction) -> bool:
        """Let three tasks go their way, and cut the call of that name after `at` bytes.

        Returns whether it was cut: it may need fewer bytes.
        """
        self._to_cut, self._at, self._direction, self._was_cut = name, at, direction, False
        messages = [
            TaskMessage(uuid=str(uuid4()), task_name="t", queue="q", created_at=time.time())
            for _ in range(3)
        ]
        left = {message.uuid for message in messages}
        get = partial(self.storage.get, sorted(left))
        self.published |= left
        async with asyncio.TaskGroup() as group:
            if name == "receive":  # it waits before they come
                group.create_task(again(partial(self.whole.submit, messages)))
            else:
                outcomes = await self.make("submit", partial(self.pair.submit, messages))
                assert outcomes == [DONE] * 3
            while left:
                held = await self.make("receive", self.receive)
                await self.make("extend", partial(self.subscription.extend, held))
                await self.make("complete", partial(self.complete, held))
                left -= {uuid_of(delivery) for delivery in held}
        records = await self.make("get", get)
        assert [record and record.status for record in records] == ["success"] * 3
        return self._was_cut

    async def make(self, name: str, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call, again if it raises `Unavailable`. Cut it if it is the one to be cut."""
        if name == self._to_cut:
            self._to_cut = ""
            self.proxy.cut_after(self._at, self._direction)
            try:
                async with asyncio.timeout(PATIENCE):
                    return await call()
            except Unavailable:
                assert self.proxy.was_cut, "a call failed without a cut"
            finally:
                self._was_cut = self.proxy.was_cut
                self.cuts += self._was_cut
                self.proxy.disarm()
        return await again(call)

    async def receive(self) -> list[Delivery]:
        return await self.subscription.receive({"q": 3}, 3)

    async def complete(self, deliveries: Sequence[Delivery]) -> None:
        assert {uuid_of(delivery) for delivery in deliveries} <= self.published
        completions = [
            Completion(
                Ack(delivery),
                Task(uuid=uuid, task_name="t", queue="q", status="success", execution=uuid),
            )
            for delivery in deliveries
            for uuid in [uuid_of(delivery)]
        ]
        # The same run records the same again, so it is never refused.
        outcomes = await self.pair.complete(self.subscription, completions)
        assert {outcome.status for outcome in outcomes} == {"done"}

    async def empty(self) -> None:
        """Wait until no message is left; complete what is delivered again."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    async with asyncio.timeout(QUIET):
                        held = await again(self.receive)
                except TimeoutError:
                    return
                await again(partial(self.complete, held))


def uuid_of(delivery: Delivery) -> str:
    assert isinstance(delivery.message, TaskMessage)
    return delivery.message.uuid


async def again(call: Callable[[], Awaitable[T]]) -> T:
    """Call until it does not raise `Unavailable`, as the engine does."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.02)


@pytest.fixture
async def trial(request: pytest.FixtureRequest, backend: str) -> AsyncIterator[Trial]:
    server: Service = request.getfixturevalue(f"{backend}_server")
    port = urlsplit(server.url).port
    assert port is not None
    to, listening = server.proxied() if isinstance(server, KafkaServer) else (port, 0)
    lease, namespace = LEASES[backend], f"cut-{uuid4().hex[:8]}"
    async with Proxy(to, listening) as proxy:
        through = server.url.replace(f":{port}", f":{proxy.port}")
        cut, whole = [
            (resolve_broker(with_lease(url, lease)), resolve_storage(url))
            for url in (through, server.url)
        ]
        parts: list[Broker | Storage] = [*cut, *whole]
        try:
            for part in parts:
                await again(partial(part.start, namespace))
            trial = Trial(proxy, cut, whole)
            await trial.subscribe()
            yield trial
        finally:
            for part in parts:
                await part.stop()


@pytest.mark.parametrize("backend", SERVERS)
@pytest.mark.parametrize(
    "full",
    [pytest.param(False, id="short"), pytest.param(True, id="long", marks=pytest.mark.full)],
)
async def test_a_call_that_is_cut_loses_nothing(trial: Trial, backend: str, full: bool) -> None:
    """Each call returns or raises `Unavailable`; repeated, it succeeds."""
    for call in CALLS:
        for direction in get_args(Direction):
            for at in ladder(full):
                if not await trial.go(call, at, direction):
                    break
            else:
                pytest.fail(f"{call} was cut after any number of bytes")
    await trial.empty()
    print(f"{trial.cuts} cuts, {len(trial.published)} tasks")
    assert trial.cuts >= 2 * len(CALLS)

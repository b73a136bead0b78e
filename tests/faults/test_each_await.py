"""A fault at each await of each call, one after the other. The call is then made again.

A fault is a cancel, or a broken connection; it comes instead of the awaited operation (early), or
instead of its answer (late). `receive`, `settle`, `extend` and `publish` have such tests in the
kit. A part may make its calls in tasks of its own, whose awaits no test sees: so the connection of
each call is also cut after so many bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from msgspec.structs import replace

from qtasks_conformance.contracts.faults import Fault, Faulted, Kind, Moment
from qtasks_core import (
    DONE,
    Ack,
    Broker,
    Command,
    Completion,
    Delivery,
    Release,
    Retry,
    Settlement,
    Status,
    Storage,
    Subscription,
    Task,
    TaskMessage,
    TaskQuery,
)
from qtasks_core.errors import Unavailable
from qtasks_core.lookup import resolve_broker, resolve_storage
from qtasks_core.separate import compose
from tests.faults.proxy import Direction, Proxy
from tests.pairs import Pair, pair_of

T = TypeVar("T")
Call = Callable[[], Awaitable[T]]
PATIENCE = 120.0
"""Seconds for what takes less than one on an idle machine."""
LONG = 3600.0
"""Seconds: nothing here may have to wait for so long."""
PLACES = 8
"""How many awaits of each call are tried without `--full`, and of each start with it."""
MOST_PLACES = 200
"""How many awaits a call may have."""
MOST_BYTES = 16_000
"""After how many bytes a call is cut at most."""


@dataclass
class Cut:
    """After how many bytes a call is cut, and whether it was."""

    proxy: Proxy
    direction: Direction
    at: int
    reached: bool = False


class World:
    """A pair whose calls get a fault, and a pair whose calls get none, in one namespace."""

    def __init__(self, pair: Pair, through: Pair | None = None) -> None:
        self.namespace = f"await-{uuid4().hex[:8]}"
        self._urls, self._through = pair, through or pair
        self.queue = ""
        self.fault: Fault | Cut
        self._opened: dict[str, Subscription] = {}

    def parts(self) -> tuple[Broker, Storage]:
        return _resolved(self._through)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.broker, self.storage = self.parts()
        self.other_broker, self.other = _resolved(self._urls)
        parts = self.broker, self.storage, self.other_broker, self.other
        try:
            for part in parts:
                await again(partial(part.start, self.namespace))
            self.pair = compose(self.broker, self.storage)
            self.other_pair = compose(self.other_broker, self.other)
            yield
        finally:
            for part in parts:
                await part.stop()

    def lacks(self, method: str) -> bool:
        """Return whether this pair does not have a method."""
        unsupported = self.broker.guarantees.unsupported + self.storage.guarantees.unsupported
        return method in unsupported

    async def fail(self, call: Callable[[], Awaitable[T]]) -> T | None:
        """Make a call with the fault. Return its result, or None if it raised because of it.

        A busy server may not answer before the fault comes. Then the call is made again.
        """
        if isinstance(self.fault, Cut):
            return await self._cut(call, self.fault)
        fault = self.fault

        async def step() -> T:
            return await call()

        async def make() -> T:
            return await Faulted(step(), fault)

        async with asyncio.timeout(2 * PATIENCE):
            while True:
                making = asyncio.create_task(make())
                await asyncio.wait({making}, timeout=PATIENCE)
                assert making.done(), "the call hangs"
                if making.cancelled():
                    assert fault.kind == "cancel", "it raises CancelledError, and nobody cancelled"
                    return None
                error = making.exception()
                if error is None:
                    return making.result()
                if isinstance(error, Unavailable) and not fault.reached:
                    continue
                assert fault.reached, f"an error without a fault: {error!r}"
                assert fault.kind == "error", f"a cancel became {error!r}"
                assert isinstance(error, (Unavailable, ConnectionResetError)), repr(error)
                return None

    async def _cut(self, call: Call[T], fault: Cut) -> T | None:
        fault.proxy.cut_after(fault.at, fault.direction)
        try:
            async with asyncio.timeout(PATIENCE):
                return await call()
        except Unavailable:
            assert fault.proxy.was_cut, "a call failed without a cut"
            return None
        finally:
            fault.reached |= fault.proxy.was_cut
            fault.proxy.disarm()

    def message(self, **more: Any) -> TaskMessage:
        return TaskMessage(
            uuid=str(uuid4()), task_name="t", queue=self.queue, created_at=time.time(), **more
        )

    async def subscription(self) -> Subscription:
        """Return the subscription to the queue of this case. Its calls get no fault by itself."""
        if self.queue not in self._opened:
            subscribe = partial(self.broker.subscribe, {self.queue: 10})
            self._opened[self.queue] = await again(subscribe)
        return self._opened[self.queue]

    async def submitted(self, count: int = 1) -> list[TaskMessage]:
        messages = [self.message() for _ in range(count)]
        assert await again(partial(self.other_pair.submit, messages)) == [DONE] * count
        return messages

    async def received(self, uuid: str) -> Delivery:
        """Receive one message; complete what else is delivered."""
        subscription = await self.subscription()
        async with asyncio.timeout(PATIENCE):
            while True:
                found = None
                for delivery in await again(partial(subscription.receive, {self.queue: 10}, 10)):
                    if uuid_of(delivery) == uuid and found is None:
                        found = delivery
                    else:
                        await again(partial(subscription.settle, [Ack(delivery)]))
                if found:
                    return found

    async def finish(self, uuids: Iterable[str], subscription: Subscription | None = None) -> None:
        """Run all of these tasks, as a worker does, and see that each is recorded."""
        subscription = subscription or await self.subscription()
        left = set(uuids)
        receive = partial(subscription.receive, {self.queue: 10}, 10)
        async with asyncio.timeout(PATIENCE):
            while left:
                held = await again(receive)
                verdicts = await again(partial(self.pair.admit, held))
                for delivery, (verdict, _) in zip(held, verdicts, strict=True):
                    uuid = uuid_of(delivery)
                    settlement: Settlement = Ack(delivery)
                    task = task_of(delivery, "success") if verdict == "run" else None
                    completion = Completion(settlement, task)
                    await again(partial(self.pair.complete, subscription, [completion]))
                    left.discard(uuid)
        for record in await again(partial(self.other.get, list(uuids))):
            assert record is not None
            assert record.status == "success"

    def final(self, **more: Any) -> Task:
        return Task(
            uuid=str(uuid4()), task_name="t", status="success", execution="this",
            created_at=time.time(), finished_at=time.time(), **more,
        )  # fmt: skip


def _resolved(pair: Pair) -> tuple[Broker, Storage]:
    return resolve_broker(pair.broker), resolve_storage(pair.storage)


def uuid_of(delivery: Delivery) -> str:
    assert isinstance(delivery.message, TaskMessage)
    return delivery.message.uuid


def task_of(delivery: Delivery, status: Status) -> Task:
    message = delivery.message
    assert isinstance(message, TaskMessage)
    return Task(
        uuid=message.uuid, task_name="t", queue=message.queue, status=status,
        attempt=message.attempt, execution="this", reply_to=message.reply_to,
    )  # fmt: skip


async def again(call: Call[T]) -> T:
    """Call until it does not raise `Unavailable`, as the engine does."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return await call()
            except Unavailable:
                await asyncio.sleep(0.02)


async def until_ended(before: set[asyncio.Task[Any]]) -> None:
    """Wait until no other tasks run than before."""
    async with asyncio.timeout(PATIENCE):
        while left := asyncio.all_tasks() - before:
            await asyncio.wait(left)


# The cases. Each makes one call with a fault, makes it again, and checks what it has done.


async def start_a_broker(world: World) -> None:
    before = asyncio.all_tasks()
    broker, _ = world.parts()
    start = partial(broker.start, world.namespace)
    await world.fail(start)
    await broker.stop()
    await until_ended(before)
    await again(start)
    messages = [world.message()]
    assert await again(partial(broker.publish, messages)) == [DONE]
    await broker.stop()
    await until_ended(before)
    await world.finish([messages[0].uuid])


async def start_a_storage(world: World) -> None:
    before = asyncio.all_tasks()
    _, storage = world.parts()
    start = partial(storage.start, world.namespace)
    await world.fail(start)
    await storage.stop()
    await until_ended(before)
    await again(start)
    assert await again(partial(storage.save, [world.final()])) == [DONE]
    await storage.stop()
    await until_ended(before)


async def stop_a_broker(world: World) -> None:
    before = asyncio.all_tasks()
    broker, _ = world.parts()
    await again(partial(broker.start, world.namespace))
    subscription = await again(partial(broker.subscribe, {world.queue: 10}))
    uuids = {message.uuid for message in await world.submitted(3)}
    (held,) = await again(partial(subscription.receive, {world.queue: 1}, 1))
    assert await again(partial(subscription.settle, [Ack(held)])) == [DONE]
    await world.fail(broker.stop)
    await again(broker.stop)
    await until_ended(before)
    await world.finish(uuids - {uuid_of(held)})


async def stop_a_storage(world: World) -> None:
    before = asyncio.all_tasks()
    _, storage = world.parts()
    await again(partial(storage.start, world.namespace))
    inbox = await again(storage.inbox)
    await again(partial(inbox.watch, [str(uuid4())]))
    await world.fail(storage.stop)
    await again(storage.stop)
    await until_ended(before)


async def migrate_a_broker(world: World) -> None:
    migrate = partial(world.broker.migrate, world.namespace)
    await world.fail(migrate)
    await again(migrate)
    assert await again(migrate) == []


async def migrate_a_storage(world: World) -> None:
    migrate = partial(world.storage.migrate, world.namespace)
    await world.fail(migrate)
    await again(migrate)
    assert await again(migrate) == []


async def clock(world: World) -> None:
    for part in (world.broker, world.storage):
        await world.fail(part.clock)
        await again(part.clock)


async def refresh(world: World) -> None:
    for part in (world.broker, world.storage):
        before = part.guarantees
        await world.fail(part.refresh)
        await again(part.refresh)
        assert part.guarantees == before


async def publish(world: World) -> None:
    messages = [world.message(), world.message(delay=0.01)]
    call = partial(world.broker.publish, messages)
    await world.fail(call)
    assert await again(call) == [DONE, DONE]
    await world.finish([message.uuid for message in messages])


async def settle(world: World) -> None:
    messages = {message.uuid: message for message in await world.submitted(3)}
    subscription = await world.subscription()
    held: dict[str, Delivery] = {}
    async with asyncio.timeout(PATIENCE):
        while not messages.keys() <= held.keys():
            for delivery in await again(partial(subscription.receive, {world.queue: 10}, 10)):
                held[uuid_of(delivery)] = delivery
    acked, retried, released = messages
    ends: list[Settlement] = [
        Ack(held[acked]),
        Retry(held[retried], replace(messages[retried], attempt=2)),
        Release(held[released]),
    ]
    call = partial(subscription.settle, ends)
    await world.fail(call)
    await again(call)  # what is refused may have had its effect in the first call
    await world.finish({retried, released})


async def subscribe(world: World) -> None:
    uuids = [message.uuid for message in await world.submitted(2)]
    call = partial(world.broker.subscribe, {world.queue: 10})
    subscription = await world.fail(call)
    if subscription is None:
        subscription = await again(call)
    await world.finish(uuids, subscription)
    await again(subscription.close)


async def close_a_subscription(world: World) -> None:
    uuids = [message.uuid for message in await world.submitted(3)]
    subscription = await again(partial(world.broker.subscribe, {world.queue: 10}))
    (held,) = await again(partial(subscription.receive, {world.queue: 1}, 1))
    await world.fail(subscription.close)
    await again(subscription.close)
    ends = [Completion(Ack(held), task_of(held, "success"))]
    await again(partial(world.pair.complete, subscription, ends))
    await world.finish(set(uuids) - {uuid_of(held)})


async def depth(world: World) -> None:
    uuids = [message.uuid for message in await world.submitted(2)]
    call = partial(world.broker.depth, world.queue)
    await world.fail(call)
    assert (await again(call)).ready in (2, None)
    await world.finish(uuids)


async def purge(world: World) -> None:
    await again(partial(world.broker.publish, [world.message(), world.message(delay=LONG)]))
    call = partial(world.broker.purge, world.queue)
    await world.fail(call)
    await again(call)
    async with asyncio.timeout(PATIENCE):
        while True:  # a cancelled call may still be at work, and not yet have deleted anything
            left = await again(partial(world.broker.depth, world.queue))
            if not left.ready and not left.delayed:
                break
    await world.finish([message.uuid for message in await world.submitted(1)])


async def broadcast(world: World) -> None:
    listened = asyncio.Event()
    heard = asyncio.Event()
    name = str(uuid4())

    async def listen() -> None:
        async for command in world.other_broker.commands():
            listened.set()
            if command.name == name:
                heard.set()

    listening = asyncio.create_task(listen())
    try:
        async with asyncio.timeout(PATIENCE):
            while not listened.is_set():
                await again(partial(world.other_broker.broadcast, Command(name="begin")))
                await asyncio.sleep(0.01)
            call = partial(world.broker.broadcast, Command(name=name))
            await world.fail(call)
            await again(call)
            await heard.wait()
    finally:
        listening.cancel()
        await asyncio.wait({listening})


async def commands(world: World) -> None:
    async def repeat() -> None:
        while True:
            await again(partial(world.other_broker.broadcast, Command(name="again")))
            await asyncio.sleep(0.01)

    repeating = asyncio.create_task(repeat())
    try:
        await world.fail(partial(anext, world.broker.commands()))
        command = await again(lambda: anext(world.broker.commands()))
        assert command.name == "again"
    finally:
        repeating.cancel()
        await asyncio.wait({repeating})


async def save(world: World) -> None:
    tasks = [world.final(), world.final(returning=b"x" * 10_000)]
    call = partial(world.storage.save, tasks)
    await world.fail(call)
    assert await again(call) == [DONE, DONE]
    assert await world.other.get([task.uuid for task in tasks]) == tasks


async def get(world: World) -> None:
    task = world.final()
    await again(partial(world.other.save, [task]))
    call = partial(world.storage.get, [task.uuid, "none"])
    await world.fail(call)
    assert await again(call) == [task, None]


async def query(world: World) -> None:
    task = replace(world.final(), task_name=f"t{uuid4().hex}")
    await again(partial(world.other.save, [task]))
    call = partial(world.storage.query, TaskQuery(task_name=task.task_name))
    await world.fail(call)
    assert [one.uuid for one in (await again(call)).tasks] == [task.uuid]


async def inbox(world: World) -> None:
    opened = await world.fail(world.storage.inbox)
    if opened is None:
        opened = await again(world.storage.inbox)
    task = world.final(reply_to=opened.address)
    opened.expect([task.uuid])
    await again(partial(world.other.save, [task]))
    assert [one.uuid for one in await again(opened.receive)] == [task.uuid]
    await again(opened.close)


async def watch(world: World) -> None:
    opened = await again(world.storage.inbox)
    early, late = world.final(), world.final()
    await again(partial(world.other.save, [early]))
    call = partial(opened.watch, [early.uuid, late.uuid])
    await world.fail(call)
    with suppress(Unavailable):  # it waits for them even then, once `receive` has reconnected
        await call()
    await again(partial(world.other.save, [late]))
    told: set[str] = set()
    while told < {early.uuid, late.uuid}:
        told |= {task.uuid for task in await again(opened.receive)}
    await again(opened.close)


async def receive_records(world: World) -> None:
    opened = await again(world.storage.inbox)
    tasks = [world.final(reply_to=opened.address), world.final(reply_to=opened.address)]
    opened.expect([task.uuid for task in tasks])
    told: set[str] = set()
    for task in tasks:
        await again(partial(world.other.save, [task]))
        told |= {one.uuid for one in await world.fail(opened.receive) or ()}
    while told < {task.uuid for task in tasks}:
        told |= {one.uuid for one in await again(opened.receive)}
    await again(opened.close)


async def close_an_inbox(world: World) -> None:
    opened = await again(world.storage.inbox)
    await again(partial(opened.watch, [str(uuid4())]))
    await world.fail(opened.close)
    await again(opened.close)
    await inbox(world)


async def claim(world: World) -> None:
    key = str(uuid4())
    call = partial(world.storage.claim, key, "mine", LONG)
    await world.fail(call)
    assert await again(call) is not None
    assert await again(partial(world.other.claim, key, "yours", LONG)) is None


async def release(world: World) -> None:
    key = str(uuid4())
    claimed = await again(partial(world.storage.claim, key, "mine", LONG))
    assert claimed is not None
    call = partial(world.storage.release, claimed)
    await world.fail(call)
    await again(call)
    assert await again(partial(world.other.claim, key, "yours", LONG)) is not None


async def set_a_value(world: World) -> None:
    key = str(uuid4())
    call = partial(world.storage.set, key, b"1", None)
    if not await world.fail(call):
        await again(call)  # False if the first call has set it
    assert await again(partial(world.other.get_value, key)) == b"1"
    assert not await again(call)


async def get_a_value(world: World) -> None:
    key = str(uuid4())
    await again(partial(world.other.set, key, b"1"))
    for call in (partial(world.storage.get_value, key), partial(world.storage.values, key)):
        await world.fail(call)
        assert await again(call) in (b"1", {key: b"1"})


async def watch_a_value(world: World) -> None:
    key = str(uuid4())
    await again(partial(world.other.set, key, b"1"))
    await world.fail(partial(anext, world.storage.watch_value(key)))
    watching = world.storage.watch_value(key)
    assert await anext(watching) == b"1"
    await again(partial(world.other.set, key, b"2"))
    assert await anext(watching) == b"2"
    changing = world.storage.watch_value(key)
    assert await anext(changing) == b"2"
    await again(partial(world.other.set, key, b"3"))
    await world.fail(partial(anext, changing))
    assert await anext(world.storage.watch_value(key)) == b"3"


async def append(world: World) -> None:
    uuid, items = str(uuid4()), [b"1", b"2"]
    call = partial(world.storage.append, uuid, items)
    await world.fail(call)
    await again(call)
    found = [item for _, item in await again(partial(world.other.read, uuid, 0))]
    assert found in (items, 2 * items)


async def read(world: World) -> None:
    uuid = str(uuid4())
    await again(partial(world.other.append, uuid, [b"1", b"2"]))
    call = partial(world.storage.read, uuid, 0)
    await world.fail(call)
    assert [item for _, item in await again(call)] == [b"1", b"2"]


async def delete(world: World) -> None:
    tasks = [world.final(), world.final()]
    uuids = [task.uuid for task in tasks]
    await again(partial(world.storage.save, tasks))
    call = partial(world.storage.delete, uuids)
    await world.fail(call)
    await again(call)
    assert await again(partial(world.other.get, uuids)) == [None, None]


async def expire(world: World) -> None:
    old = replace(world.final(retention=1.0), finished_at=time.time() - LONG)
    kept = world.final()
    await again(partial(world.storage.save, [old, kept]))
    await world.fail(world.storage.expire)
    await again(world.storage.expire)
    assert await again(partial(world.other.get, [old.uuid, kept.uuid])) == [None, kept]


async def submit(world: World) -> None:
    messages = [world.message(), world.message(delay=0.01)]
    call = partial(world.pair.submit, messages)
    await world.fail(call)
    assert await again(call) == [DONE, DONE]
    await world.finish([message.uuid for message in messages])


async def submit_with_a_key(world: World) -> None:
    """One of the submissions has the key, and only its messages run."""
    first = world.message(submission="first")
    await world.fail(partial(world.pair.submit, [first]))
    (outcome,) = await again(partial(world.pair.submit, [replace(first, submission="second")]))
    assert outcome.status in ("done", "taken")
    subscription = await world.subscription()
    ran: list[str] = []
    async with asyncio.timeout(PATIENCE):
        while not ran:
            held = await again(partial(subscription.receive, {world.queue: 10}, 10))
            verdicts = await again(partial(world.pair.admit, held))
            (record,) = await again(partial(world.other.get, [first.uuid]))
            assert record is not None
            for delivery, (verdict, _) in zip(held, verdicts, strict=True):
                assert isinstance(delivery.message, TaskMessage)
                if runs := verdict == "run":
                    ran.append(delivery.message.submission)
                    assert ran[-1] == record.submission
                ends = [Completion(Ack(delivery), task_of(delivery, "success") if runs else None)]
                await again(partial(world.pair.complete, subscription, ends))


async def admit(world: World) -> None:
    (message,) = await world.submitted()
    delivery = await world.received(message.uuid)
    call = partial(world.pair.admit, [delivery])
    await world.fail(call)
    assert [verdict for verdict, _ in await again(call)] == ["run"]
    subscription = await world.subscription()
    ends = [Completion(Ack(delivery), task_of(delivery, "success"))]
    await again(partial(world.pair.complete, subscription, ends))


async def complete(world: World) -> None:
    opened = await again(world.other.inbox)
    messages = [world.message(reply_to=opened.address), world.message()]
    opened.expect([messages[0].uuid])
    assert await again(partial(world.other_pair.submit, messages)) == [DONE, DONE]
    subscription = await world.subscription()
    held: dict[str, Delivery] = {}
    async with asyncio.timeout(PATIENCE):
        while len(held) < 2:
            for delivery in await again(partial(subscription.receive, {world.queue: 10}, 10)):
                held[uuid_of(delivery)] = delivery
    ends = [Completion(Ack(d), task_of(d, "success")) for d in held.values()]
    call = partial(world.pair.complete, subscription, ends)
    await world.fail(call)
    assert {outcome.status for outcome in await again(call)} == {"done"}
    records = await again(partial(world.other.get, list(held)))
    assert [record and record.status for record in records] == ["success"] * 2
    async with asyncio.timeout(PATIENCE):
        assert [task.uuid for task in await again(opened.receive)] == [messages[0].uuid]
    await again(opened.close)


async def complete_a_retry(world: World) -> None:
    (message,) = await world.submitted()
    delivery = await world.received(message.uuid)
    subscription = await world.subscription()
    next_attempt = replace(message, attempt=2)
    ends = [Completion(Retry(delivery, next_attempt), task_of(delivery, "retry"))]
    call = partial(world.pair.complete, subscription, ends)
    await world.fail(call)
    await again(call)  # it is refused where the first call had its effect and got no answer
    await world.finish([message.uuid])
    (record,) = await again(partial(world.other.get, [message.uuid]))
    assert record is not None
    assert record.attempt == 2, "the old message ran though its retry was recorded"


OF_STARTING = (start_a_broker, start_a_storage, migrate_a_broker, migrate_a_storage)
"""A start that fails may take seconds, to find out whether the server speaks TLS."""
OF_A_BROKER = (
    stop_a_broker,
    publish,
    settle,
    subscribe,
    close_a_subscription,
    depth,
    purge,
    broadcast,
    commands,
)
OF_A_STORAGE = (
    stop_a_storage, clock, refresh, save, get, query, inbox, watch, receive_records, close_an_inbox,
    claim, release, set_a_value, get_a_value, watch_a_value, append, read, delete, expire,
)  # fmt: skip
OF_A_PAIR = (submit, submit_with_a_key, admit, complete, complete_a_retry)
Case = Callable[[World], Coroutine[Any, Any, None]]
NEEDS: dict[Case, str] = {
    purge: "purge", depth: "depth", broadcast: "broadcast", commands: "commands", query: "query",
    claim: "claim", release: "release", set_a_value: "set", get_a_value: "values",
    watch_a_value: "watch_value", append: "append", read: "read", delete: "delete",
    expire: "expire", migrate_a_broker: "migrate", migrate_a_storage: "migrate",
}  # fmt: skip


def cases_of(pair: str, full: bool) -> Sequence[Case]:
    # The parts of a pair of two servers have their turn in a pair of one.
    if "+" in pair:
        return OF_A_PAIR
    return (*(OF_STARTING if full else ()), *OF_A_BROKER, *OF_A_STORAGE, *OF_A_PAIR)


async def try_all(
    world: World, cases: Sequence[Case], faults: Callable[[Case], Iterator[Iterator[Fault | Cut]]]
) -> None:
    """Try each case with one fault after the other, until its call is over before the fault."""
    places: dict[str, int] = {}
    for case in cases:
        if world.lacks(NEEDS.get(case, "")):
            continue
        world.queue, places[case.__name__] = case.__name__.replace("_", "-"), 0
        for series in faults(case):
            for world.fault in series:
                try:
                    await case(world)
                except Exception as error:
                    error.add_note(f"after {world.fault} in: {case.__name__}")
                    raise
                if not world.fault.reached:
                    break
                places[case.__name__] += 1
    print(f"faults: {places}")
    assert places["submit"] > 1


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("pair", ["sqlite", "redis", "postgres", "redis+postgres"])
async def test_a_fault_at_each_await(
    request: pytest.FixtureRequest, tmp_path: Path, pair: str, kind: Kind
) -> None:
    full = request.config.getoption("full")

    def faults(case: Case) -> Iterator[Iterator[Fault | Cut]]:
        most = MOST_PLACES if full and case not in OF_STARTING else PLACES
        for moment in get_args(Moment):
            yield (Fault(kind, moment, at) for at in range(1, most + 1))

    world = World(pair_of(request, pair, tmp_path))
    async with world.running():
        await try_all(world, cases_of(pair, full), faults)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["redis", "postgres"])
async def test_a_cut_in_each_call(
    request: pytest.FixtureRequest, tmp_path: Path, backend: str
) -> None:
    pair = pair_of(request, backend, tmp_path)
    port = urlsplit(pair.storage).port
    assert port is not None
    async with Proxy(port) as proxy:

        def faults(case: Case) -> Iterator[Iterator[Fault | Cut]]:
            times = 8 if case in OF_STARTING else 2
            for direction in get_args(Direction):
                yield (Cut(proxy, direction, at) for at in ladder(times))

        broker, storage = (
            url.replace(f":{port}", f":{proxy.port}") for url in (pair.broker, pair.storage)
        )
        through = Pair(broker, storage, pair.lease)
        world = World(pair, through)
        async with world.running():
            await try_all(world, cases_of(backend, full=True), faults)


def ladder(times: int) -> Iterator[int]:
    """Yield byte counts that grow so many times from step to step."""
    at = 0
    while at < MOST_BYTES:
        yield at
        at = times * at or 1

"""The server is frozen: it keeps its connections but never answers, until it is thawed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from msgspec.structs import replace

from qtasks_conformance.commands import message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done
from qtasks_conformance.contracts.inboxes import hear_despite_outages
from qtasks_conformance.contracts.outages import GIVES_UP_WITHIN
from qtasks_conformance.patience import server_away
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.subject import Server
from qtasks_conformance.waiting import PATIENCE, collect, patient, retry_call, retry_call_untimed
from qtasks_core import (
    Ack,
    Broker,
    Claim,
    Command,
    Inbox,
    Outcome,
    Release,
    Retry,
    Settlement,
    Storage,
    Subscription,
    Task,
    TaskQuery,
)
from qtasks_core.errors import Unavailable

MOMENT = 1.0
"""Seconds of a short freeze, during which clients do not give up yet."""

Call = Callable[[], Awaitable[Any]]
Right = Callable[[Any], bool]
"""Tells whether an answer can be right although the server was frozen."""


class BrokerFreezeContract(Contract):
    """Invariants 1 and 5, for messages. A frozen server counts as a server that is away."""

    async def test_a_frozen_server_is_unavailable(self, rig: Rig) -> None:
        """While the server is frozen, each call raises `Unavailable` in time or answers correctly.

        No write is `done`. A waiting `receive` survives the freeze. After it, everything works
        again, and calls that failed can be repeated safely.
        """
        broker, receiver = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        server = freezable(rig)
        before, during = rig.messages(3, queue="before"), rig.messages(3)
        waiting = rig.background(take(await receiver.subscribe({"q": 100}), uuids_of(during)))
        elsewhere = rig.messages(4, queue="held") + rig.messages(1, queue="purged")
        assert_done(await broker.publish(before + elsewhere))
        holder = await broker.subscribe({"held": 4})
        extended, acked, retried, released = held = await collect(holder, 4, queue="held")
        retry = Retry(retried, replace(message_of(retried), attempt=2))
        late, opened = rig.subject.broker.broker(), list[Subscription]()

        async def subscribe() -> None:
            opened.append(await broker.subscribe({"before": 100}))

        def unanswered(outcomes: list[Outcome]) -> bool:
            confirmed = broker.guarantees.settle_confirmed
            return not confirmed and all(outcome.status == "unknown" for outcome in outcomes)

        calls: dict[str, tuple[Call, Right]] = {
            "publish": (lambda: broker.publish(during), never),
            "extend": (lambda: holder.extend([extended]), lambda answer: None not in answer),
            "settle (Ack)": (lambda: holder.settle([Ack(acked)]), unanswered),
            "settle (Retry)": (lambda: holder.settle([retry]), unanswered),
            "settle (Release)": (lambda: holder.settle([Release(released)]), unanswered),
            "subscribe": (subscribe, always),
            "start": (lambda: late.start(rig.namespace), never),
            "clock": (broker.clock, lambda answer: answer is None),
            "depth": (lambda: broker.depth("before"), lambda answer: answer.ready in (None, 3)),
            "purge": (lambda: broker.purge("purged"), never),
            "broadcast": (lambda: broker.broadcast(Command(name="ping")), never),
            "migrate": (lambda: broker.migrate(rig.namespace), lambda changed: changed == []),
        }
        await asyncio.sleep(0.3)  # until `receive` waits at the server
        async with frozen(server):
            await assert_unavailable(supported(broker, calls))
            # Its connection may be closed by now, so this call must open another.
            await assert_unavailable({"publish, a second time": calls["publish"]})
        await retry_call(lambda: late.start(rig.namespace))
        await late.stop()
        assert_done(await retry_call(lambda: broker.publish(during)))
        await waiting
        fresh = opened or [await retry_call(lambda: broker.subscribe({"before": 100}))]
        await take(fresh[0], uuids_of(before), "before")
        settlements: list[Settlement] = [Ack(extended), Ack(acked), retry, Release(released)]
        outcomes = await retry_call(lambda: holder.settle(settlements))
        lost = [d for d, answer in zip(held, outcomes, strict=True) if answer.status == "refused"]
        await holder.close()
        again = {message_of(delivery).uuid for delivery in (retried, released, *lost)}
        await take(await receiver.subscribe({"held": 10}), again, "held")

    async def test_what_is_published_around_a_freeze_comes(self, rig: Rig) -> None:
        """Every message whose publish was `done` is received, also during a short freeze."""
        broker, receiver = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        server = freezable(rig)
        subscription = await receiver.subscribe({"q": 10_000})

        async def publish() -> str:
            message = rig.message()
            assert_done(await retry_call(lambda: broker.publish([message])))
            return message.uuid

        await take(subscription, await done_around_a_freeze(rig, server, publish))


class StorageFreezeContract(Contract):
    """Invariants 1, 2 and 5, for records. A frozen server counts as a server that is away."""

    async def test_a_frozen_server_is_unavailable(self, rig: Rig) -> None:
        """While the server is frozen, each call raises `Unavailable` in time or answers correctly.

        No write is `done`. A waiting inbox survives the freeze. After it, everything works again,
        and calls that failed can be repeated safely.
        """
        storage = await rig.storage()
        server = freezable(rig)
        inbox = await rig.inbox(storage)
        kept, during = rig.record("success", returning=b"1"), rig.record("process")
        mine, watched = rig.record("success", reply_to=inbox.address), rig.record("error")
        later = rig.record("cancel")
        assert_done(await storage.save([kept]))
        shared = Shared(storage, rig)
        await shared.prepare()
        inbox.expect([mine.uuid])
        await inbox.watch([watched.uuid])
        finals = [mine, watched, later]
        waiting = rig.background(hear_despite_outages(inbox, {record.uuid for record in finals}))
        late = rig.subject.storage.storage()
        unknown = rig.record("new").uuid
        calls: dict[str, tuple[Call, Right]] = {
            "save": (lambda: storage.save([during]), never),
            "get": (
                lambda: storage.get([kept.uuid, unknown]),
                lambda answer: answer == [kept, None],
            ),
            "watch": (lambda: inbox.watch([later.uuid]), always),
            "inbox": (partial(opened_inbox, storage), always),
            "start": (lambda: late.start(rig.namespace), never),
            "clock": (storage.clock, lambda answer: answer is None),
            "query": (lambda: storage.query(TaskQuery()), lambda page: kept in page.tasks),
            "expire": (storage.expire, lambda count: count == 0),
            "migrate": (lambda: storage.migrate(rig.namespace), lambda changed: changed == []),
            **shared.calls(),
        }
        await asyncio.sleep(0.3)  # until the inbox waits at the server
        async with frozen(server):
            await assert_unavailable(supported(storage, calls))
            # The connection may be closed by now, so these calls must open another.
            again = {f"{name}, a second time": calls[name] for name in ("save", "get")}
            await assert_unavailable(again)
        await retry_call(lambda: late.start(rig.namespace))
        assert await retry_call(lambda: late.get([kept.uuid])) == [kept]
        await late.stop()
        await retry_call(lambda: inbox.watch([later.uuid]))
        assert_done(await retry_call(lambda: storage.save([during, *finals])))
        assert await retry_call(lambda: storage.get([kept.uuid, during.uuid])) == [kept, during]
        assert await waiting == {record.uuid: record for record in finals}
        await shared.repeat()

    async def test_what_is_saved_around_a_freeze_is_there(self, rig: Rig) -> None:
        """Every record whose save was `done` can be read, also after a short freeze."""
        storage, reader = await rig.storage(), await rig.storage()
        server = freezable(rig)

        async def save() -> str:
            record = rig.record("success")
            assert_done(await retry_call(lambda: storage.save([record])))
            return record.uuid

        saved = sorted(await done_around_a_freeze(rig, server, save))
        found = await retry_call(lambda: reader.get(saved))
        missing = [uuid for uuid, record in zip(saved, found, strict=True) if record is None]
        assert not missing, f"{len(missing)} of {len(saved)} records whose save was done are lost"


class Shared:
    """The optional methods of a storage through a freeze: claims, values, streams, deleting."""

    def __init__(self, storage: Storage, rig: Rig) -> None:
        self._storage = storage
        self._gone: Task = rig.record("success")
        self._stream: str = rig.record("new").uuid
        self._claim = Claim("held", "a", 0.0)

    def _has(self, method: str) -> bool:
        return method not in self._storage.guarantees.unsupported

    async def prepare(self) -> None:
        """Write the data that the calls find."""
        storage = self._storage
        assert_done(await storage.save([self._gone]))
        if self._has("set"):
            assert await storage.set("key", b"before")
        if self._has("append"):
            await storage.append(self._stream, [b"before"])
        if self._has("claim"):
            claim = await storage.claim("held", "a", LONG_LEASE)
            assert claim is not None
            self._claim = claim

    def calls(self) -> dict[str, tuple[Call, Right]]:
        """Return the calls, each with a check of its answer."""
        storage, stream = self._storage, self._stream
        return {
            "claim": (lambda: storage.claim("free", "a", LONG_LEASE), never),
            "release": (lambda: storage.release(self._claim), never),
            "set": (lambda: storage.set("other", b"during"), never),
            "get_value": (lambda: storage.get_value("key"), lambda value: value == b"before"),
            "values": (lambda: storage.values("key"), lambda answer: answer == {"key": b"before"}),
            "append": (lambda: storage.append(stream, [b"during"]), never),
            "read": (
                lambda: storage.read(stream, 0),
                lambda answer: [item for _, item in answer] == [b"before"],
            ),
            "delete": (lambda: storage.delete([self._gone.uuid]), never),
        }

    async def repeat(self) -> None:
        """Make the calls again after the freeze, and check that they work."""
        storage, stream, gone = self._storage, self._stream, self._gone.uuid
        if self._has("claim"):
            assert await retry_call(lambda: storage.claim("free", "a", LONG_LEASE)) is not None
            assert await storage.claim("free", "b", LONG_LEASE) is None
            await storage.release(self._claim)
            assert await storage.claim("held", "b", LONG_LEASE) is not None
        if self._has("set"):
            assert await retry_call(lambda: storage.set("other", b"during"))
            assert await storage.values("") == {"key": b"before", "other": b"during"}
        if self._has("append"):
            await retry_call(lambda: storage.append(stream, [b"during"]))
            items = [item for _, item in await storage.read(stream, 0)]
            assert items[0] == b"before"
            assert set(items[1:]) == {b"during"}
        if self._has("delete"):
            await retry_call(lambda: storage.delete([gone]))
            assert await storage.get([gone]) == [None]


def never(answer: object) -> bool:
    """No answer can be right: only the server knows it."""
    return False


def always(answer: object) -> bool:
    """Any answer is right: the call may not need the server. It must not hang."""
    return True


async def assert_unavailable(calls: Mapping[str, tuple[Call, Right]]) -> None:
    """Make the calls concurrently; fail unless each raises `Unavailable` in time or is right."""
    errors = await asyncio.gather(
        *(one_on_a_frozen_server(call, right) for call, right in calls.values()),
        return_exceptions=True,
    )
    wrong = {name: error for name, error in zip(calls, errors, strict=True) if error is not None}
    if wrong:
        first = next(iter(wrong.values()))
        text = "; ".join(
            f"{name} {error}" if isinstance(error, AssertionError) else f"{name} raised {error!r}"
            for name, error in wrong.items()
        )
        raise AssertionError(f"while the server was frozen, {text}") from first


async def one_on_a_frozen_server(call: Call, right: Right) -> None:
    """Fail unless a call raises `Unavailable` in time or its answer is right."""
    deadline = asyncio.timeout(GIVES_UP_WITHIN)
    try:
        async with deadline:
            answer = await call()
    except Unavailable:
        return
    except TimeoutError:
        if deadline.expired():
            raise AssertionError(
                f"did not raise `Unavailable` within {GIVES_UP_WITHIN:.0f} s: each request and "
                "each new connection needs a timeout"
            ) from None
        raise
    if not right(answer):
        raise AssertionError(f"answered {answer!r}, which only the server can know")


@asynccontextmanager
async def frozen(server: Server) -> AsyncIterator[None]:
    """Freeze the server for the block; thaw it afterwards, also if the block fails.

    `freeze` and `thaw` run on the event loop, so that no cancel can come between them.
    """
    with server_away():
        try:
            server.freeze()
            yield
        finally:
            server.thaw()


def freezable(rig: Rig) -> Server:
    """Return the server. Skip the test if there is none, or if it has no `freeze`."""
    server = rig.subject.server
    if server is None:
        pytest.skip("the subject has no server")
    if not hasattr(server, "freeze"):
        pytest.skip(f"{type(server).__name__} cannot be frozen: it has no `freeze`")
    return server


def supported(
    part: Broker | Storage, calls: Mapping[str, tuple[Call, Right]]
) -> dict[str, tuple[Call, Right]]:
    """Return the calls without those that are declared unsupported."""
    return {k: call for k, call in calls.items() if k not in part.guarantees.unsupported}


async def done_around_a_freeze(
    rig: Rig, server: Server, write: Callable[[], Awaitable[str]]
) -> set[str]:
    """Run four writers before, during and after a freeze; return the uuids of what was `done`."""
    done: set[str] = set()
    begun, over = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        while not over.is_set():
            done.add(await write())
            begun.set()
            await asyncio.sleep(0.01)  # writes in memory never wait, and would block the loop

    writers = [rig.background(work()) for _ in range(4)]
    async with asyncio.timeout(PATIENCE):
        await begun.wait()
        async with frozen(server):
            await asyncio.sleep(MOMENT)
    over.set()
    async with patient(2 * PATIENCE, "writing on after a freeze"):
        await asyncio.gather(*writers)
    return done


async def take(subscription: Subscription, wanted: set[str], queue: str = "q") -> None:
    """Receive until each wanted message has come, once or more; fail if some do not come."""
    left = set(wanted)
    try:
        async with patient(2 * PATIENCE, f"receiving {len(wanted)} from queue {queue}"):
            while left:
                receive = partial(subscription.receive, {queue: 100}, 100)
                left -= {
                    message_of(delivery).uuid for delivery in await retry_call_untimed(receive)
                }
    except TimeoutError:
        raise AssertionError(
            f"{len(left)} of {len(wanted)} messages in queue {queue!r} are lost: they were not "
            "delivered after the freeze"
        ) from None


def uuids_of(messages: list[Any]) -> set[str]:
    """Return the uuids of messages."""
    return {message.uuid for message in messages}


async def opened_inbox(storage: Storage) -> Inbox:
    """Open an inbox. It is closed with its storage."""
    return await storage.inbox()

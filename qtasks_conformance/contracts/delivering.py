"""Publishing, receiving and settling, each item with its own outcome; separate namespaces."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial

import pytest
from msgspec.structs import replace

from qtasks_conformance.commands import message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.rig import LONG_LEASE, SCRIPTS, Rig, longest_ids
from qtasks_conformance.waiting import (
    PATIENCE,
    assert_silent,
    collect,
    patient,
    retry_call,
    retry_call_untimed,
)
from qtasks_core import Ack, Broker, Delivery, Guarantees, Outcome, Release, Retry, Settlement

SEPARATORS = (".", "-", "_")
"""The characters in names besides letters and digits. A backend may join names with them."""
MANY = 2000
"""The items of a large batch."""
BACKLOG = 60
"""Messages in each queue, for tests with several full queues."""


class DeliveringContract(Contract):
    """Publishing, receiving and settling while nothing goes wrong. Invariants 8 and 9."""

    async def test_a_message_comes_as_it_went(self, rig: Rig) -> None:
        """Every field of a message is delivered as it was published, with any bytes and text."""
        broker = await rig.broker()
        sent = rig.message(
            task_name="models.übung", args=bytes(range(256)), kwargs=b"\x00\r\n", priority=0,
            attempt=3, reply_to="client:1", created_at=1700000000.25, expires_at=4e9,
            store_result=False, retention=86400.5, encoding="json",
            headers={"traceparent": "00-ab-01", "ключ": "значение\0"}, submission="publishing",
        )  # fmt: skip
        assert_done(await broker.publish([sent]))
        subscription = await broker.subscribe({"q": 10})
        (delivery,) = await collect(subscription, 1)
        assert delivery.message == sent
        assert delivery.queue == "q"
        assert_settled(await subscription.settle([Ack(delivery)]), broker.guarantees)

    async def test_an_empty_batch_is_nothing(self, rig: Rig) -> None:
        """`publish`, `settle` and `extend` of nothing return an empty list."""
        broker = await rig.broker()
        assert await broker.publish([]) == []
        subscription = await broker.subscribe({"q": 10})
        assert await subscription.settle([]) == []
        assert await subscription.extend([]) == []

    async def test_publish_answers_for_each(self, rig: Rig) -> None:
        """`publish` returns one outcome for each message, and each message can be received."""
        broker = await rig.broker(lease=LONG_LEASE)
        messages = rig.messages(50)
        outcomes = await broker.publish(messages)
        assert len(outcomes) == len(messages), "`publish` must return an outcome for each message"
        assert_done(outcomes)
        deliveries = await collect(await broker.subscribe({"q": 100}), len(messages))
        assert uuids(deliveries) == sorted(message.uuid for message in messages)

    async def test_calls_run_side_by_side(self, rig: Rig) -> None:
        """Concurrent calls of `publish`, `settle` and `extend` each get their own answer."""
        broker = await rig.broker(lease=LONG_LEASE)
        subscription = await broker.subscribe({"q": 200})
        assert_done(await broker.publish(rig.messages(60)))
        held = await collect(subscription, 60)
        messages = rig.messages(40)
        published, settled, extended = await asyncio.gather(
            asyncio.gather(*(retry_call(partial(broker.publish, [each])) for each in messages)),
            asyncio.gather(
                *(retry_call(partial(subscription.settle, [Ack(each)])) for each in held[:40])
            ),
            asyncio.gather(
                *(retry_call(partial(subscription.extend, [each])) for each in held[40:])
            ),
        )
        for outcomes in published:
            assert_done(outcomes)
        for outcomes in settled:
            assert_settled(outcomes, broker.guarantees)
        assert [None] not in extended, "`extend` called a delivery lost that is still held"
        left = {message.uuid for message in messages}
        while left:  # on a busy server, a repeated publish may have left two
            left -= set(uuids(await collect(subscription, 1)))

    async def test_many_at_once(self, rig: Rig) -> None:
        """A batch of 2000 works, even if the server takes fewer in one statement."""
        broker = await rig.broker(lease=LONG_LEASE)
        messages = rig.messages(MANY)
        assert_done(await broker.publish(messages))
        subscription = await broker.subscribe({"q": MANY})
        held = await collect(subscription, MANY)
        assert uuids(held) == sorted(message.uuid for message in messages)
        extended = await subscription.extend(held)
        assert len(extended) == MANY, "`extend` must return an answer for each delivery"
        assert None not in extended, "`extend` called a delivery lost that is still held"
        assert_settled(await subscription.settle([Ack(d) for d in held]), broker.guarantees)
        await assert_silent(subscription, 0.3)

    async def test_no_queue_waits_for_the_backlog_of_another(self, rig: Rig) -> None:
        """A receiver that names another queue first each time gets messages from both queues.

        `receive` takes from the queues in the order in which they are named.
        """
        broker = await rig.broker(lease=LONG_LEASE)
        queues = ["a", "b"]
        for queue in queues:
            assert_done(await broker.publish(rig.messages(BACKLOG, queue=queue)))
        subscription = await broker.subscribe(dict.fromkeys(queues, 5))
        came: list[str] = []
        async with patient(PATIENCE, "receiving the backlog of two queues"):
            while len(came) < BACKLOG:
                queues.reverse()
                receive = partial(subscription.receive, dict.fromkeys(queues, 5), 5)
                deliveries = await retry_call_untimed(receive)
                came += [delivery.queue for delivery in deliveries]
                outcomes = await subscription.settle([Ack(delivery) for delivery in deliveries])
                assert_settled(outcomes, broker.guarantees)
        assert min(came.count(queue) for queue in queues) >= BACKLOG / 6, (
            f"`receive` neglects the queue that is named first: {came}"
        )

    async def test_the_largest_message_fits(self, rig: Rig) -> None:
        """A message with 1 MiB of arguments, an app's default limit, is delivered and retried."""
        broker = await rig.broker(lease=LONG_LEASE)
        message = rig.message(args=bytes(range(256)) * 4096)
        assert_done(await broker.publish([message]))
        subscription = await broker.subscribe({"q": 1})
        (delivery,) = await collect(subscription, 1)
        assert delivery.message == message
        again = replace(message, attempt=2, delay=0.2)
        assert_settled(await subscription.settle([Retry(delivery, again)]), broker.guarantees)
        (delivery,) = await collect(subscription, 1)
        assert delivery.message == again

    async def test_a_waiting_receive_is_woken(self, rig: Rig) -> None:
        """A waiting `receive` returns when another client publishes."""
        publisher, receiver = await rig.broker(), await rig.broker()
        subscription = await receiver.subscribe({"q": 10})
        waiting = rig.background(collect(subscription, 1))
        await asyncio.sleep(0.3)
        message = rig.message()
        assert_done(await publisher.publish([message]))
        (delivery,) = await waiting
        assert delivery.message == message

    async def test_no_more_is_received_than_wanted(self, rig: Rig) -> None:
        """`receive` returns at most `wanted` of each queue and `limit` in all; the rest later."""
        broker = await rig.broker(lease=LONG_LEASE)
        messages = rig.messages(6, queue="a") + rig.messages(6, queue="b")
        assert_done(await broker.publish(messages))
        subscription = await broker.subscribe({"a": 20, "b": 20})
        only_a: list[Delivery] = []
        async with asyncio.timeout(LONG_LEASE):
            while len(only_a) < 4:
                only_a += await subscription.receive({"a": 4 - len(only_a), "b": 0}, 10)
            assert {d.queue for d in only_a} == {"a"}, "0 messages of queue b were wanted"
            received = list(only_a)
            while len(received) < len(messages):
                some = await subscription.receive({"a": 2, "b": 2}, 3)
                assert 1 <= len(some) <= 3, "`receive` must return 1 to `limit` deliveries"
                assert max(sum(d.queue == name for d in some) for name in "ab") <= 2, (
                    "`receive` returned more of a queue than was wanted"
                )
                received += some
        assert uuids(received) == sorted(message.uuid for message in messages)

    async def test_two_receivers_share_a_queue(self, rig: Rig) -> None:
        """Each message is delivered to one receiver only; together they get all messages."""
        brokers = [await rig.broker(lease=LONG_LEASE) for _ in range(2)]
        subscriptions = [await broker.subscribe({"q": 100}) for broker in brokers]
        messages = rig.messages(60)
        received: list[Delivery] = []

        async def take(at: int) -> None:
            while len(received) < len(messages):
                came = await subscriptions[at].receive({"q": 3}, 3)
                received.extend(came)
                # Who holds messages for long must extend their leases, and does not here.
                ends = [Ack(delivery) for delivery in came]
                await retry_call_untimed(partial(subscriptions[at].settle, ends))

        takers = [rig.background(take(at)) for at in range(2)]
        assert_done(await brokers[0].publish(messages[:30]))
        assert_done(await brokers[1].publish(messages[30:]))
        done, _ = await asyncio.wait(takers, timeout=LONG_LEASE, return_when="FIRST_COMPLETED")
        assert done, f"only {len(received)} of {len(messages)} messages were delivered"
        for taker in done:
            taker.result()
        for taker in takers:
            taker.cancel()
        await asyncio.wait(takers)
        assert uuids(received) == sorted(message.uuid for message in messages)
        await asyncio.gather(*(assert_silent(s, 0.3) for s in subscriptions))

    async def test_publishing_again_is_safe(self, rig: Rig) -> None:
        """A message that is published twice is delivered once or twice, and nothing else.

        A client repeats a `publish` if it does not know whether the first one worked.
        """
        broker = await rig.broker(lease=LONG_LEASE)
        message = rig.message()
        assert_done(await broker.publish([message]))
        assert_done(await broker.publish([message]))
        subscription = await broker.subscribe({"q": 10})
        first = await collect(subscription, 1)
        assert_settled(await subscription.settle([Ack(first[0])]), broker.guarantees)
        try:
            async with asyncio.timeout(0.5):
                second = await subscription.receive({"q": 10}, 10)
        except TimeoutError:
            return
        assert uuids(second) == [message.uuid]

    async def test_each_submission_of_a_uuid_is_delivered(self, rig: Rig) -> None:
        """A broker may drop a repeated message only if uuid and `submission` are the same."""
        broker = await rig.broker(lease=LONG_LEASE)
        first = rig.message(submission="first")
        second = replace(first, submission="second")
        for message in (first, second):
            assert_done(await broker.publish([message]))
        there = await collect(await broker.subscribe({"q": 10}), 2)
        assert sorted(message_of(d).submission for d in there) == ["first", "second"], (
            "a message of another submission was taken for a repeat and dropped"
        )

    async def test_each_settlement_has_its_own_outcome(self, rig: Rig) -> None:
        """Ack, Retry and Release in one batch each take effect; the outcomes are in order."""
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish(rig.messages(3)))
        subscription = await broker.subscribe({"q": 10})
        acked, retried, released = await collect(subscription, 3)
        again = replace(message_of(retried), attempt=2, args=b"changed")
        outcomes = await subscription.settle([Ack(acked), Retry(retried, again), Release(released)])
        assert len(outcomes) == 3, "`settle` must return an outcome for each settlement"
        assert_settled(outcomes, broker.guarantees)
        back = await collect(subscription, 2)
        by_uuid = {message_of(delivery).uuid: delivery.message for delivery in back}
        assert by_uuid == {again.uuid: again, message_of(released).uuid: released.message}, (
            "a retry must come back as its new message, a release as the old one, an ack not at all"
        )
        assert_settled(await subscription.settle([Ack(d) for d in back]), broker.guarantees)
        await assert_silent(subscription, 0.5)

    async def test_a_retry_may_move_to_another_queue(self, rig: Rig) -> None:
        """A retry publishes its new message to the queue that the message names."""
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish([rig.message()]))
        subscription = await broker.subscribe({"q": 10, "elsewhere": 10})
        (delivery,) = await collect(subscription, 1)
        moved = replace(message_of(delivery), queue="elsewhere", attempt=2)
        assert_settled(await subscription.settle([Retry(delivery, moved)]), broker.guarantees)
        (back,) = await collect(subscription, 1, queue="elsewhere")
        assert (back.message, back.queue) == (moved, "elsewhere")
        await assert_silent(subscription, 0.3, "q", "elsewhere")

    async def test_settling_again_is_done(self, rig: Rig) -> None:
        """Settling is idempotent: repeated by the same holder, it is `done` and changes nothing."""
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish(rig.messages(3)))
        subscription = await broker.subscribe({"q": 10})
        acked, retried, released = await collect(subscription, 3)
        again = replace(message_of(retried), attempt=2)
        settlements: list[Settlement] = [Ack(acked), Retry(retried, again), Release(released)]
        for _ in range(2):
            assert_settled(await subscription.settle(settlements), broker.guarantees)
        back = await collect(subscription, 2)
        assert uuids(back) == sorted([again.uuid, message_of(released).uuid])
        await assert_silent(subscription, 0.5)

    @pytest.mark.parametrize(
        ("first", "second"),
        [("ack", "retry"), ("retry", "ack"), ("retry", "another"), ("release", "ack")],
    )
    async def test_one_of_two_settlements_of_a_delivery_is_obeyed(
        self, rig: Rig, first: str, second: str
    ) -> None:
        """Of two different settlements of one delivery, only one takes effect and is `done`."""
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish([rig.message()]))
        subscription = await broker.subscribe({"q": 10})
        (delivery,) = await collect(subscription, 1)
        message = message_of(delivery)
        ways: dict[str, Settlement] = {
            "ack": Ack(delivery),
            "retry": Retry(delivery, replace(message, attempt=2)),
            "another": Retry(delivery, replace(message, attempt=3)),
            "release": Release(delivery),
        }
        left = {"ack": [], "retry": [2], "another": [3], "release": [1]}
        outcomes = await subscription.settle([ways[first], ways[second]])
        taken = [
            way for way, o in zip((first, second), outcomes, strict=True) if o.status == "done"
        ]
        came = await collect(subscription, len(left[taken[0]]) if taken else 0)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.7):
                while True:
                    came += await subscription.receive({"q": 10}, 10)
        attempts = [message_of(each).attempt for each in came]
        assert attempts in (left[first], left[second]), (
            f"neither {first} alone nor {second} alone took effect"
        )
        if broker.guarantees.settle_confirmed:
            assert len(taken) == 1, f"exactly one of {first} and {second} must be `done`"
        for way in taken:
            assert attempts == left[way], f"{way} was `done`, but it is not what took effect"
        again = [(await subscription.settle([ways[way]]))[0] for way in (first, second)]
        assert [o.status == "done" for o in again] == [o.status == "done" for o in outcomes]

    async def test_deliveries_are_counted_where_declared(self, rig: Rig) -> None:
        """If `counts_deliveries` is declared, the first delivery is 1, the next after a release 2.

        Else the count is None, or any number from 1.
        """
        broker = await rig.broker(lease=LONG_LEASE)
        assert_done(await broker.publish([rig.message()]))
        subscription = await broker.subscribe({"q": 10})
        counts: list[int | None] = []
        for _ in range(2):
            (delivery,) = await collect(subscription, 1)
            counts.append(delivery.count)
            await subscription.settle([Release(delivery)])
        if broker.guarantees.counts_deliveries:
            assert counts == [1, 2]
        else:
            assert all(count is None or count >= 1 for count in counts)

    async def test_priorities_order_a_queue_where_declared(self, rig: Rig) -> None:
        """If `priorities` is declared, waiting messages are received from priority 9 down to 0."""
        broker = await rig.broker(lease=LONG_LEASE)
        priorities = [3, 9, 0, 5, 7, 1]
        messages = [rig.message(priority=priority) for priority in priorities]
        assert_done(await broker.publish(messages))
        subscription = await broker.subscribe({"q": 1})
        received: list[int] = []
        for _ in priorities:
            (delivery,) = await collect(subscription, 1)
            received.append(message_of(delivery).priority)
            await subscription.settle([Ack(delivery)])
        assert sorted(received) == sorted(priorities)
        if broker.guarantees.priorities:
            assert received == sorted(priorities, reverse=True)

    async def test_order_is_kept_where_declared(self, rig: Rig) -> None:
        """If `order="queue"` is declared, messages are received in the order of publishing."""
        broker = await rig.broker(lease=LONG_LEASE)
        if broker.guarantees.order != "queue":
            pytest.skip(f"the guarantees declare order={broker.guarantees.order!r}")
        messages = rig.messages(50)
        for message in messages[:20]:
            assert_done(await broker.publish([message]))
        assert_done(await broker.publish(messages[20:]))
        subscription = await broker.subscribe({"q": 7})
        came: list[str] = []
        while len(came) < len(messages):
            async with patient(PATIENCE, "receiving what comes next"):
                deliveries = await subscription.receive({"q": 7}, 7)
            came += [message_of(delivery).uuid for delivery in deliveries]
            outcomes = await subscription.settle([Ack(delivery) for delivery in deliveries])
            assert_settled(outcomes, broker.guarantees)
        assert came == [message.uuid for message in messages]

    async def test_namespaces_never_meet(self, rig: Rig) -> None:
        """Apps with different names share nothing, even if joined names look the same.

        For instance app `a` with queue `b.q`, and app `a.b` with queue `q`.
        """
        broker = await rig.broker()
        others = await self._neighbours(rig)
        own = {name: rig.message() for name in others}
        for name, other in others.items():
            assert_done(await other.publish([own[name]]))
        near = [rig.message()] + [rig.message(queue=f"x{mark}q") for mark in SEPARATORS]
        assert_done(await broker.publish(near))
        for name, other in others.items():
            subscription = await other.subscribe({"q": 10})
            (delivery,) = await collect(subscription, 1)
            assert delivery.message == own[name], f"namespace {name} got a message of another app"
            await subscription.settle([Ack(delivery)])
            await assert_silent(subscription, 0.2)

    async def _neighbours(self, rig: Rig) -> dict[str, Broker]:
        names = ["other" + rig.namespace, *(f"{rig.namespace}{mark}x" for mark in SEPARATORS)]
        return {name: await rig.broker(namespace=name) for name in names}

    @pytest.mark.parametrize("mark", SEPARATORS)
    async def test_the_longest_names_fit(self, rig: Rig, mark: str) -> None:
        """Names of 100 characters work for the namespace and the queue, with and without delay."""
        broker = await rig.broker(namespace=rig.namespace.ljust(100, mark), lease=LONG_LEASE)
        queue = "q".ljust(100, mark)
        messages = [rig.message(queue=queue), rig.message(queue=queue, delay=0.5)]
        assert_done(await broker.publish(messages))
        subscription = await broker.subscribe({queue: 10})
        assert uuids(await collect(subscription, 2, queue=queue)) == sorted(
            m.uuid for m in messages
        )

    @pytest.mark.parametrize("script", SCRIPTS)
    async def test_the_longest_uuids_fit(self, rig: Rig, script: str) -> None:
        """Uuids and addresses of 200 characters of any script can be published and retried."""
        broker = await rig.broker(lease=LONG_LEASE)
        messages = [
            rig.message(uuid=uuid, reply_to=uuid, submission=uuid, delay=delay)
            for uuid, delay in zip(longest_ids(script), (0.0, 0.0, 0.3), strict=True)
        ]
        assert_done(await broker.publish(messages))
        subscription = await broker.subscribe({"q": 10})
        for attempt in (1, 2):
            sent = {m.uuid: replace(m, attempt=attempt) for m in messages}
            held = await collect(subscription, len(messages))
            assert {message_of(d).uuid: d.message for d in held} == sent
            if attempt == 1:
                again = [Retry(d, replace(message_of(d), attempt=2)) for d in held]
                assert_settled(await subscription.settle(again), broker.guarantees)
        assert_settled(await subscription.settle([Ack(d) for d in held]), broker.guarantees)
        await assert_silent(subscription, 0.3)


def uuids(deliveries: list[Delivery]) -> list[str]:
    """Return the uuids of deliveries, sorted."""
    return sorted(message_of(delivery).uuid for delivery in deliveries)


def assert_done(outcomes: list[Outcome]) -> None:
    """Fail unless there are outcomes and all are `done`."""
    assert outcomes, "there are no outcomes: a call must return one for each item"
    assert {outcome.status for outcome in outcomes} == {"done"}, (
        f"each of these items must be `done`, but the outcomes are {outcomes}"
    )


def assert_settled(outcomes: list[Outcome], guarantees: Guarantees) -> None:
    """Fail unless all are `done`; `unknown` is allowed if `settle_confirmed` is not declared."""
    allowed = {"done"} if guarantees.settle_confirmed else {"done", "unknown"}
    assert outcomes, "there are no outcomes: a call must return one for each item"
    assert {outcome.status for outcome in outcomes} <= allowed, (
        f"the holder of these deliveries settles them, which must be {' or '.join(sorted(allowed))}"
        f", but the outcomes are {outcomes}"
    )

"""Kafka's transactions: all of a step or nothing, whatever is killed or frozen in the middle."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError
from aiokafka.structs import TopicPartition
from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks_core import (
    DONE,
    Ack,
    Completion,
    Composition,
    Delivery,
    Retry,
    Subscription,
    Task,
    TaskMessage,
    TaskQuery,
)
from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_core.separate import SeparateComposition, compose
from qtasks_kafka import KafkaBroker, KafkaStorage, TransactionalKafkaBroker
from qtasks_kafka.composition import KafkaComposition
from qtasks_kafka.transactional_subscription import TransactionalSubscription
from qtasks_kafka.writer import Record, Written
from tests.processes import PATIENCE, Process
from tests.services import Service

LEASE = 2.0
LONG = 60.0
"""Seconds: longer than a test."""

How = Literal["ack", "retry"]


class Pair:
    """A broker with a storage on one cluster."""

    def __init__(self, broker: TransactionalKafkaBroker, storage: KafkaStorage) -> None:
        self.broker = broker
        self.storage = storage
        self.composition: Composition = compose(broker, storage)

    async def statuses(self, messages: Sequence[TaskMessage]) -> list[str | None]:
        records = await self.storage.get([message.uuid for message in messages])
        return [None if record is None else record.status for record in records]


@asynccontextmanager
async def started(
    url: str, namespace: str, *, lease: float = LONG, partitions: int = 1
) -> AsyncIterator[Pair]:
    broker = TransactionalKafkaBroker(url, lease=lease, partitions=partitions)
    storage = KafkaStorage(url, partitions=partitions)
    await broker.start(namespace)
    try:
        await storage.start(namespace)
        yield Pair(broker, storage)
    finally:
        await storage.stop()
        await broker.stop()


def messages(count: int = 1, **fields: Any) -> list[TaskMessage]:
    return [
        TaskMessage(uuid=str(uuid7()), task_name="t", queue="q", **fields) for _ in range(count)
    ]


def completion(delivery: Delivery, how: How, execution: str = "this") -> Completion:
    message = delivery.message
    assert isinstance(message, TaskMessage)
    task = Task(
        uuid=message.uuid, task_name="t", queue="q", attempt=message.attempt, execution=execution,
        status="success" if how == "ack" else "retry",
    )  # fmt: skip
    again: TaskMessage = replace(message, attempt=message.attempt + 1)
    return Completion(Ack(delivery) if how == "ack" else Retry(delivery, again), task)


async def receive(subscription: Subscription, count: int) -> list[Delivery]:
    got: list[Delivery] = []
    async with asyncio.timeout(PATIENCE):
        while len(got) < count:
            try:
                got += await subscription.receive({"q": count}, count - len(got))
            except Unavailable:
                await asyncio.sleep(0.1)
    return got


async def nothing_comes(subscription: Subscription, pair: Pair) -> None:
    """Check that the queue is empty: a message that is published now is the next to come."""
    (last,) = messages()
    assert await pair.broker.publish([last]) == [DONE]
    (delivery,) = await receive(subscription, 1)
    assert delivery.message == last
    assert await subscription.settle([Ack(delivery)]) == [DONE]


async def reaches(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_every_step_is_a_transaction(
    kafka_server: Service, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submitting, and completing with a result, a retry and a plain acknowledgement."""
    committed: list[str] = []
    commit = AIOKafkaProducer.commit_transaction

    async def noting(producer: AIOKafkaProducer) -> None:
        await commit(producer)
        committed.append(producer._txn_manager.transactional_id)

    monkeypatch.setattr(AIOKafkaProducer, "commit_transaction", noting)
    async with started(kafka_server.url, namespace) as pair:
        assert isinstance(pair.composition, KafkaComposition)
        sent = messages(3)
        assert await pair.composition.submit(sent) == [DONE] * 3
        assert len(committed) == 1
        assert committed[0].startswith(f"{namespace}.client.")
        subscription = await pair.broker.subscribe({"q": 10})
        first, second, third = await receive(subscription, 3)
        completions = [
            completion(first, "ack"), completion(second, "retry"), Completion(Ack(third), None)
        ]  # fmt: skip
        assert await pair.composition.complete(subscription, completions) == [DONE] * 3
        assert len(committed) == 2
        assert committed[1].startswith(f"{namespace}.workers.")
        assert await pair.statuses(sent) == ["success", "retry", "new"]
        # A repeat of the call, as after an answer that got lost.
        assert await pair.composition.complete(subscription, completions) == [DONE] * 3
        assert len(committed) == 2
        (again,) = await receive(subscription, 1)
        assert again.message == replace(sent[1], attempt=2)
        await pair.composition.complete(subscription, [completion(again, "ack")])
        await nothing_comes(subscription, pair)


CHILD = """
import asyncio, os, signal, sys
from aiokafka import AIOKafkaProducer
from qtasks_core.separate import compose
from qtasks_kafka import KafkaStorage, TransactionalKafkaBroker
from tests.kafka.test_transactional import completion, messages, receive

url, namespace, lease, what, point = sys.argv[1:]

def stopping(name, real):
    async def method(*arguments):
        if point == "after " + name:
            await real(*arguments)
        if point.endswith(name):
            print("halted", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        if not point == "after " + name:
            await real(*arguments)
    return method

for name in ("send_offsets_to_transaction", "commit_transaction"):
    setattr(AIOKafkaProducer, name, stopping(name, getattr(AIOKafkaProducer, name)))

async def main():
    broker = TransactionalKafkaBroker(url, lease=float(lease), partitions=1)
    storage = KafkaStorage(url, partitions=1)
    await broker.start(namespace)
    await storage.start(namespace)
    composition = compose(broker, storage)
    if what == "submit":
        await composition.submit(messages())
    subscription = await broker.subscribe({"q": 10})
    (delivery,) = await receive(subscription, 1)
    outcomes = await composition.complete(subscription, [completion(delivery, what, "zombie")])
    print("outcomes", [outcome.status for outcome in outcomes], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

POINTS = ("before send_offsets_to_transaction", "before commit_transaction")


async def halted(child: Process) -> None:
    await reaches(lambda: "halted" in child.output())


@pytest.mark.parametrize("how", ["ack", "retry"])
@pytest.mark.parametrize("point", [*POINTS, "after commit_transaction"])
async def test_a_worker_killed_within_a_transaction_has_done_nothing(
    kafka_server: Service, namespace: str, point: str, how: How
) -> None:
    """Or all of it, from its commit on."""
    async with started(kafka_server.url, namespace, lease=LEASE) as pair:
        sent = messages()
        await pair.composition.submit(sent)
        arguments = ["-c", CHILD, kafka_server.url, namespace, str(LEASE), how, point]
        with Process(*arguments, environment={}) as child:
            await halted(child)
            child.kill()
        subscription = await pair.broker.subscribe({"q": 10})
        if point in POINTS:
            (delivery,) = await receive(subscription, 1)
            assert delivery.message == sent[0]
            assert await pair.statuses(sent) == ["new"]
            await pair.composition.complete(subscription, [completion(delivery, "ack")])
        elif how == "retry":
            (delivery,) = await receive(subscription, 1)
            assert delivery.message == replace(sent[0], attempt=2)
            assert await pair.statuses(sent) == ["retry"]
            await pair.composition.complete(subscription, [completion(delivery, "ack")])
        await nothing_comes(subscription, pair)
        assert await pair.statuses(sent) == ["success"]


async def test_nothing_is_seen_of_a_client_killed_within_a_transaction(
    kafka_server: Service, namespace: str
) -> None:
    """The server aborts it after a while. Until then, what comes later waits."""
    async with started(kafka_server.url, namespace) as pair:
        arguments = [
            "-c", CHILD, kafka_server.url, namespace, str(LONG), "submit",
            "before commit_transaction",
        ]  # fmt: skip
        with Process(*arguments, environment={}) as child:
            await halted(child)
            child.kill()
        subscription = await pair.broker.subscribe({"q": 10})
        await nothing_comes(subscription, pair)
        assert (await pair.storage.query(TaskQuery())).tasks == []


@pytest.mark.parametrize("how", ["ack", "retry"])
@pytest.mark.parametrize("point", POINTS)
async def test_a_zombie_is_fenced(
    kafka_server: Service, namespace: str, point: str, how: How
) -> None:
    """A worker is frozen within its transaction. It goes on when another one has its partition."""
    async with started(kafka_server.url, namespace, lease=LEASE) as pair:
        sent = messages()
        await pair.composition.submit(sent)
        arguments = ["-c", CHILD, kafka_server.url, namespace, str(LEASE), how, point]
        with Process(*arguments, environment={}) as zombie:
            await halted(zombie)
            subscription = await pair.broker.subscribe({"q": 10})
            (delivery,) = await receive(subscription, 1)
            assert delivery.message == sent[0]
            zombie.signal(signal.SIGCONT)
            await reaches(lambda: "outcomes" in zombie.output())
            said = zombie.output().partition("outcomes ")[2].split("\n")[0]
            assert said in ("['refused']", "['unknown']")
            assert await pair.statuses(sent) == ["new"]
            # Its transaction came to nothing, and so it does not stand in the way of ours.
            outcomes = await pair.composition.complete(subscription, [completion(delivery, "ack")])
            assert outcomes == [DONE]
            (record,) = await pair.storage.get([sent[0].uuid])
            assert record is not None
            assert (record.status, record.execution) == ("success", "this")
            zombie.kill()
        await nothing_comes(subscription, pair)


@pytest.mark.parametrize("how", ["ack", "retry"])
@pytest.mark.parametrize("committed", [True, False])
async def test_what_became_of_a_transaction_is_found_out(
    kafka_server: Service,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    committed: bool,
    how: How,
) -> None:
    """The connection breaks, and the answer to the commit is lost, or the commit itself."""
    async with started(kafka_server.url, namespace) as pair:
        sent = messages()
        await pair.composition.submit(sent)
        subscription = await pair.broker.subscribe({"q": 10})
        (delivery,) = await receive(subscription, 1)
        commit = AIOKafkaProducer.commit_transaction
        broken: list[str] = []

        async def breaking(producer: AIOKafkaProducer) -> None:
            if broken:
                await commit(producer)
                return
            broken.append(producer._txn_manager.transactional_id)
            if committed:
                await commit(producer)
            raise KafkaConnectionError("broken")

        monkeypatch.setattr(AIOKafkaProducer, "commit_transaction", breaking)
        outcomes = await pair.composition.complete(subscription, [completion(delivery, how)])
        assert broken
        assert outcomes == [DONE]
        if how == "retry":
            (again,) = await receive(subscription, 1)
            assert again.message == replace(sent[0], attempt=2)
            await pair.composition.complete(subscription, [completion(again, "ack")])
        await nothing_comes(subscription, pair)
        assert await pair.statuses(sent) == ["success"]


async def test_a_worker_that_gives_partitions_away_goes_on(
    kafka_server: Service, namespace: str
) -> None:
    """Its successor fences it. It still has the other partitions, and completes what runs there."""
    async with (
        started(kafka_server.url, namespace, partitions=4) as one,
        started(kafka_server.url, namespace, partitions=4) as two,
    ):
        sent = messages(1)
        await one.composition.submit(sent)
        first = await one.broker.subscribe({"q": 10})
        assert isinstance(first, TransactionalSubscription)
        member = first._member
        (held,) = await receive(first, 1)
        more = messages(1)
        await one.composition.submit(more)
        (other,) = await receive(first, 1)
        await one.composition.complete(first, [completion(other, "ack")])
        producers = member._producers
        second = await two.broker.subscribe({"q": 10})
        receiving = asyncio.create_task(receive(second, 1))
        waiting = asyncio.create_task(first.receive({"q": 10}, 10))
        try:
            await reaches(lambda: len(member.partitions) == 2)
            assert isinstance(second, TransactionalSubscription)
            await reaches(lambda: len(second._member.partitions) == 2)
            assert await one.composition.complete(first, [completion(held, "retry")]) == [DONE]
            assert member._producers == producers + 1, "it was not fenced: this test shows nothing"
            assert await one.statuses(sent + more) == ["retry", "success"]
        finally:
            receiving.cancel()
            waiting.cancel()
            await asyncio.wait({receiving, waiting})


async def test_a_record_is_not_moved_while_a_transaction_finishes_it(
    kafka_server: Service, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the copy would be left: the transaction finishes the original."""
    async with started(kafka_server.url, namespace, partitions=2) as pair:
        await pair.composition.submit(messages())
        subscription = await pair.broker.subscribe({"q": 10})
        assert isinstance(subscription, TransactionalSubscription)
        member = subscription._member
        (delivery,) = await receive(subscription, 1)
        number = 1 - delivery.fence.number
        other = member.partitions[TopicPartition(delivery.fence.topic, number)]
        monkeypatch.setattr(member, "owes", lambda partition: partition is not other)
        monkeypatch.setattr(member, "kept", lambda topic: (number, other))
        committing, go_on = asyncio.Event(), asyncio.Event()
        commit = AIOKafkaProducer.commit_transaction

        async def waiting(producer: AIOKafkaProducer) -> None:
            committing.set()
            await go_on.wait()
            await commit(producer)

        monkeypatch.setattr(AIOKafkaProducer, "commit_transaction", waiting)
        completing = asyncio.create_task(
            pair.composition.complete(subscription, [completion(delivery, "ack")])
        )
        await committing.wait()
        copied: list[object] = []
        copy = pair.broker.copy

        async def noting(records: Sequence[Record]) -> list[Written]:
            copied.extend(records)
            return await copy(records)

        monkeypatch.setattr(pair.broker, "copy", noting)
        moving = asyncio.create_task(subscription._move([delivery]))
        await asyncio.sleep(0)
        go_on.set()
        assert await completing == [DONE]
        await moving
        assert not copied
        monkeypatch.undo()
        await nothing_comes(subscription, pair)


async def test_what_was_lost_is_read_after_the_last_transaction_has_ended(
    kafka_server: Service, namespace: str
) -> None:
    """A commit is answered before it can be read. So a member that lost its partitions, and gets
    them back, fences its own producer before it reads what is finished there."""
    async with started(kafka_server.url, namespace) as pair:
        sent = messages(2)
        await pair.composition.submit(sent)
        subscription = await pair.broker.subscribe({"q": 10})
        assert isinstance(subscription, TransactionalSubscription)
        member = subscription._member
        first, second = await receive(subscription, 2)
        assert await pair.composition.complete(subscription, [completion(first, "ack")]) == [DONE]
        assert member._transactor is not None
        before = member._transactor
        member._lose_all()
        member._rejoin()
        (again,) = await receive(subscription, 1)
        assert again.message == second.message
        assert before.id in member._fenced
        assert member._transactor is not before
        (outcome,) = await pair.composition.complete(subscription, [completion(second, "ack")])
        assert outcome.status == "refused"
        assert await pair.composition.complete(subscription, [completion(again, "ack")]) == [DONE]
        await nothing_comes(subscription, pair)


WORKER = """
import asyncio, sys
from qtasks_core.errors import Unavailable
from qtasks_core.separate import compose
from qtasks_kafka import KafkaStorage, TransactionalKafkaBroker
from tests.kafka.test_transactional import completion

url, namespace, lease = sys.argv[1:]

async def main():
    broker = TransactionalKafkaBroker(url, lease=float(lease), partitions=2)
    storage = KafkaStorage(url, partitions=2)
    await broker.start(namespace)
    await storage.start(namespace)
    composition = compose(broker, storage)
    subscription = await broker.subscribe({"q": 10})
    while True:
        try:
            deliveries = await subscription.receive({"q": 3}, 3)
            ends = [completion(d, "retry" if d.message.attempt == 1 else "ack") for d in deliveries]
            while True:
                try:
                    outcomes = await composition.complete(subscription, ends)
                    break
                except Unavailable:
                    pass
            print("completed", len(outcomes), flush=True)
        except Unavailable:
            await asyncio.sleep(0.1)

asyncio.run(main())
"""


async def test_what_is_acknowledged_is_recorded_whenever_a_worker_is_killed(
    kafka_server: Service, namespace: str
) -> None:
    """And what is recorded is acknowledged: no task comes again that has finished, none is lost.

    A separate composition would let finished tasks come again, and stale attempts.
    """
    dice = random.Random(5)
    async with started(kafka_server.url, namespace, lease=LEASE, partitions=2) as pair:
        sent = messages(90)
        assert await pair.composition.submit(sent) == [DONE] * 90
        for _ in range(4):
            arguments = ["-c", WORKER, kafka_server.url, namespace, str(LEASE)]
            with Process(*arguments, environment={}) as child:
                some = dice.randint(1, 5)
                await reaches(lambda some=some: child.output().count("completed") >= some)  # type: ignore[misc]
                await asyncio.sleep(dice.random() / 20)  # at any point of the next one
                child.kill()
        subscription = await pair.broker.subscribe({"q": 10})
        came: Counter[tuple[str, int]] = Counter()
        finished = (await pair.statuses(sent)).count("success")
        while finished < 90:
            deliveries = await receive(subscription, 1)
            for (verdict, _), delivery in zip(
                await pair.composition.admit(deliveries), deliveries, strict=True
            ):
                assert isinstance(delivery.message, TaskMessage)
                assert verdict == "run"
                came[delivery.message.uuid, delivery.message.attempt] += 1
                how: How = "retry" if delivery.message.attempt == 1 else "ack"
                ends = [completion(delivery, how)]
                assert await pair.composition.complete(subscription, ends) == [DONE]
                finished += how == "ack"
        assert set(came.values()) <= {1}
        assert set(await pair.statuses(sent)) == {"success"}
        await nothing_comes(subscription, pair)


async def test_marks_of_transactions_are_no_messages(
    kafka_server: Service, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not counted, and a gap that a mark leaves is not fetched again."""
    async with started(kafka_server.url, namespace) as pair:
        for number in range(5):
            await pair.composition.submit(messages(1))
            assert (await pair.broker.depth("q")).ready == number + 1
        subscription = await pair.broker.subscribe({"q": 10})
        held = await receive(subscription, 5)
        assert await subscription.settle([Ack(delivery) for delivery in held]) == [DONE] * 5
        assert (await pair.broker.depth("q")).ready == 0
        for _ in range(3):
            await pair.composition.submit(messages(1))
            (delivery,) = await receive(subscription, 1)
            await pair.composition.complete(subscription, [completion(delivery, "ack")])
        assert "fetched again" not in caplog.text


async def test_workers_of_both_kinds_exclude_each_other(
    kafka_server: Service, namespace: str
) -> None:
    """A plain worker would not fence a transactional one."""
    plain = KafkaBroker(kafka_server.url, lease=LONG, partitions=1)
    await plain.start(namespace)
    try:
        await plain.publish(messages())
        await receive(await plain.subscribe({"q": 1}), 1)
        async with started(kafka_server.url, namespace) as pair:
            subscription = await pair.broker.subscribe({"q": 1})
            with pytest.raises(ConfigurationError, match="workers of another kind"):
                async with asyncio.timeout(PATIENCE):
                    await subscription.receive({"q": 1}, 1)
    finally:
        await plain.stop()


def test_another_cluster_or_user_is_no_joint_composition() -> None:
    """What is on two servers, or written by two users, cannot be one transaction of one of them."""
    broker = TransactionalKafkaBroker("kafka://a:1,b:2")
    assert isinstance(compose(broker, KafkaStorage("kafka://b:2,a:1")), KafkaComposition)
    for other in ("kafka://a:1", "kafka://x:y@a:1,b:2"):
        composition = compose(broker, KafkaStorage(other))
        assert type(composition) is SeparateComposition

"""The default composition, crashed at every point between and within the halves of its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from qtasks_core import (
    DONE,
    LOST,
    Ack,
    Completion,
    Delivery,
    Guarantees,
    Outcome,
    Raw,
    Release,
    Retry,
    Settlement,
    Status,
    Subscription,
    Task,
    TaskMessage,
)
from qtasks_core.errors import Unavailable
from qtasks_core.records import FINAL, RANK, judge, record_of, taken, verdict_of
from qtasks_core.separate import SeparateComposition
from qtasks_memory import MemoryBroker, MemoryStorage


class Crash(BaseException):
    """The process ends here."""


class World:
    """What two servers hold, all that was asked of them in order, and when the process crashes.

    The crash comes after `effects` effects; a batch may have had its effect in part.
    """

    def __init__(self, effects: int | None = None) -> None:
        self.effects = effects
        self.events: list[tuple[str, str, str]] = []
        self.records: dict[str, Task] = {}
        self.queue: list[TaskMessage] = []
        self.in_flight: dict[str, TaskMessage] = {}

    def effect(self, *event: str) -> None:
        if self.effects is not None and len(self.events) >= self.effects:
            raise Crash
        self.events.append(event)  # type: ignore[arg-type]

    def deliver(self, message: TaskMessage) -> Delivery:
        self.in_flight[message.uuid] = message
        return Delivery(message, message.queue, message.uuid)


class FakeBroker(MemoryBroker):
    """Only publishes, into a world that may end."""

    def __init__(self, world: World, refuses: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.world = world
        self.refuses = refuses
        self.fails: Exception | None = None

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(part="FakeBroker", survives="nothing", durability="")

    async def publish(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        outcomes = []
        for message in messages:
            if message.uuid in self.refuses:
                outcomes.append(Outcome("refused", "queue full"))
            else:
                self.world.effect("publish", message.uuid, "")
                self.world.queue.append(message)
                outcomes.append(DONE)
        return outcomes


class FakeSubscription(Subscription):
    """Says `answer` to each settle, and obeys unless it refuses."""

    def __init__(
        self, world: World, answer: Literal["done", "refused", "unknown"] = "done"
    ) -> None:
        self.world = world
        self.answer = answer

    async def receive(self, wanted: Mapping[str, int], limit: int) -> list[Delivery]:
        raise NotImplementedError

    async def settle(self, settlements: Sequence[Settlement]) -> list[Outcome]:
        await asyncio.sleep(0)
        return [self.settle_one(settlement) for settlement in settlements]

    def settle_one(self, settlement: Settlement) -> Outcome:
        if self.answer == "refused":
            return LOST
        name = type(settlement).__name__.lower()
        self.world.effect("settle", settlement.delivery.fence, name)
        message = self.world.in_flight.pop(settlement.delivery.fence)
        if isinstance(settlement, Retry):
            self.world.queue.append(settlement.message)
        elif isinstance(settlement, Release):
            self.world.queue.append(message)
        return Outcome(self.answer)

    async def extend(self, deliveries: Sequence[Delivery]) -> list[Delivery | None]:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class FakeStorage(MemoryStorage):
    """Only saves and reads, in a world that may end."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.reads: list[list[str]] = []
        self.fails: Exception | None = None

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(part="FakeStorage", survives="nothing", durability="")

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        return [self.save_one(task) for task in tasks]

    def save_one(self, task: Task) -> Outcome:
        self.world.effect("save", task.uuid, task.status)
        stored = self.world.records.get(task.uuid)
        judgement = judge(task, stored)
        if judgement == "refuse":
            return Outcome("refused", "a newer record is there", stored)
        if judgement == "accept":
            self.world.records[task.uuid] = task
        return DONE

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        self.reads.append(list(uuids))
        return [self.world.records.get(uuid) for uuid in uuids]


def composed(world: World) -> SeparateComposition:
    return SeparateComposition(FakeBroker(world), FakeStorage(world))


def message(uuid: str, attempt: int = 1) -> TaskMessage:
    return TaskMessage(uuid=uuid, task_name="n", attempt=attempt, created_at=1.0)


def record(uuid: str, status: Status, attempt: int = 1) -> Task:
    return Task(uuid=uuid, task_name="n", status=status, attempt=attempt, execution="x")


Kind = Literal["success", "retry", "release", "process", "ack only", "retry only"]
KINDS: tuple[Kind, ...] = ("success", "retry", "release", "process", "ack only", "retry only")


def completion(world: World, uuid: str, kind: Kind) -> Completion:
    delivery = world.deliver(message(uuid))
    following = replace(message(uuid, 2), delay=1.0)
    if kind == "success":
        return Completion(Ack(delivery), record(uuid, "success"))
    if kind == "retry":
        return Completion(Retry(delivery, following), record(uuid, "retry"))
    if kind == "release":
        return Completion(Release(delivery), None)
    if kind == "process":
        return Completion(None, record(uuid, "process"))
    if kind == "ack only":
        return Completion(Ack(delivery), None)
    return Completion(Retry(delivery, following), None)


# -- complete


async def test_saved_before_acknowledged_and_retries_the_other_way_round() -> None:
    world = World()
    completions = [
        completion(world, "a", "retry"),
        completion(world, "b", "success"),
        completion(world, "c", "process"),
        completion(world, "d", "release"),
        Completion(Ack(world.deliver(message("e"))), record("e", "error")),
    ]
    outcomes = await composed(world).complete(FakeSubscription(world), completions)
    assert outcomes == [DONE] * 5
    assert world.events == [
        ("save", "b", "success"),
        ("save", "c", "process"),
        ("save", "e", "error"),
        ("settle", "a", "retry"),
        ("settle", "b", "ack"),
        ("settle", "d", "release"),
        ("settle", "e", "ack"),
        ("save", "a", "retry"),
    ]


@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.integers(0, 14))
def test_crash_while_completing(kinds: list[Kind], effects: int) -> None:
    asyncio.run(_crash_while_completing(kinds, effects))


async def _crash_while_completing(kinds: list[Kind], effects: int) -> None:
    world = World(effects)
    completions = [completion(world, str(at), kind) for at, kind in enumerate(kinds)]
    with suppress(Crash):
        await composed(world).complete(FakeSubscription(world), completions)
    for at, kind in enumerate(kinds):
        uuid = str(at)
        stored = world.records.get(uuid)
        left = [m for m in [*world.in_flight.values(), *world.queue] if m.uuid == uuid]
        verdicts = [verdict_of(each, stored) for each in left]
        if kind == "success":
            assert verdicts == ["run"] or (stored is not None and stored.status in FINAL)
        elif kind != "ack only":
            assert verdicts == ["run"], "the only message must run, whatever was recorded"


async def test_refused_settle_of_a_retry_is_not_recorded() -> None:
    """Its lease was lost: another receiver runs the attempt, which a record would make stale."""
    world = World()
    completions = [completion(world, "a", "retry"), completion(world, "b", "success")]
    outcomes = await composed(world).complete(FakeSubscription(world, "refused"), completions)
    assert outcomes == [LOST, DONE]
    assert "a" not in world.records
    assert world.records["b"].status == "success"


async def test_settle_of_unknown_outcome_is_recorded() -> None:
    world = World()
    outcomes = await composed(world).complete(
        FakeSubscription(world, "unknown"),
        [completion(world, "a", "retry"), completion(world, "b", "retry only")],
    )
    assert outcomes == [DONE, Outcome("unknown")]
    assert world.records["a"].status == "retry"


async def test_what_may_not_have_been_recorded_is_not_settled() -> None:
    class Vague(FakeStorage):
        async def save(
            self, tasks: Sequence[Task], transaction: object | None = None
        ) -> list[Outcome]:
            return [Outcome("unknown") for _ in tasks]

    world = World()
    composition = SeparateComposition(FakeBroker(world), Vague(world))
    outcomes = await composition.complete(
        FakeSubscription(world), [completion(world, "a", "success")]
    )
    assert outcomes == [Outcome("unknown")]
    assert world.in_flight.keys() == {"a"}, "the delivery has to come again"


async def test_outcome_is_that_of_the_record() -> None:
    world = World()
    world.records["a"] = record("a", "cancel")
    (outcome,) = await composed(world).complete(
        FakeSubscription(world), [completion(world, "a", "success")]
    )
    assert outcome.status == "refused"
    assert outcome.current == record("a", "cancel")
    assert world.in_flight == {}, "it is settled all the same: the task has its final record"


@pytest.mark.parametrize("kind", KINDS)
async def test_completing_again_after_unavailable(kind: Kind) -> None:
    world = World()
    storage = FakeStorage(world)
    composition = SeparateComposition(FakeBroker(world), storage)
    completions = [completion(world, "a", kind)]
    storage.fails = Unavailable("down")
    subscription = FakeSubscription(world)
    if kind in ("success", "retry", "process"):
        with pytest.raises(Unavailable):
            await composition.complete(subscription, completions)
        storage.fails = None
        subscription.settle_one = lambda settlement: (  # type: ignore[method-assign]
            DONE
            if settlement.delivery.fence not in world.in_flight
            else FakeSubscription.settle_one(subscription, settlement)
        )
    assert await composition.complete(subscription, completions) == [DONE]
    if kind in ("success", "retry", "process"):
        assert world.records["a"].status == kind


async def test_nothing_to_complete() -> None:
    world = World()
    assert await composed(world).complete(FakeSubscription(world), []) == []
    assert world.events == []


# -- submit


async def test_submit_publishes_and_records() -> None:
    world = World()
    messages = [message("a"), replace(message("b"), delay=2.0)]
    assert await composed(world).submit(messages) == [DONE, DONE]
    assert world.queue == messages
    assert world.records == {"a": record_of(messages[0]), "b": record_of(messages[1])}
    assert [world.records[uuid].status for uuid in "ab"] == ["new", "scheduled"]
    assert world.records["b"].due_at == 3.0


@pytest.mark.parametrize("effects", range(5))
async def test_crash_while_submitting(effects: int) -> None:
    """If it returned, all is there; if not, what was published runs though nothing says `new`."""
    world = World(effects)
    messages = [message("a"), message("b")]
    try:
        await composed(world).submit(messages)
    except Crash:
        assert effects < 4
    else:
        assert world.queue == messages
    for each in world.queue:
        assert verdict_of(each, world.records.get(each.uuid)) == "run"


async def test_late_new_is_harmless() -> None:
    """The task may have ended before its first record was written."""
    world = World()
    world.records["a"] = record("a", "success")
    assert await composed(world).submit([message("a")]) == [DONE]
    assert world.records["a"] == record("a", "success")


async def test_message_the_broker_refuses_becomes_a_dead_letter() -> None:
    world = World()
    broker = FakeBroker(world, refuses=frozenset("a"))
    outcomes = await SeparateComposition(broker, FakeStorage(world)).submit(
        [message("a"), message("b")]
    )
    assert outcomes == [Outcome("refused", "queue full"), DONE]
    dead = world.records["a"]
    assert (dead.status, dead.error, dead.dead) == (
        "error",
        "queue full",
        "the broker refused it",
    )
    assert world.records["b"].status == "new"


@pytest.mark.parametrize("half", ["broker", "storage", "both"])
async def test_submit_tells_of_a_half_that_is_unavailable(half: str) -> None:
    world = World()
    broker, storage = FakeBroker(world), FakeStorage(world)
    if half in ("broker", "both"):
        broker.fails = Unavailable("broker down")
    if half in ("storage", "both"):
        storage.fails = Unavailable("storage down")
    composition = SeparateComposition(broker, storage)
    with pytest.raises(Unavailable):
        await composition.submit([message("a")])
    broker.fails = storage.fails = None
    assert await composition.submit([message("a")]) == [DONE]
    assert world.records["a"].status == "new"
    assert message("a") in world.queue


async def test_what_was_published_is_only_saved_again() -> None:
    """One delivery however often the save fails; and it is published again once it was saved."""
    world = World()
    broker, storage = FakeBroker(world), FakeStorage(world)
    composition = SeparateComposition(broker, storage)
    storage.fails = Unavailable("storage down")
    for _ in range(3):
        with pytest.raises(Unavailable):
            await composition.submit([message("a"), message("b")])
    other = replace(message("a"), reply_to="an inbox opened meanwhile")
    storage.fails = None
    assert await composition.submit([message("a"), message("c"), message("b")]) == [DONE] * 3
    assert world.queue == [message("a"), message("b"), message("c")]
    await composition.submit([message("a"), other])
    assert world.queue[3:] == [message("a"), other]


async def test_what_was_not_published_is_published_again() -> None:
    world = World()
    broker, storage = FakeBroker(world, refuses=frozenset("b")), FakeStorage(world)
    composition = SeparateComposition(broker, storage)
    storage.fails = Unavailable("storage down")
    with pytest.raises(Unavailable):
        await composition.submit([message("a"), message("b")])
    storage.fails = None
    broker.refuses = frozenset()
    assert await composition.submit([message("a"), message("b")]) == [DONE, DONE]
    assert world.queue == [message("a"), message("b")]


async def test_refused_message_with_a_key_leaves_the_key_free() -> None:
    world = World()
    broker = FakeBroker(world, refuses=frozenset("a"))
    composition = SeparateComposition(broker, FakeStorage(world))
    outcomes = await composition.submit([keyed("one"), message("b")])
    assert outcomes == [Outcome("refused", "queue full"), DONE]
    assert set(world.records) == {"b"}
    broker.refuses = frozenset()
    assert await composition.submit([keyed("two")]) == [DONE]


@pytest.mark.parametrize("effects", range(4))
async def test_crash_while_submitting_with_a_key(effects: int) -> None:
    """Wherever one client ends, after another has submitted the key one message is run."""
    world = World(effects)
    with suppress(Crash):
        await composed(world).submit([keyed("one")])
    world.effects = None
    await composed(world).submit([keyed("two")])
    deliveries = [world.deliver(each) for each in world.queue]
    verdicts = [verdict for verdict, _ in await composed(world).admit(deliveries)]
    assert sorted(verdicts) in (["run"], ["run", "stale"])


# -- admit


async def test_admit_records_what_has_a_key_and_none_in_one_save() -> None:
    world = World()
    copies = [keyed("one"), keyed("two"), keyed("one")]
    deliveries = [world.deliver(each) for each in (*copies, message("plain"))]
    first = record_of(copies[0])
    assert await composed(world).admit(deliveries) == [
        ("run", first), ("stale", first), ("run", first), ("run", None),
    ]  # fmt: skip
    assert world.records == {"a": first}


def test_what_an_older_release_recorded_is_not_stale() -> None:
    """It drops the submission from messages and records alike."""
    assert verdict_of(keyed("one"), record("a", "process")) == "run"
    recorded = replace(record("a", "process"), submission="one")
    assert verdict_of(message("a"), recorded) == "run"
    assert verdict_of(keyed("two"), recorded) == "stale"


def keyed(submission: str) -> TaskMessage:
    return replace(message("a"), submission=submission)


def verdict(attempt: int, stored: Task | None) -> str:
    """Say it as the design does: a final status ends it, a retry has ended its attempt."""
    if stored is None:
        return "run"
    if stored.status in ("success", "error"):
        return "final"
    if stored.status == "cancel":
        return "cancelled"
    if attempt < stored.attempt or (attempt == stored.attempt and stored.status == "retry"):
        return "stale"
    return "run"


async def test_admit_compares_all_with_one_read() -> None:
    world = World()
    storage = FakeStorage(world)
    composition = SeparateComposition(FakeBroker(world), storage)
    cases = list(product((1, 2, 3), RANK, (1, 2, 3)))
    deliveries: list[Delivery] = []
    expected: list[tuple[str, Task | None]] = []
    for at, (attempt, status, stored_attempt) in enumerate(cases):
        uuid = str(at)
        stored = record(uuid, status, stored_attempt) if at % 7 else None
        if stored is not None:
            world.records[uuid] = stored
        deliveries.append(Delivery(message(uuid, attempt), "default", at))
        expected.append((verdict(attempt, stored), stored))
        if at % 5 == 0:
            deliveries.append(Delivery(Raw(b"?", "no message"), "default", "raw"))
            expected.append(("dead", None))
    assert await composition.admit(deliveries) == expected
    assert storage.reads == [[str(at) for at in range(len(cases))]]


async def test_admit_reads_nothing_for_what_cannot_be_decoded() -> None:
    storage = FakeStorage(World())
    composition = SeparateComposition(FakeBroker(storage.world), storage)
    assert await composition.admit([Delivery(Raw(b"?", "no message"), "default", 1)]) == [
        ("dead", None)
    ]
    assert await composition.admit([]) == []
    assert storage.reads == []


def test_record_of_a_message_leaves_nothing_out() -> None:
    full = TaskMessage(
        uuid="u", task_name="n", queue="q", args=b"a", kwargs=b"k", encoding="json", priority=9,
        delay=2.0, attempt=3, reply_to="r", created_at=5.0, expires_at=9.0, retention=7.0,
        headers={"a": "b"},
    )  # fmt: skip
    made = record_of(full)
    for name in set(TaskMessage.__struct_fields__) & set(Task.__struct_fields__):
        assert getattr(made, name) == getattr(full, name), name
    # What a record has no use for: when it was due, and how long the message is good.
    missing = set(TaskMessage.__struct_fields__) - set(Task.__struct_fields__)
    assert missing == {"delay", "expires_at", "store_result"}


class SmallStorage(FakeStorage):
    """Takes no record with arguments; nothing is there instead."""

    def save_one(self, task: Task) -> Outcome:
        return Outcome("refused", "over 0 bytes") if task.args else super().save_one(task)


async def test_a_key_is_held_though_the_record_is_not_taken_with_its_arguments() -> None:
    """Its message is published: to say that it was refused would be wrong."""
    world = World()
    composition = SeparateComposition(FakeBroker(world), SmallStorage(world))
    keyed = replace(message("a"), submission="s", args=b"large")
    assert await composition.submit([keyed]) == [DONE]
    assert world.records["a"].submission == "s"
    assert world.queue == [keyed]
    (outcome,) = await composition.submit([replace(keyed, submission="other")])
    assert outcome == taken(world.records["a"])


async def test_who_admits_first_has_the_key_of_a_record_that_is_not_taken_with_its_arguments() -> (
    None
):
    world = World()
    composition = SeparateComposition(FakeBroker(world), SmallStorage(world))
    first, second = (replace(message("a"), submission=s, args=b"large") for s in ("s", "other"))
    ((verdict, _),) = await composition.admit([world.deliver(first)])
    assert verdict == "run"
    ((verdict, _),) = await composition.admit([world.deliver(second)])
    assert verdict == "stale"

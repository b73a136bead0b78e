"""The joint composition: broker and storage are on one server, and each step is one script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qtasks_core import (
    DONE,
    LOST,
    Broker,
    Completion,
    Outcome,
    Retry,
    Subscription,
    Task,
    TaskMessage,
)
from qtasks_core.receivers import effect_of
from qtasks_core.records import record_of, refused_by, taken, verdicts_of
from qtasks_core.separate import SeparateComposition
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import encode_message, encode_task
from qtasks_redis.connection import Connection
from qtasks_redis.joint_scripts import COMPLETE, SUBMIT
from qtasks_redis.keys import RecordKeys, milliseconds
from qtasks_redis.records import decode
from qtasks_redis.storage import RedisStorage, parts
from qtasks_redis.subscription import Fence, RedisSubscription, settling

if TYPE_CHECKING:
    from qtasks_core import Delivery, Settlement, Verdict


_NO_SETTLEMENT = 0, "", "", 0, 0
_NO_RECORD = "", 0, "", 0, "", ""
"""What is sent of a completion that has only one of the two."""
_SEEN_WITHIN = 1.0
"""Seconds for which `admit` relies on what the script that took a delivery has seen."""


class RedisComposition(SeparateComposition):
    """Does the same as the separate composition, but a crash leaves both halves or neither.

    A batch with an item that is too large for the server goes the separate way, which saves such a
    record without its payload.
    """

    _storage: RedisStorage

    def __init__(
        self, broker: Broker, storage: RedisStorage, connection: Callable[[], Connection]
    ) -> None:
        super().__init__(broker, storage)
        self._connection = connection
        """Returns the broker's connection. Raises `Closed`."""

    def _joint(self) -> Connection | None:
        """Return the connection for both, or None if they have different namespaces."""
        connection = self._connection()
        same = connection.namespace == self._storage.started().namespace
        return connection if same else None

    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if transaction is not None:
            refuse_transaction(self._broker)
        connection = self._joint()
        records = [record_of(message) for message in messages]
        encoded = [
            (encode_message(message), encode_task(record))
            for message, record in zip(messages, records, strict=True)
        ]
        if connection is None or _too_large(connection, encoded):
            return await super().submit(messages)
        outcomes = [DONE] * len(messages)
        for part in parts([m.uuid for m in messages], [sum(map(len, two)) for two in encoded]):
            keys = RecordKeys(connection, self._storage.retention)
            for at in part:
                message, (data, record) = messages[at], encoded[at]
                keys.save(records[at], record)
                keys.sent += (
                    keys.queue(message.queue, message.priority),
                    milliseconds(message.delay),
                    "once" if message.submission else "",
                )
                keys.values.append(data)
            answers = await connection.run(SUBMIT, keys.keys, keys.args)
            for at, answer in zip(part, answers, strict=True):
                if answer != 1:
                    outcomes[at] = taken(decode(messages[at].uuid, answer))
        return outcomes

    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        """Read only the records that the script that took the deliveries has not seen to be first.

        Such a record says no more than its message does.
        """
        if self._joint() is None:
            return await super().admit(deliveries)
        since = asyncio.get_running_loop().time() - _SEEN_WITHIN
        messages = [
            d.message
            for d in deliveries
            if isinstance(d.message, TaskMessage) and not _is_first(d, since)
        ]
        return verdicts_of(deliveries, await self._records(messages) if messages else {})

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        connection = self._joint()
        if connection is None or not isinstance(subscription, RedisSubscription):
            return await super().complete(subscription, completions)
        encoded = [
            (
                encode_message(c.settlement.message) if isinstance(c.settlement, Retry) else b"",
                b"" if c.task is None else encode_task(c.task),
            )
            for c in completions
        ]
        if _too_large(connection, encoded):
            return await super().complete(subscription, completions)
        outcomes = [DONE] * len(completions)
        uuids = [str(at) if c.task is None else c.task.uuid for at, c in enumerate(completions)]
        for part in parts(uuids, [sum(map(len, two)) for two in encoded]):
            tasks = [_recorded(completions[at]) for at in part]
            keys = RecordKeys(connection, self._storage.retention)
            asked: list[Settlement] = []
            for at, task in zip(part, tasks, strict=True):
                asked += _add(keys, completions[at].settlement, task, *encoded[at])
            with subscription.asking(asked):
                answers = await connection.run(COMPLETE, keys.keys, keys.args)
            for at, saved, settled in zip(part, answers[::2], answers[1::2], strict=True):
                outcomes[at] = await self._outcome(subscription, completions[at], saved, settled)
        return outcomes

    async def _outcome(
        self,
        subscription: RedisSubscription,
        completion: Completion,
        saved: Any,
        settled: int,
    ) -> Outcome:
        """Return the outcome of the record if there is one, else that of the settlement."""
        settlement, task = completion.settlement, completion.task
        outcome = DONE
        if settlement is not None:
            if settled:
                subscription.answered(settlement, done=settled == 1)
            if settlement.delivery.fence.settled != effect_of(settlement):
                outcome = LOST
        if task is None or (outcome is LOST and isinstance(settlement, Retry)):
            return outcome
        if saved == 0:
            # An earlier call of unknown outcome has made this retry.
            return (await self._save_within([task]))[0]
        return DONE if saved == 1 else refused_by(decode(task.uuid, saved))


def _is_first(delivery: Delivery, since: float) -> bool:
    """Whether the task has begun no run, as far as its records were looked at since then.

    A message with a key is never seen so: its record says which submission has the key.
    """
    fence, message = delivery.fence, delivery.message
    if not isinstance(fence, Fence) or fence.settled is not None or fence.first_at < since:
        return False
    return isinstance(message, TaskMessage) and not message.submission


def _recorded(completion: Completion) -> Task | None:
    """Return the record to save. A retry of a delivery that is known to be lost has none."""
    settlement = completion.settlement
    if isinstance(settlement, Retry):
        settled = settlement.delivery.fence.settled
        if settled is not None and settled != effect_of(settlement):
            return None
    return completion.task


def _add(
    keys: RecordKeys,
    settlement: Settlement | None,
    task: Task | None,
    message: bytes,
    record: bytes,
) -> list[Settlement]:
    """Add the arguments of one completion. Return its settlement if the server must decide it."""
    if settlement is None or settlement.delivery.fence.settled is not None:
        keys.sent += _NO_SETTLEMENT
        asked = []
    else:
        keys.sent += settling(keys, settlement)
        asked = [settlement]
        if message:
            keys.values.append(message)
    if task is None:
        keys.sent += _NO_RECORD
    else:
        keys.save(task, record)
    return asked


def _too_large(connection: Connection, encoded: Sequence[tuple[bytes, bytes]]) -> bool:
    largest = connection.server.largest
    return any(len(message) > largest or len(record) > largest for message, record in encoded)

"""A member of the workers' group that commits its offsets in transactions, together with records.

The driver's transactional commit does not tell the group of which generation it is. So the group
cannot refuse it, and a worker that was frozen for longer than its session could commit offsets of
partitions that others have by now. This is what stops it:

- A member has one producer, with a transactional id that was never used before. Once a later
  producer has started with the same id, the server refuses the earlier one: it is fenced.
- The metadata of each commit names the producer of the member that made it. A member writes the
  name by a plain commit, which does say the generation, before its first transaction with the
  partition. It starts the producer before that.
- Whoever takes over a partition reads that name, starts a producer with the same id, and reads the
  offsets again. Only then it takes over. So from the takeover on, the predecessor commits nothing:
  its open transaction was aborted, or is in the offsets that were read.
- A predecessor that was fenced, thaws and starts another producer has to write the new name first.
  That is the plain commit of an old generation, which the group refuses. If the group accepts it,
  the member still has these partitions: it was fenced because of another one that it gave away.

So one transaction serves all partitions of a member, and a member that only gave a partition away
repeats its next transaction once. If it is not known whether a transaction was committed, the
member fences itself, and looks for the transaction's number in the metadata.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from aiokafka.errors import IllegalGenerationError, KafkaError, UnknownMemberIdError
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from qtasks_core.errors import ConfigurationError
from qtasks_core.together import together
from qtasks_kafka.assignor import KeepingAssignor
from qtasks_kafka.connection import PAUSE
from qtasks_kafka.group import Commits, Membership
from qtasks_kafka.settings import REQUEST
from qtasks_kafka.transactions import RecordRefused, Transactor, fence
from qtasks_kafka.watermark import Partition, owner_of

if TYPE_CHECKING:
    from qtasks_kafka.connection import Connection
    from qtasks_kafka.writer import Record


class Step(NamedTuple):
    """What one transaction does, and what follows from it."""

    records: Sequence[Record]
    finished: Mapping[Partition, set[int]]
    """The offsets that it acknowledges."""
    done: Callable[[], None]
    """Called when it is committed, even if that becomes known later, after an error."""
    unclear: Callable[[], None]
    """Called if it will never be known: others have these partitions by now."""


class Doubt(NamedTuple):
    """A transaction that has begun and of which it is not known whether it was committed."""

    id: str
    sent: Mapping[TopicPartition, str]
    """The metadata that it commits. No other commit has the same."""
    step: Step


class TransactionalAssignor(KeepingAssignor):
    """Has a name of its own, so members that do not fence each other are in no group together."""

    name = "qtasks-transactional"


class TransactionalMembership(Membership):
    """Holds partitions as `Membership` does. One producer commits for all of them."""

    assignor = TransactionalAssignor

    def __init__(
        self, connection: Connection, group: str, topics: Iterable[str], lease: float
    ) -> None:
        super().__init__(connection, group, topics, lease)
        self._transactor: Transactor | None = None
        self._producers = 0
        self._transactions = 0
        self._named: set[TopicPartition] = set()
        """The partitions whose last commit names the current producer."""
        self._fenced: set[str] = set()
        self._doubt: Doubt | None = None

    async def check_rights(self) -> None:
        """Raise `ConfigurationError` if this user may not use a transactional id of the group."""
        with self._connection.reaching():
            async with asyncio.timeout(REQUEST):
                await fence(self._connection, self._id_of(self._owner))  # the first one is number 1

    async def transact(self, plan: Callable[[], Step | None]) -> None:
        """Do what `plan` returns in one transaction. None: there is nothing left to do.

        It is called when this member may commit, perhaps again after a failed attempt: deliveries
        may be lost meanwhile. Raises `Unavailable` if the outcome is not known yet; the next call
        looks first. Raises `RecordRefused`: then nothing was written.
        """
        with self._connection.reaching():
            async with asyncio.timeout(REQUEST):
                await self.open()
                finished = await self._try_transact(plan)
                while not finished:
                    await asyncio.sleep(PAUSE)
                    finished = await self._try_transact(plan)

    async def _try_transact(self, plan: Callable[[], Step | None]) -> bool:
        if not await self._try_confirm(set()):
            return False
        async with self._lock:
            if not self._assigned.is_set() or self._to_take:
                return False
            try:
                if self._is_member:
                    await self._prepare()
                if (step := plan()) is None:
                    return True
                if self._closed or not self._is_member:
                    self._lose_all()
                    return False
                await self._name_producer()
                await self._commit_together(step)
            except (UnknownMemberIdError, IllegalGenerationError):
                self._lose_all()
                return False
            except RecordRefused:
                await self._prepare()  # aborts it: nobody should wait for its end
                raise
            except KafkaError as error:
                if isinstance(self._connection.translated(error), ConfigurationError):
                    raise
                return False  # fenced, perhaps because of a partition that was given away
            return True

    async def _commit_together(self, step: Step) -> None:
        transactor = self._transactor
        assert transactor is not None
        self._transactions += 1
        places = {tp: p for tp, p in self.partitions.items() if p in step.finished}
        offsets = {
            tp: OffsetAndMetadata(*p.commit(self._owner, step.finished[p]))
            for tp, p in places.items()
        }
        assert len(offsets) == len(step.finished), "a delivery that is held is of our partitions"
        covered = {partition: set(partition.unconfirmed) for partition in places.values()}
        sent = {tp: committed.metadata for tp, committed in offsets.items()}
        self._doubt = Doubt(transactor.id, sent, step)
        try:
            await transactor.commit(step.records, offsets, self._group)
        except BaseException:
            self._drop_producer()
            raise
        self._doubt = None
        self._confirmed_at = time.monotonic()
        step.done()
        for partition, offsets_done in covered.items():
            partition.unconfirmed -= offsets_done
        self._floor.note({tp: committed.offset for tp, committed in offsets.items()})

    async def _prepare(self) -> None:
        """Find out what became of the last transaction. A plain commit could override it."""
        doubt = self._doubt
        if doubt is None:
            return
        await self._fence(doubt.id)
        now = await super()._commits(list(doubt.sent))
        stands = {tp: now[tp].metadata if tp in now else "" for tp in doubt.sent}
        self._doubt = None
        if any(stands[tp] == metadata for tp, metadata in doubt.sent.items()):
            doubt.step.done()
        elif not any(self._is_mine(owner_of(metadata)) for metadata in stands.values()):
            doubt.step.unclear()

    async def _name_producer(self) -> None:
        """Make sure that there is a producer, and that our commits name it."""
        if self._transactor is None:
            self._producers += 1
            self._named.clear()
            transactor = Transactor(self._connection, self._id_of(self._owner))
            await transactor.start()
            self._transactor = transactor
        if not self.partitions.keys() <= self._named:
            await self._commit(dict(self.partitions))

    async def _commits(self, places: list[TopicPartition]) -> Commits:
        """Return the commits of partitions, once no transaction can change them any more.

        That may be one of our own: a commit is answered before all partitions have its mark. If we
        have lost a partition since then, the group knows best what is finished there.
        """
        self._named.clear()
        while True:
            committed = await super()._commits(places)
            owners = {
                owner
                for tp, each in committed.items()
                if (owner := owner_of(each.metadata)).count(".") == 2
                and not (self._is_mine(owner) and tp in self.partitions)
            }
            if not (left := {self._id_of(owner) for owner in owners} - self._fenced):
                return committed
            if self._transactor is not None and self._transactor.id in left:
                self._drop_producer()
            await together([self._fence(each) for each in left])

    async def _fence(self, transactional_id: str) -> None:
        await fence(self._connection, transactional_id)
        self._fenced.add(transactional_id)

    async def _commit(self, places: dict[TopicPartition, Partition]) -> None:
        await super()._commit(places)
        if self._transactor is not None:
            self._named.update(places)

    @property
    def _owner(self) -> str:
        """This member, its producer, and the number of its last transaction."""
        return f"{self._name}.{self._producers}.{self._transactions}"

    def _is_mine(self, owner: str) -> bool:
        return owner.partition(".")[0] == self._name

    def _id_of(self, owner: str) -> str:
        """Return the transactional id of the producer that an owner names."""
        return f"{self._group}.{owner.rpartition('.')[0]}"

    def _drop_producer(self) -> None:
        transactor, self._transactor = self._transactor, None
        if transactor is not None:
            transactor.close()

    async def close(self) -> None:
        await super().close()
        self._drop_producer()

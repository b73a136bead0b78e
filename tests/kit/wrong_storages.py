"""Storages that are wrong on purpose, each in one way, each named for what it does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec.structs import replace

from qtasks_core import DONE, Guarantees, Outcome, Task
from qtasks_core.records import FINAL
from qtasks_memory.connection import Memory, connect
from qtasks_memory.inbox import MemoryInbox
from tests.kit.served import Storage


class ChangesFinals(Storage):
    """The last final record wins."""

    def _save(self, memory: Memory, task: Task) -> Outcome:
        if task.status in FINAL:
            memory.records.pop(task.uuid, None)
        return super()._save(memory, task)


class GoesBack(Storage):
    """Of records that are not final the last one wins."""

    def _save(self, memory: Memory, task: Task) -> Outcome:
        stored = memory.records.get(task.uuid)
        if stored is not None and stored.status not in FINAL:
            del memory.records[task.uuid]
        return super()._save(memory, task)


class ComparesAttemptsOfFinals(Storage):
    """A later attempt overwrites the end of an earlier one."""

    def _save(self, memory: Memory, task: Task) -> Outcome:
        stored = memory.records.get(task.uuid)
        if stored is not None and task.attempt > stored.attempt:
            del memory.records[task.uuid]
        return super()._save(memory, task)


class TakesAnything(Storage):
    """The last record wins, whatever it is."""

    def _save(self, memory: Memory, task: Task) -> Outcome:
        memory.records.pop(task.uuid, None)
        return super()._save(memory, task)


class ReplacesFirstRecords(Storage):
    """Of first records the last one wins, as long as the order does not go back."""

    def _save(self, memory: Memory, task: Task) -> Outcome:
        stored = memory.records.get(task.uuid)
        if stored is not None and stored.status in ("new", "scheduled"):
            del memory.records[task.uuid]
        return super()._save(memory, task)


class IsInTheWayOfFirstRecords(Storage):
    """Who watches a task leaves a record of it."""

    class inbox_class(MemoryInbox):
        async def watch(self, uuids: Sequence[str]) -> None:
            await super().watch(uuids)
            for uuid in uuids:
                self._memory.records.setdefault(uuid, Task(uuid=uuid, task_name="", status="new"))


class RefusesRepeats(Storage):
    def _save(self, memory: Memory, task: Task) -> Outcome:
        stored = memory.records.get(task.uuid)
        if stored is not None and stored.status in FINAL:
            return Outcome("refused", "a final record is there", stored)
        return super()._save(memory, task)


class SaysDoneToAll(Storage):
    def _save(self, memory: Memory, task: Task) -> Outcome:
        super()._save(memory, task)
        return DONE


class CutsLongUuids(Storage):
    """Its server has room for 100 characters, and it cuts what is longer."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        return await super().save([replace(task, uuid=task.uuid[:100]) for task in tasks])

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        found = await super().get([uuid[:100] for uuid in uuids])
        return [t and replace(t, uuid=u) for t, u in zip(found, uuids, strict=True)]


class TellsOfOneLine(Storage):
    """It tells an inbox of uuids line by line, and a uuid may have several."""

    def _save(self, memory: Memory, task: Task) -> Outcome:
        outcome = super()._save(memory, task)
        lost = "\n" in task.uuid
        for inbox in memory.inboxes.values():
            if lost and not inbox.empty():
                inbox.get_nowait()
        return outcome


class HidesWhatIsThere(Storage):
    def _save(self, memory: Memory, task: Task) -> Outcome:
        outcome = super()._save(memory, task)
        return Outcome(outcome.status, outcome.reason)


class RacesItself(Storage):
    """It looks, waits for something else, and then writes on what it saw."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        memory = self._started()
        seen = {task.uuid: memory.records.get(task.uuid) for task in tasks}
        await asyncio.sleep(0.01)
        outcomes: list[Outcome] = []
        for task in tasks:
            there = seen[task.uuid]
            if there is None:
                memory.records.pop(task.uuid, None)
            outcomes.append(self._save(memory, task))
            seen[task.uuid] = memory.records[task.uuid]
        return outcomes


class ReadsStale(Storage):
    """It answers from what it read first."""

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        memory = self._started()
        if not hasattr(self, "_view"):
            self._view = dict(memory.records)
        return [self._view.get(uuid) for uuid in uuids]


class AnswersInItsOwnOrder(Storage):
    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        return await super().get(sorted(set(uuids)))


class LosesTheTraceback(Storage):
    def _save(self, memory: Memory, task: Task) -> Outcome:
        return super()._save(memory, replace(task, traceback=None))


class MixesNamespaces(Storage):
    async def start(self, namespace: str) -> None:
        self._memory = connect("", "everybody")


class PromisesLess(Storage):
    @property
    def guarantees(self) -> Guarantees:
        return replace(super().guarantees, survives="nothing")


class WatchesWithoutReading(Storage):
    """What became final before is never heard of."""

    class inbox_class(MemoryInbox):
        async def watch(self, uuids: Sequence[str]) -> None:
            for uuid in uuids:
                self._memory.watchers[uuid].add(self.address)


class ReadsBeforeItSubscribes(Storage):
    """What becomes final between the two is never heard of."""

    class inbox_class(MemoryInbox):
        async def watch(self, uuids: Sequence[str]) -> None:
            for uuid in uuids:
                record = self._memory.records.get(uuid)
                if record is not None and record.status in FINAL:
                    self._arrived.put_nowait(record)
            await asyncio.sleep(0.002)
            for uuid in uuids:
                self._memory.watchers[uuid].add(self.address)


class HearsOnlyWhileItListens(Storage):
    """News that finds nobody in `receive` is dropped."""

    class inbox_class(MemoryInbox):
        async def receive(self) -> list[Task]:
            while not self._arrived.empty():
                self._arrived.get_nowait()
            return await super().receive()


class DropsOnCancel(Storage):
    class inbox_class(MemoryInbox):
        async def receive(self) -> list[Task]:
            tasks = await super().receive()
            # Longer than the kit ever waits before it cancels: some are always dropped.
            await asyncio.sleep(0.01)
            return tasks


class TellsWhatItRefused(Storage):
    def _save(self, memory: Memory, task: Task) -> Outcome:
        outcome = super()._save(memory, task)
        if outcome.status == "refused" and task.reply_to in memory.inboxes:
            memory.inboxes[str(task.reply_to)].put_nowait(task)
        return outcome


class TellsBeforeTheEnd(Storage):
    def _save(self, memory: Memory, task: Task) -> Outcome:
        if task.status not in FINAL and task.reply_to in memory.inboxes:
            memory.inboxes[str(task.reply_to)].put_nowait(task)
        return super()._save(memory, task)


class TellsOneWatcher(Storage):
    """A watcher takes the place of the one who asked."""

    def _save(self, memory: Memory, task: Task) -> Outcome:
        if memory.watchers.get(task.uuid):
            task = replace(task, reply_to=None)
        return super()._save(memory, task)


class ForgetsTooMuch(Storage):
    class inbox_class(MemoryInbox):
        def forget(self, uuids: object) -> None:
            self._memory.watchers.clear()


class UsesWhatIsStopped(Storage):
    """Before `start` and after `stop` it pretends to work."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        return await super().save(tasks) if self._memory else [DONE] * len(tasks)


class HangsWhenDown(Storage):
    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        if not self.server.up:
            await asyncio.sleep(3600.0)
        return await super().save(tasks, transaction)

"""The tasks that an inbox waits for, and the tasks to read again after a reconnect."""

from __future__ import annotations

from collections.abc import Iterable

from qtasks_core.records import FINAL
from qtasks_core.schemas import Task


class Awaited:
    """The tasks that an inbox waits for, and the final records that it has not returned yet.

    An inbox that may have missed something reads all `uuids` again. It also asks the server to
    watch the `watched` ones again.
    """

    def __init__(self) -> None:
        self.uuids: set[str] = set()
        """All tasks that the inbox waits for."""
        self.watched: set[str] = set()
        """The tasks that the server has to watch, because another client submitted them."""
        self.to_unwatch: set[str] = set()
        """The inbox no longer watches these tasks, but the server does not know it yet."""
        self._arrived: list[Task] = []

    @property
    def expected(self) -> set[str]:
        """The tasks that the inbox waits for and does not watch."""
        return self.uuids - self.watched

    def expect(self, uuids: Iterable[str]) -> None:
        """Wait for tasks."""
        self.uuids.update(uuids)

    def watch(self, uuids: Iterable[str]) -> list[str]:
        """Wait for tasks that the server has to watch. Return those that it does not watch yet."""
        new = [uuid for uuid in dict.fromkeys(uuids) if uuid not in self.watched]
        self.uuids.update(new)
        self.watched.update(new)
        self.to_unwatch.difference_update(new)
        return new

    def forget(self, uuids: Iterable[str]) -> None:
        """Stop waiting for tasks."""
        forgotten = set(uuids)
        self.uuids -= forgotten
        self.to_unwatch |= self.watched & forgotten
        self.watched -= forgotten

    def arrive(self, tasks: Iterable[Task | None]) -> list[str]:
        """Keep the final records of awaited tasks, each once, and return which were watched.

        The returned tasks are not in `to_unwatch`: most servers stop watching after they have
        notified.
        """
        watched: list[str] = []
        for task in tasks:
            if task is None or task.status not in FINAL or task.uuid not in self.uuids:
                continue
            self._arrived.append(task)
            self.uuids.remove(task.uuid)
            if task.uuid in self.watched:
                self.watched.remove(task.uuid)
                watched.append(task.uuid)
        return watched

    def take(self) -> list[Task]:
        """Return the records that arrived since the last call. `receive` returns them."""
        arrived, self._arrived = self._arrived, []
        return arrived

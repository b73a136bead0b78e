"""Warnings about task options that the broker or storage does not support, once per task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from qtasks_core import Broker, Guarantees, Storage, TaskMessage
from qtasks_core.lookup import installed_parts

logger = logging.getLogger("qtasks")

USUAL = TaskMessage(uuid="-", task_name="-", queue="-").priority
"""The default priority of a task."""


class Unsupported:
    """Compares the options of tasks with the guarantees of broker and storage."""

    def __init__(self) -> None:
        self._of_priority: set[str] = set()
        self._of_retention: set[str] = set()

    def declared(
        self, priority: set[str], retention: set[str], broker: Broker, storage: Storage
    ) -> None:
        """Warn about declared tasks with options that the broker or storage does not support.

        Both have started. `priority` and `retention`: the names of the tasks with these options.
        """
        self._judge(priority, retention, broker, storage)

    def submitted(self, messages: Sequence[TaskMessage], broker: Broker, storage: Storage) -> None:
        """Warn about calls with such options, also of tasks that are not registered here."""
        asking = [m for m in messages if m.priority != USUAL or m.retention is not None]
        if asking:
            self._judge(
                {m.task_name for m in asking if m.priority != USUAL},
                {m.task_name for m in asking if m.retention is not None},
                broker,
                storage,
            )

    def _judge(
        self, priority: set[str], retention: set[str], broker: Broker, storage: Storage
    ) -> None:
        if new := priority - self._of_priority:
            self._of_priority |= new
            if not has_priorities(broker.guarantees):
                self._warn("a priority", new, broker, has_priorities, "is ignored")
        if new := retention - self._of_retention:
            self._of_retention |= new
            if not deletes(storage.guarantees):
                self._warn("a retention", new, storage, deletes, "is ignored: records are kept")

    def _warn(
        self,
        what: str,
        names: Iterable[str],
        used: Broker | Storage,
        able: Callable[[Guarantees], bool],
        then: str,
    ) -> None:
        new = sorted(names)
        half: Literal["broker", "storage"] = "broker" if isinstance(used, Broker) else "storage"
        others = [told.part for told in installed_parts(half) if able(told)]
        logger.warning(
            "%s asks for %s, which %s does not have: it %s. Each %s that has it, with any %s: %s",
            f"task {new[0]}" if len(new) == 1 else f"each of the tasks {', '.join(new)}",
            what,
            used.guarantees.part,
            then,
            half,
            "storage" if half == "broker" else "broker",
            ", ".join(others) or "none that is installed",
        )


def has_priorities(broker: Guarantees) -> bool:
    """Return whether a broker delivers messages of a higher priority first."""
    return broker.priorities


def deletes(storage: Guarantees) -> bool:
    """Return whether a storage deletes records after their retention, by itself or by `expire`."""
    return storage.retention is not None or "expire" not in storage.unsupported

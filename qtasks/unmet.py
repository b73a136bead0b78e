"""What tasks ask for that their broker or storage cannot do: logged once a task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from qtasks.definition import TaskDefinition, TaskOptions
from qtasks_core import Broker, Guarantees, Storage, TaskMessage
from qtasks_core.lookup import installed_parts

logger = logging.getLogger("qtasks")

USUAL = TaskOptions().priority
"""The priority of a task that asks for none."""


class Unmet:
    """What one app has been warned of."""

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def declared(
        self, definitions: Iterable[TaskDefinition], broker: Broker, storage: Storage
    ) -> None:
        """Warn of tasks whose options ask for what is not there; `broker` has been started."""
        known = list(definitions)
        if not has_priorities(broker.guarantees):
            asking = [d.name for d in known if d.options.priority != USUAL]
            self._warn("a priority", asking, broker, has_priorities, "is ignored")
        if not deletes(storage.guarantees):
            asking = [d.name for d in known if d.options.retention is not None]
            self._warn("a retention", asking, storage, deletes, "is ignored: records are kept")

    def submitted(self, messages: Sequence[TaskMessage], broker: Broker) -> None:
        """Warn of calls that ask for a priority."""
        asking = {m.task_name for m in messages if m.priority != USUAL}
        if asking and not has_priorities(broker.guarantees):
            self._warn("a priority", asking, broker, has_priorities, "is ignored")

    def _warn(
        self,
        what: str,
        names: Iterable[str],
        part: Broker | Storage,
        able: Callable[[Guarantees], bool],
        then: str,
    ) -> None:
        new = sorted(name for name in set(names) if (what, name) not in self._told)
        if not new:
            return
        self._told.update((what, name) for name in new)
        half: Literal["broker", "storage"] = "broker" if isinstance(part, Broker) else "storage"
        others = [told.part for told in installed_parts(half) if able(told)]
        logger.warning(
            "%s asks for %s, which %s does not have: it %s. Each %s that has it, with any %s: %s",
            f"task {new[0]}" if len(new) == 1 else f"each of the tasks {', '.join(new)}",
            what,
            part.guarantees.part,
            then,
            half,
            "storage" if half == "broker" else "broker",
            ", ".join(others) or "none that is installed",
        )


def has_priorities(broker: Guarantees) -> bool:
    """Say whether a broker hands out messages of a higher priority first."""
    return broker.priorities


def deletes(storage: Guarantees) -> bool:
    """Say whether records leave a storage at their time, by themselves or by `expire`."""
    return storage.retention is not None or "expire" not in storage.unsupported

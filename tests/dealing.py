"""Which process runs which tests, with `-n`.

Each process has servers of its own, so a test that kills one harms no neighbour. But servers are
dear: a Kafka or RabbitMQ takes a good part of a core even when idle. So few processes run the tests
of one server.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import Any

from xdist.scheduler import LoadScopeScheduling

PACKAGING = "tests/packaging/"
TOGETHER = (PACKAGING, "tests/kit/", "tests/typing/", "tests/e2e/test_compose.py")
"""Directories and files whose tests share what is dear to make: one process has all of one."""
SECURED = ("tests/kafka/test_rights", "tests/kafka/test_setup")
"""Files whose tests use the Kafka with logins, which is one more server."""
MOST = {"secured kafka": 1, "kafka": 3, "rabbitmq": 3, "postgres": 2, "redis": 2}
"""How many processes may have the tests of a server, the dearest server first.

With one alone they would take longer than all others: most of them wait."""


@cache
def home_of(scope: str) -> str | None:
    """Return the dearest server that the id of tests speaks of.

    Where an id does not say what its test uses, nothing fails: one more process starts that server.
    """
    if scope in TOGETHER:
        return "kafka" if scope == PACKAGING else None
    if scope.startswith(SECURED):
        return "secured kafka"
    return next((server for server in MOST if server in scope.lower()), None)


def rank(scope: str) -> int:
    """Return which place tests have in the queue: first what takes one process long."""
    if scope in TOGETHER:
        return -1
    home = home_of(scope)
    return list(MOST).index(home) if home else len(MOST)


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # it is untyped
    """Deals each test to a process that may have it; some directories in one piece."""

    workqueue: OrderedDict[str, dict[str, bool]]

    def __init__(self, config: Any, log: Any) -> None:
        super().__init__(config, log)
        self._hosts: dict[str, set[Any]] = {server: set() for server in MOST}
        self._sorted = False

    def _split_scope(self, nodeid: str) -> str:
        return next((name for name in TOGETHER if nodeid.startswith(name)), nodeid)

    def _next_for(self, node: Any) -> str | None:
        """Return the first tests in the queue that the process may have.

        What else they use than their dearest server, it starts as well.
        """
        if not self._sorted:
            units = sorted(self.workqueue.items(), key=lambda unit: rank(unit[0]))
            self.workqueue, self._sorted = OrderedDict(units), True
        full = {
            s for s, taken in self._hosts.items() if len(taken) >= MOST[s] and node not in taken
        }
        return next((scope for scope in self.workqueue if home_of(scope) not in full), None)

    def _assign_work_unit(self, node: Any) -> None:
        scope = self._next_for(node)
        if scope is not None:
            if home := home_of(scope):
                self._hosts[home].add(node)
            self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

    def _reschedule(self, node: Any) -> None:
        """Give the process tests until one waits behind the one that runs.

        A process runs its last test only once it knows that no other comes.
        """
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) <= 2:
            if self._next_for(node) is None:
                node.shutdown()
            else:
                self._assign_work_unit(node)

    def remove_node(self, node: Any) -> str | None:
        """Forget a process that has ended; return the test that crashed it, which is not repeated.

        Its servers have ended with it, so another may start them.
        """
        for hosts in self._hosts.values():
            hosts.discard(node)
        units = self.assigned_work.pop(node)
        left = {scope: unit for scope, unit in units.items() if not all(unit.values())}
        if not left:
            return None
        unit = next(iter(left.values()))
        crashed: str = next(test for test, done in unit.items() if not done)
        unit[crashed] = True
        self.workqueue.update(
            {scope: unit for scope, unit in left.items() if not all(unit.values())}
        )
        for other in self.assigned_work:
            self._reschedule(other)
        return crashed

"""The memory that brokers and storages share: dicts and heaps, one set for each namespace."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from heapq import heappop, heappush
from itertools import count

from qtasks_core import Command, QueueDepth, Task, TaskMessage
from qtasks_core.records import FINAL


class Entry:
    """One message in a queue, which delivery holds it, and until when."""

    __slots__ = ("count", "held_until", "holder", "message")

    def __init__(self, message: TaskMessage) -> None:
        self.message = message
        self.count = 0
        self.holder = 0
        """The number of the delivery that holds it. 0: no delivery holds it."""
        self.held_until = 0.0


class Queue:
    """Messages in order of priority, delayed messages, and messages in flight."""

    def __init__(self) -> None:
        self._ready: list[tuple[int, int, Entry]] = []
        self._delayed: list[tuple[float, int, Entry]] = []
        self._sequence = count()
        self.in_flight: dict[int, Entry] = {}

    def put(self, entry: Entry, due: float = 0.0) -> None:
        """Add an entry. It is receivable when the clock shows `due`."""
        entry.holder = 0
        if due:
            heappush(self._delayed, (due, next(self._sequence), entry))
        else:
            heappush(self._ready, (-entry.message.priority, next(self._sequence), entry))

    def pop(self, now: float) -> Entry | None:
        """Return the next receivable entry."""
        while self._delayed and self._delayed[0][0] <= now:
            self.put(heappop(self._delayed)[2])
        if not self._ready:
            for holder, entry in list(self.in_flight.items()):
                if entry.held_until <= now:
                    del self.in_flight[holder]
                    self.put(entry)
        return heappop(self._ready)[2] if self._ready else None

    def depth(self, now: float) -> QueueDepth:
        """Count as a receiver would find the queue now."""
        lost = sum(entry.held_until <= now for entry in self.in_flight.values())
        due = sum(moment <= now for moment, _, _ in self._delayed)
        return QueueDepth(
            ready=len(self._ready) + lost + due,
            delayed=len(self._delayed) - due,
            in_flight=len(self.in_flight) - lost,
        )

    def purge(self, now: float) -> int:
        """Drop all entries that are not held, and return their number."""
        lost = [holder for holder, entry in self.in_flight.items() if entry.held_until <= now]
        for holder in lost:
            del self.in_flight[holder]
        dropped = len(self._ready) + len(self._delayed) + len(lost)
        self._ready.clear()
        self._delayed.clear()
        return dropped

    def next_change(self) -> float | None:
        """Return when an entry may become receivable without a new message."""
        moments = [entry.held_until for entry in self.in_flight.values()]
        if self._delayed:
            moments.append(self._delayed[0][0])
        return min(moments, default=None)


class Clock:
    """The clock of one memory. A test may stop it, and move it ahead."""

    def __init__(self) -> None:
        self.ahead = 0.0
        """Seconds by which it was moved ahead of real time."""
        self._stands_at: float | None = None
        """None: it runs."""
        self._stopped_at = 0.0
        """The Unix time at which it was stopped."""

    def now(self) -> float:
        """Return the loop's time, or the time at which this clock stands."""
        return asyncio.get_running_loop().time() if self._stands_at is None else self._stands_at

    def travel(self, seconds: float) -> float:
        """Stop the clock if it runs, and move it ahead. Return the time at which it stands."""
        if self._stands_at is None:
            self._stopped_at = time.time()
        self.ahead += seconds
        # The microsecond absorbs rounding: two steps of 0.1 and 0.2 must reach a delay of 0.3.
        self._stands_at = self.now() + seconds + 1e-6
        return self._stands_at

    def when(self, moment: float | None) -> float | None:
        """Return the loop's time at `moment`. None: a stopped clock does not get there itself."""
        return moment if self._stands_at is None else None

    def unix_time(self) -> float | None:
        """Return the Unix time at which it stands. None: it runs."""
        return None if self._stands_at is None else self._stopped_at + self.ahead


class Memory:
    """All data of one namespace."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.queues: defaultdict[str, Queue] = defaultdict(Queue)
        self.deliveries = count(1)
        self.receivers: set[asyncio.Event] = set()
        self.listeners: set[asyncio.Queue[Command | None]] = set()
        self.records: dict[str, Task] = {}
        self.expiries: dict[str, float | None] = {}
        """The Unix time from which each final record counts as deleted, moved like `clock`.

        None: never.
        """
        self.values: dict[str, bytes] = {}
        self.value_watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.claims: dict[str, tuple[str, float]] = {}
        """By key: the owner, and until when it holds the key by `clock`."""
        self.streams: defaultdict[str, list[bytes]] = defaultdict(list)
        self.inboxes: dict[str, asyncio.Queue[Task | None]] = {}
        """The records that arrived at each address. None closes the inbox."""
        self.watchers: defaultdict[str, set[str]] = defaultdict(set)

    def record(self, uuid: str) -> Task | None:
        """Return a record unless it has expired, even if `expire` has not deleted it yet."""
        record = self.records.get(uuid)
        if record is None or record.status not in FINAL:
            return record
        expiry = self.expiries.get(uuid)
        now = time.time() + self.clock.ahead
        return None if expiry is not None and expiry <= now else record

    def ring(self) -> None:
        """Wake every receiver: an entry became receivable, or may have."""
        for receiver in self.receivers:
            receiver.set()


_memories: defaultdict[tuple[str, str], Memory] = defaultdict(Memory)


def connect(name: str, namespace: str) -> Memory:
    """Return the memory that all brokers and storages of this name and namespace share."""
    return _memories[name, namespace]


def forget(name: str, namespace: str) -> None:
    """Drop a memory. Brokers and storages that start from now on get a new one."""
    _memories.pop((name, namespace), None)

"""The server of this example: it keeps bytes, and wakes receivers when something changes."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from itertools import count
from typing import NamedTuple


class Row:
    """A message. Nobody gets it before `wake_at`, when its delay or its lease is over."""

    def __init__(self, queue: str, data: bytes, wake_at: float) -> None:
        self.queue = queue
        self.data = data
        self.wake_at = wake_at
        self.holder = 0
        self.deliveries = 0


class Record(NamedTuple):
    """The record of a task. It counts as deleted from the Unix time `expires_at` on."""

    data: bytes
    expires_at: float


class Shelf:
    """The data of one namespace."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.numbers = count(1)
        self.waiting: set[asyncio.Event] = set()
        self.listeners: set[asyncio.Queue[bytes]] = set()
        self.records: dict[str, Record] = {}
        self.boxes: dict[str, asyncio.Queue[bytes]] = {}
        self.watchers: defaultdict[str, set[str]] = defaultdict(set)
        self.values: dict[str, bytes] = {}
        self.claims: dict[str, tuple[str, float]] = {}
        self.streams: defaultdict[str, list[bytes]] = defaultdict(list)

    def put(self, queue: str, data: bytes, delay: float) -> None:
        now = asyncio.get_running_loop().time()
        self.rows[next(self.numbers)] = Row(queue, data, now + delay)
        self.ring()

    def ring(self) -> None:
        for bell in self.waiting:
            bell.set()


_shelves: defaultdict[tuple[str, str], Shelf] = defaultdict(Shelf)


def connect(name: str, namespace: str) -> Shelf:
    return _shelves[name, namespace]

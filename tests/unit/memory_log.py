"""An honest log in memory for the tests of LogStorage: partitions, compaction, faults."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from uuid import uuid4
from zlib import crc32

import msgspec

from qtasks_core import Guarantees
from qtasks_core.errors import Unavailable
from qtasks_log import Entry, Log, Replaced


class Partition:
    """Entries at offsets that stay what they are when compaction leaves holes."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, Entry]] = []
        self.end = 0

    def append(self, entry: Entry) -> None:
        self.entries.append((self.end, entry))
        self.end += 1

    def after(self, offset: int) -> list[tuple[int, Entry]]:
        return [(at, entry) for at, entry in self.entries if at >= offset]

    def compact(self, upto: int, cleaned_to: int | None = None, drop_tombstones: int = 0) -> None:
        """Keep the last entry of each key in front of `upto`, as a log cleaner does.

        A cleaner that dies half way has rewritten only what is in front of `cleaned_to`.
        Tombstones in front of `drop_tombstones` go too where nothing older is left of their key.
        """
        last = {entry.key: at for at, entry in self.entries if at < upto}
        cleaned_to = upto if cleaned_to is None else min(cleaned_to, upto)
        kept = [
            (at, entry) for at, entry in self.entries if at >= cleaned_to or last[entry.key] == at
        ]
        first: dict[str, int] = {}
        for at, entry in kept:
            first.setdefault(entry.key, at)
        self.entries = [
            (at, entry)
            for at, entry in kept
            if entry.value is not None or at >= drop_tombstones or first[entry.key] < at
        ]


@dataclass
class Server:
    """What survives every process: one list of partitions a namespace."""

    partitions: int = 1
    logs: dict[str, list[Partition]] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    identity: str = field(default_factory=lambda: uuid4().hex)

    def log(self, namespace: str) -> list[Partition]:
        fresh = [Partition() for _ in range(self.partitions)]
        return self.logs.setdefault(namespace, fresh)

    def entries(self, namespace: str = "app") -> list[Entry]:
        return [entry for partition in self.log(namespace) for _, entry in partition.entries]


def never() -> bool:
    return False


class MemoryLog(Log):
    """A client of a `Server`. Each fault is asked for whether it strikes now."""

    def __init__(
        self,
        server: Server,
        *,
        chunk: int = 100,
        append_lost: Callable[[], bool] = never,
        append_unknown: Callable[[], bool] = never,
        read_fails: Callable[[], bool] = never,
        mark_fails: Callable[[], bool] = never,
        pause: Callable[[], float] = lambda: 0.0,
        compacts: bool = True,
        largest: int | None = None,
    ) -> None:
        self.server = server
        self.chunk = chunk
        self.append_lost = append_lost
        self.append_unknown = append_unknown
        self.read_fails = read_fails
        self.mark_fails = mark_fails
        self.pause = pause
        self._compacts = compacts
        self.largest = largest
        self.appends = 0
        self.marks = 0
        self.seeks: list[bytes | None] = []
        self.replaced = False
        """Set by a test: the log has lost entries that this reader would have read."""
        self._positions: list[int] = []

    @property
    def guarantees(self) -> Guarantees:
        return Guarantees(part="MemoryLog", survives="nothing", durability="none")

    @property
    def compacts(self) -> bool:
        return self._compacts

    async def migrate(self, namespace: str) -> list[str]:
        made = namespace not in self.server.logs
        self.server.log(namespace)
        return [f"log {namespace} made"] if made else []

    async def start(self, namespace: str) -> None:
        self._partitions = self.server.log(namespace)
        self._positions = [0] * len(self._partitions)

    async def stop(self) -> None:
        self._positions = []

    async def append(self, entries: Sequence[Entry]) -> list[str | None]:
        self.appends += 1
        await asyncio.sleep(self.pause())
        if self.append_lost():
            raise Unavailable("append lost")
        unknown = self.append_unknown()
        some = entries[: random.randint(0, len(entries))] if unknown else entries
        for entry in some:
            if self.refuses(entry) is not None:
                continue
            self._partitions[crc32(entry.partition_key.encode()) % self.server.partitions].append(
                entry
            )
        self._ring()
        await asyncio.sleep(self.pause())
        if unknown:
            raise Unavailable("append unknown")
        return [self.refuses(entry) for entry in entries]

    def refuses(self, entry: Entry) -> str | None:
        over = self.largest is not None and len(entry.value or b"") > self.largest
        return "larger than the log takes" if over else None

    def _ring(self) -> None:
        self.server.changed.set()
        self.server.changed = asyncio.Event()

    async def read(self) -> list[Entry]:
        while True:
            await asyncio.sleep(self.pause())
            if self.read_fails():
                raise Unavailable("read failed")
            if self.replaced:
                self.replaced = False
                raise Replaced("the log lost entries")
            for number, partition in enumerate(self._partitions):
                found = partition.after(self._positions[number])[: self.chunk]
                if found:
                    self._positions[number] = found[-1][0] + 1
                    return [entry for _, entry in found]
                if self._positions[number] < partition.end:
                    # Nothing but holes are left in front of the end.
                    self._positions[number] = partition.end
                    return []
            await self.server.changed.wait()

    @property
    def position(self) -> bytes:
        return msgspec.json.encode((self.server.identity, self._positions))

    async def seek(self, position: bytes | None) -> bool:
        await asyncio.sleep(self.pause())
        self.seeks.append(position)
        self._positions = [0] * len(self._partitions)
        if position is None:
            return True
        identity, positions = msgspec.json.decode(position, type=tuple[str, list[int]])
        ends = [partition.end for partition in self._partitions]
        fits = [at <= end for at, end in zip(positions, ends, strict=False)]
        if identity != self.server.identity or len(positions) != len(ends) or not all(fits):
            return False
        self._positions = positions
        return True

    async def mark(self) -> object:
        self.marks += 1
        await asyncio.sleep(self.pause())
        if self.mark_fails():
            raise Unavailable("mark failed")
        ends = [partition.end for partition in self._partitions]
        await asyncio.sleep(self.pause())
        return ends

    def reached(self, mark: object) -> bool:
        assert isinstance(mark, list)
        return all(at >= end for at, end in zip(self._positions, mark, strict=True))

"""Tracks which records of one partition are finished, although they finish out of order.

Kafka commits one offset per partition. The commit's metadata tells what is finished above it. It
contains the position after the newest delivered record. It also contains the open records before
that position, and how often each was delivered. A successor delivers only those again.

A record in flight can be replaced by a copy in another partition. The copy is in flight from then
on, although it comes after the position.
"""

from __future__ import annotations

from base64 import b85decode, b85encode
from collections import deque
from collections.abc import Iterable, Iterator, Set

METADATA_LIMIT = 4000
"""Characters. A server accepts 4096 (offset.metadata.max.bytes)."""
_VERSION = "1"


class Partition:
    """One receiver's hold on a partition, from the takeover until it is lost."""

    def __init__(self, position: int, open_: dict[int, int] | None = None) -> None:
        self.position = position
        """The offset after the newest delivered record."""
        self.open = dict(open_ or {})
        """Unfinished offsets, ascending, and how often each was delivered."""
        self.returning = deque(self.open)
        """The unfinished offsets that wait to be fetched (again)."""
        self.ahead: dict[int, int | None] = {}
        """Copies at offsets that fetching has not reached. They are in flight already.

        Each has the number of its deliveries, or None once it is finished.
        """
        self.moved: dict[int, tuple[Partition, int]] = {}
        """The copies that have replaced records of this partition: their partitions and offsets."""
        self.expected = self.next_fetch
        """The next offset that fetching should bring."""
        self._looked_at: int | None = None
        """The offset from which records were fetched again, because they had not come."""
        self._read_to: int | None = None
        """The driver's position after the last fetch that is noted here."""
        self._since = 0
        """The offset after the last fetched record."""
        self._empty: dict[int, int] = {}
        """The first offsets of gaps in which the log has no record, and the offsets after them."""
        self.unconfirmed: set[int] = set()
        """Finished offsets that no accepted commit contains yet."""
        self.lost = False
        self.announced = False
        """Whether the group knows of the first delivery here.

        From then on, each finished task leads to a commit. Without this first commit, a message
        that crashes its receiver at once would never be counted.
        """

    @property
    def watermark(self) -> int:
        """The offset below which all records are finished."""
        return next(iter(self.open), self.position)

    @property
    def next_fetch(self) -> int:
        """The offset from which to fetch the next records to deliver."""
        return self.returning[0] if self.returning else self.position

    @property
    def in_flight(self) -> int:
        """The number of records that are delivered and not settled."""
        if self.lost:
            return 0
        ahead = sum(count is not None for count in self.ahead.values()) if self.ahead else 0
        return len(self.open) - len(self.returning) + ahead

    def begin(self, first: int) -> None:
        """Note the first offset of the log. Records before it cannot be fetched."""
        while self.returning and self.returning[0] < first:
            del self.open[self.returning.popleft()]
        self.position = max(self.position, first)
        self._reach(first)

    def fetch_from(self, offset: int, *, again: bool = False) -> None:
        """Note that fetching continues at `offset`. With `again`, it checks a gap."""
        self.expected = offset
        self._looked_at = offset if again else None
        self._empty.clear()

    def follow(self, before: int, offsets: Iterable[int], after: int) -> None:
        """Note that the driver has gone from one position to another, and what came on its way.

        The other offsets in between have no record for us: they are the marks of transactions,
        records of aborted ones, or compacted. The records must all have been noted here: if a
        position is not that of the fetch before, some may be lost, and nothing is known of a gap.
        """
        if before != self._read_to:
            self._since = before
        for offset in offsets:
            if offset > self._since:
                self._empty[self._since] = offset
            self._since = offset + 1
        self._read_to = after

    def skips(self, offset: int) -> bool:
        """Return whether offsets before a fetched record must be fetched once more.

        A log may have gaps. But a record that the driver returned may also be lost on its way here.
        This looks like a gap too. A delivery after it would count the lost record as finished.
        `follow` tells which gaps are empty.
        """
        self.expected = self._empty.pop(self.expected, self.expected)
        return offset > self.expected and self._looked_at != self.expected

    def deliver(self, offset: int, before: int = 0) -> int | None:
        """Note that a fetched record is delivered. Return the known number of its deliveries.

        `before` is how often its original was delivered, if the record is a copy. None: it must not
        be delivered, because it is finished or in flight. Raises `ValueError` if that would pass
        offsets that may hold a record.
        """
        if self.skips(offset):
            raise ValueError(f"offset {offset} comes, and {self.expected} has not")
        self.expected = max(self.expected, offset + 1)
        while self.returning and self.returning[0] < offset:
            # Fetching passed this offset, so the log no longer has it.
            del self.open[self.returning.popleft()]
        if self.returning and self.returning[0] == offset:
            self.returning.popleft()
            self.open[offset] += 1
            return self.open[offset]
        if offset < self.position:
            return None
        self.position = offset + 1
        if self.ahead and self._reach(offset + 1):
            return None
        self.open[offset] = 1 + before
        return 1 + before

    def move(self, offset: int, target: Partition, copy: int) -> None:
        """Replace a record in flight by its copy, which fetching has not reached yet."""
        target.ahead[copy] = self.count_of(offset)
        self.finish(offset)
        self.moved[offset] = (target, copy)

    def discard(self, copy: int) -> None:
        """Mark a copy as finished that fetching has not reached yet: nobody needs it."""
        self.ahead[copy] = None
        self.unconfirmed.add(copy)

    def count_of(self, offset: int) -> int:
        """Return how often a record in flight was delivered."""
        return self.open.get(offset) or self.ahead.get(offset) or 1

    def _reach(self, end: int) -> int:
        """Count the copies before `end` as delivered here. Return their number."""
        reached = sorted(offset for offset in self.ahead if offset < end)
        for offset in reached:
            if (count := self.ahead.pop(offset)) is not None:
                self.open[offset] = count
        return len(reached)

    def take_back(self, offset: int) -> None:
        """Note that the last record that `deliver` allowed was not delivered after all."""
        self.open[offset] -= 1
        self.returning.appendleft(offset)

    def drop(self, end: int) -> int:
        """Count the records before `end` that wait for delivery as finished. Return their number.

        The caller then fetches from `next_fetch`.
        """
        dropped = [offset for offset in self.returning if offset < end]
        for offset in dropped:
            del self.open[offset]
        self.returning = deque(offset for offset in self.returning if offset >= end)
        undelivered = max(0, end - self.position)
        self.position += undelivered
        return len(dropped) + undelivered - self._reach(end)

    def holds(self, offset: int) -> bool:
        """Return whether a delivered record is still to be settled here."""
        return not self.lost and (offset in self.open or self.ahead.get(offset) is not None)

    def finish(self, offset: int) -> bool:
        """Mark a record as finished; the next commit tells the group. False: it already was."""
        if self.open.pop(offset, None) is None:
            if self.ahead.get(offset) is None:
                return False
            self.ahead[offset] = None
        self.unconfirmed.add(offset)
        return True

    def settled(self, offset: int) -> bool:
        """Return whether a delivered record is finished and the group knows it."""
        unfinished = offset in self.open or self.ahead.get(offset) is not None
        return not unfinished and offset not in self.unconfirmed

    def metadata(self, owner: str) -> str:
        """Return the metadata for a commit at `watermark`. See `commit`."""
        return self.commit(owner)[1]

    def commit(self, owner: str, done: Set[int] = frozenset()) -> tuple[int, str]:
        """Return the offset and the metadata of a commit.

        The offset is the watermark. The metadata has the owner, and what is finished above it. The
        offsets in `done` count as finished, although `finish` was not called for them yet. An
        offset with the count 0 is a finished copy after `position`. Copies in flight there are left
        out, so a successor delivers them.
        """
        start = next((offset for offset in self.open if offset not in done), self.position)
        previous = start
        data = bytearray()
        position = self.position
        room = (METADATA_LIMIT - len(owner) - 16) * 4 // 5
        copies = sorted(at for at, count in self.ahead.items() if count is None or at in done)
        for offset, count in [*self.open.items(), *((copy, 0) for copy in copies)]:
            if count and offset in done:
                continue
            piece = _varint(offset - previous) + _varint(count)
            if len(data) + len(piece) > room:
                position = min(position, offset)  # after a crash, the rest runs again
                break
            data += piece
            previous = offset
        return start, f"{_VERSION} {owner} {position - start} {b85encode(bytes(data)).decode()}"


def owner_of(metadata: str) -> str:
    """Return the owner who made a commit; empty if it does not say."""
    fields = metadata.split(" ")
    return fields[1] if fields[0] == _VERSION and len(fields) == 4 else ""


def restored(watermark: int, metadata: str) -> Partition:
    """Return the hold that continues from a commit."""
    if not owner_of(metadata):
        return Partition(watermark)
    _, _, ahead, encoded = metadata.split(" ")
    numbers = _varints(b85decode(encoded))
    counts: dict[int, int] = {}
    offset = watermark
    for delta, count in zip(numbers, numbers, strict=True):
        offset += delta
        counts[offset] = count
    partition = Partition(watermark + int(ahead), {at: n for at, n in counts.items() if n})
    partition.ahead.update(dict.fromkeys(at for at, n in counts.items() if not n))
    return partition


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _varints(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0

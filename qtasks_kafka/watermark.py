"""Which records of one partition are done, though they end out of order.

Kafka commits one offset a partition. What is done above it travels beside it in the commit's
metadata: the position behind the newest delivered record, and the open ones in front of that
with the number of times each was delivered. A successor delivers those again and no others.
"""

from __future__ import annotations

from base64 import b85decode, b85encode
from collections import deque
from collections.abc import Iterator

METADATA_LIMIT = 4000
"""Characters; a server takes 4096 (offset.metadata.max.bytes)."""
_VERSION = "1"


class Partition:
    """One receiver's hold on a partition, from the takeover until it is lost."""

    def __init__(self, position: int, open_: dict[int, int] | None = None) -> None:
        self.position = position
        """The offset behind the newest record that was delivered."""
        self.open = dict(open_ or {})
        """Offsets that are not done, ascending, and how often each was delivered."""
        self.returning = deque(self.open)
        """Those of them that wait to be fetched (again)."""
        self.expected = self.next_fetch
        """The offset of the next record, as far as fetching has come."""
        self._looked_at: int | None = None
        """The offset from which it was fetched again, since what is there had not come."""
        self.unconfirmed: set[int] = set()
        """Done, but the group has not taken a commit that says so."""
        self.lost = False
        self.announced = False
        """The group knows of the first that was delivered here. From then on commits come with the
        ends of tasks; a message that kills its receiver at once would never be counted."""

    @property
    def watermark(self) -> int:
        """The offset below which everything is done."""
        return next(iter(self.open), self.position)

    @property
    def next_fetch(self) -> int:
        """The offset from which to fetch what is to be delivered next."""
        return self.returning[0] if self.returning else self.position

    @property
    def in_flight(self) -> int:
        """How many records are delivered and not settled."""
        return 0 if self.lost else len(self.open) - len(self.returning)

    def begin(self, first: int) -> None:
        """Take note of the first offset of the log: what is in front of it cannot be fetched."""
        while self.returning and self.returning[0] < first:
            del self.open[self.returning.popleft()]
        self.position = max(self.position, first)

    def fetch_from(self, offset: int, *, again: bool = False) -> None:
        """Take note that fetching goes on here; `again`, to see what is in a gap."""
        self.expected = offset
        self._looked_at = offset if again else None

    def skips(self, offset: int) -> bool:
        """Say whether offsets in front of a fetched record must be fetched once more.

        A log may have gaps. But a record that was taken from the driver and lost on its way here
        leaves one too, and what is delivered behind it would count it as done.
        """
        return offset > self.expected and self._looked_at != self.expected

    def deliver(self, offset: int) -> int | None:
        """Take note that a fetched record is delivered; return how often, as far as known.

        None: it must not be delivered, since it is done or in flight. Raises `ValueError` when
        that would pass offsets that may hold a record.
        """
        if self.skips(offset):
            raise ValueError(f"offset {offset} comes, and {self.expected} has not")
        self.expected = max(self.expected, offset + 1)
        while self.returning and self.returning[0] < offset:
            # Fetching went past it, so it is not in the log any more.
            del self.open[self.returning.popleft()]
        if self.returning and self.returning[0] == offset:
            self.returning.popleft()
            self.open[offset] += 1
            return self.open[offset]
        if offset < self.position:
            return None
        self.position = offset + 1
        self.open[offset] = 1
        return 1

    def take_back(self, offset: int) -> None:
        """Take note that what `deliver` allowed last has not been delivered after all."""
        self.open[offset] -= 1
        self.returning.appendleft(offset)

    def holds(self, offset: int) -> bool:
        """Say whether a delivered record is still to be settled here."""
        return not self.lost and offset in self.open

    def finish(self, offset: int) -> bool:
        """Mark a record done, unless it is; the group hears of it with the next commit."""
        if self.open.pop(offset, None) is None:
            return False
        self.unconfirmed.add(offset)
        return True

    def settled(self, offset: int) -> bool:
        """Say whether a delivered record is done and the group knows it."""
        return offset not in self.open and offset not in self.unconfirmed

    def metadata(self, owner: str) -> str:
        """Return what a commit of `watermark` carries: who commits and what is done above it."""
        start = previous = self.watermark
        data = bytearray()
        position = self.position
        room = (METADATA_LIMIT - len(owner) - 16) * 4 // 5
        for offset, count in self.open.items():
            piece = _varint(offset - previous) + _varint(count)
            if len(data) + len(piece) > room:
                position = offset  # After a crash the rest runs again.
                break
            data += piece
            previous = offset
        return f"{_VERSION} {owner} {position - start} {b85encode(bytes(data)).decode()}"


def owner_of(metadata: str) -> str:
    """Return who made a commit; empty when it does not say."""
    fields = metadata.split(" ")
    return fields[1] if fields[0] == _VERSION and len(fields) == 4 else ""


def restored(watermark: int, metadata: str) -> Partition:
    """Return the hold that goes on where a commit ended."""
    if not owner_of(metadata):
        return Partition(watermark)
    _, _, ahead, encoded = metadata.split(" ")
    numbers = _varints(b85decode(encoded))
    open_: dict[int, int] = {}
    offset = watermark
    for delta, count in zip(numbers, numbers, strict=True):
        offset += delta
        open_[offset] = count
    return Partition(watermark + int(ahead), open_)


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

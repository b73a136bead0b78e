"""The other data that processes share, values and claims: what to propose, given a reader's view.

A value or claim changes by compare-and-set: a proposal names the entry that it follows. If two
follow the same one, the first in the log wins, for every reader.
"""

from __future__ import annotations

import asyncio
import time
from asyncio import Future
from collections import defaultdict

from msgspec import UNSET, UnsetType

from qtasks_core import Claim
from qtasks_log.entries import Claiming, Content, Setting
from qtasks_log.reader import Reader
from qtasks_log.view import View

Values = View[Setting]
Claims = View[Claiming]


def getting(values: Values, key: str) -> bytes | None:
    """Return a value."""
    current = values.get(key)
    return None if current is None else current.content.value


def setting(
    values: Values, key: str, value: bytes | None, expect: bytes | UnsetType | None
) -> Setting | bool:
    """Return the proposal that sets a value, or the answer if there is nothing to propose."""
    current = values.get(key)
    there = None if current is None else current.content.value
    if expect is not UNSET and there != expect:
        return False
    if there == value:
        return True
    return Setting(value, current.key if current is not None else "")


def claiming(claims: Claims, key: str, owner: str, ttl: float) -> Claiming | None:
    """Return the proposal that claims a key, or None while another owner holds it."""
    current = claims.get(key)
    if current is None:
        return Claiming(owner, ttl, "")
    over = current.over_at is not None and current.over_at <= time.monotonic()
    if current.content.owner not in (None, owner) and not over:
        return None
    return Claiming(owner, ttl, current.key)


def releasing(claims: Claims, claim: Claim) -> Claiming | None:
    """Return the proposal that releases a key, or None if its owner does not hold it."""
    current = claims.get(claim.key)
    if current is None or current.content.owner != claim.owner:
        return None
    return Claiming(None, 0.0, current.key)


def over_since(content: Content, since: float) -> float | None:
    """Return when an entry is over that this process has read at `since`, a monotonic time.

    The time of a claim starts when a reader reads it, which is after its owner has sent it. So no
    reader takes it for over too early, and the clocks of machines need not agree.
    """
    if isinstance(content, Claiming):
        return since + content.ttl
    return since if isinstance(content, Setting) and content.value is None else None


class Watchers:
    """The iterators that wait for the change of a value."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._bells: defaultdict[str, set[Future[None]]] = defaultdict(set)
        self.rings = 0
        """How many changes there were, of any key."""

    def ring(self, key: str) -> None:
        """Wake all that wait for this key."""
        self.rings += 1
        for bell in self._bells.pop(key, ()):
            if not bell.done():
                bell.set_result(None)

    async def wait(self, key: str) -> None:
        """Wait for the next change. Raises `Unavailable` if reading fails, `Closed` at the stop."""
        bell: Future[None] = asyncio.get_running_loop().create_future()
        self._bells[key].add(bell)
        try:
            await self._reader.wait(bell, idle=True)
        finally:
            self._bells[key].discard(bell)
            if not self._bells[key]:
                del self._bells[key]

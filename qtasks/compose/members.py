"""The members of a composed broker, and calls to several of them at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import starmap
from math import inf
from time import monotonic
from typing import Any, TypeVar

from qtasks.client.retrying import Outage
from qtasks_core import Broker
from qtasks_core.errors import NotSupported, Unavailable

Item = TypeVar("Item")
T = TypeVar("T")

OUT_AFTER = 5.0
"""Seconds after which a failing member no longer holds up the calls of the others.

Before that, the engine repeats the whole call. So most callers do not notice a short outage.
"""


SAME_OUTAGE = 20.0
"""Most seconds between two failures of one outage. A call of a frozen server takes long to fail."""


class Member:
    """One of the brokers, and whether it answers."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.outage = Outage("a composed broker")
        self._failing_since = inf
        self._failed_at = -inf

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note whether the call in the block is answered."""
        try:
            yield
        except Unavailable:
            now = monotonic()
            if now - self._failed_at > SAME_OUTAGE:
                self._failing_since = now
            self._failing_since = min(self._failing_since, now)
            self._failed_at = now
            raise
        self._failing_since = inf
        self.outage.over()

    @property
    def is_out(self) -> bool:
        """Whether it has failed for a while."""
        now = monotonic()
        return now - self._failing_since > OUT_AFTER and now - self._failed_at <= SAME_OUTAGE

    async def answers(self) -> bool:
        """Ask a small question, and return whether there is an answer."""
        with suppress(Unavailable, NotSupported):
            await self.broker.depth("default")
            return True
        return False


async def at_each(
    members: Sequence[Member],
    items: Sequence[tuple[Member, Item]],
    call: Callable[[Member, list[Item]], Coroutine[Any, Any, list[T]]],
    instead: Callable[[Member, Item, Unavailable], T],
) -> list[T]:
    """Call each member for its items, all at the same time. Return the answers in order.

    If a member fails, its error is raised when all have answered. If it `is_out` and another one
    answers, its items get the answers of `instead`: the engine must not repeat the call until that
    member is back, because the other members' items would have no answer until then.
    """
    places: dict[Member, list[int]] = {}
    for at, (member, _) in enumerate(items):
        places.setdefault(member, []).append(at)

    async def ask(member: Member, some: list[Item]) -> list[T]:
        with member.watched():
            return await call(member, some)

    asked = {member: [items[at][1] for at in some] for member, some in places.items()}
    out = {member for member in asked if member.is_out}
    others = [member for member in members if not member.is_out] if out else []
    answers, others_answer = await asyncio.gather(
        asyncio.gather(*starmap(ask, asked.items()), return_exceptions=True),
        asyncio.gather(*(member.answers() for member in others), return_exceptions=True),
    )
    found: dict[int, T] = {}
    for (member, some), answer in zip(asked.items(), answers, strict=True):
        if isinstance(answer, Unavailable) and member in out and True in others_answer:
            member.outage.failed(answer)
            answer = [instead(member, item, answer) for item in some]
        if isinstance(answer, BaseException):
            raise answer
        found.update(zip(places[member], answer, strict=True))
    return [found[at] for at in range(len(items))]

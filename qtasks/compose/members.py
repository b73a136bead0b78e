"""The members of a composed broker, and calls to several of them at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from time import monotonic
from typing import Any, TypeVar

from qtasks.client.retrying import Outage
from qtasks_core import Broker
from qtasks_core.errors import Unavailable

Item = TypeVar("Item")
T = TypeVar("T")

OUT_AFTER = 5.0
"""Seconds after which a failing member no longer holds up the calls of the others.

Before that, the engine repeats the whole call. So most callers do not notice a short outage.
"""


class Member:
    """One of the brokers, and whether it answers."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.outage = Outage("a composed broker")
        self._failing_since = inf

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note whether the call in the block is answered."""
        try:
            yield
        except Unavailable:
            self._failing_since = min(self._failing_since, monotonic())
            raise
        self._failing_since = inf
        self.outage.over()

    def is_out(self, members: Sequence[Member]) -> bool:
        """Return whether it has failed for a while, and not all the others fail too."""
        others_answer = any(each._failing_since == inf for each in members)
        return others_answer and monotonic() - self._failing_since > OUT_AFTER


async def at_each(
    members: Sequence[Member],
    items: Sequence[tuple[Member, Item]],
    call: Callable[[Member, list[Item]], Coroutine[Any, Any, list[T]]],
    instead: Callable[[Member, Item, Unavailable], T],
) -> list[T]:
    """Call each member for its items, all at the same time. Return the answers in order.

    If a member fails, its error is raised when all have answered. If it `is_out`, its items get the
    answers of `instead`: the engine must not repeat the call until that member is back, because
    the other members' items would have no answer until then.
    """
    places: dict[Member, list[int]] = {}
    for at, (member, _) in enumerate(items):
        places.setdefault(member, []).append(at)

    async def ask(member: Member, some: list[Item]) -> list[T]:
        with member.watched():
            return await call(member, some)

    asked = {member: [items[at][1] for at in some] for member, some in places.items()}
    answers = await asyncio.gather(
        *(ask(member, some) for member, some in asked.items()), return_exceptions=True
    )
    found: dict[int, T] = {}
    for (member, some), answer in zip(asked.items(), answers, strict=True):
        if isinstance(answer, Unavailable) and member.is_out(members):
            member.outage.failed(answer)
            answer = [instead(member, item, answer) for item in some]
        if isinstance(answer, BaseException):
            raise answer
        found.update(zip(places[member], answer, strict=True))
    return [found[at] for at in range(len(items))]

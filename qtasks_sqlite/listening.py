"""Following the writes of other processes: commands, and changes of shared values."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from qtasks_core.errors import Closed
from qtasks_sqlite.connection import Database, Transaction
from qtasks_sqlite.doorbell import Bell

T = TypeVar("T")


def channel(name: str) -> str:
    """Return the name of the queue that stands for a channel: the doorbell knows only queues.

    No real queue has this name: it starts with a byte that users cannot write.
    """
    return f"\0{name}"


class Listeners:
    """The bells of the iterators of a broker or storage, so that `stop` finishes them all."""

    def __init__(self) -> None:
        self._bells: set[Bell] = set()

    async def follow(
        self,
        database: Database,
        number: Callable[[Transaction], int],
        look: Callable[[Transaction], Sequence[T]],
    ) -> AsyncIterator[T]:
        """Yield the new items that `look` finds, now and whenever the channel is rung.

        `number` returns the number of the channel. Each look has the steps of a listener that is
        about to sleep: see `doorbell`.
        """
        bell = Bell(database.doorbell)
        self._bells.add(bell)
        try:
            channel = await database.write(number)
            while bell in self._bells:
                bell.sleep_for([channel])
                found = await database.write(look)
                if found:
                    bell.awake()
                    for item in found:
                        yield item
                else:
                    await bell.wait()
                    bell.awake()
        finally:
            self._bells.discard(bell)
            bell.close()
        raise Closed("the part that was listened to is stopped")

    def stop(self) -> None:
        """Finish all iterators."""
        bells = list(self._bells)
        self._bells.clear()
        for bell in bells:
            bell.wake()

"""The contract of an Inbox: how a client receives results without polling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from qtasks_core.schemas import Task


class Inbox(ABC):
    """Receives final records for one client: those sent to its address, and those it watches.

    It knows the uuids that it waits for, so that it can read them again after a reconnect. A record
    that it waits for arrives at least once. Other records may arrive or not.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """The value for `TaskMessage.reply_to`. It is the same after every reconnect.

        1 to 200 characters of any script. The storage chooses it to fit its server.
        """

    @abstractmethod
    def expect(self, uuids: Iterable[str]) -> None:
        """Wait for tasks whose `reply_to` is this address. No I/O; call it before they are sent."""

    @abstractmethod
    async def watch(self, uuids: Sequence[str]) -> None:
        """Wait for tasks of other clients too: subscribe, make sure that it worked, then read once.

        A task that is already final arrives at once. Raises `Unavailable`. Even then the inbox
        waits for these tasks, from the next reconnect on.
        """

    @abstractmethod
    def forget(self, uuids: Iterable[str]) -> None:
        """Stop waiting for tasks. The arrival of a final record does the same for its uuid."""

    @abstractmethod
    async def receive(self) -> list[Task]:
        """Wait for at least one final record. One call at a time; cancelling it loses nothing.

        Raises `Unavailable`. The next call reconnects, and reads again all records that it waits
        for.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give up the address. A waiting `receive` raises `Closed`. Idempotent."""

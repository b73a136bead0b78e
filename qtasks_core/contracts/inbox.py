"""The contract of an Inbox: how a client hears of results without polling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from qtasks_core.schemas import Task


class Inbox(ABC):
    """One a client. Final records arrive here: those sent to its address, and those watched.

    It knows which uuids it waits for, so that it can read them again after a reconnect. A record
    that is waited for arrives at least once; others may arrive or not.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """What goes into `TaskMessage.reply_to`. The same after every reconnect.

        1 to 200 characters of any script; the storage chooses it, to fit its server.
        """

    @abstractmethod
    def expect(self, uuids: Iterable[str]) -> None:
        """Wait for tasks whose `reply_to` is this address. No I/O; call it before they are sent."""

    @abstractmethod
    async def watch(self, uuids: Sequence[str]) -> None:
        """Wait for tasks of others as well: subscribe, be sure of it, then read once.

        A task that is final already arrives at once. Raises `Unavailable`; it waits for them
        all the same, from the next reconnect on.
        """

    @abstractmethod
    def forget(self, uuids: Iterable[str]) -> None:
        """Stop waiting. Uuids whose final record has arrived are forgotten by themselves."""

    @abstractmethod
    async def receive(self) -> list[Task]:
        """Wait for at least one final record. One call at a time; cancelling it loses nothing.

        Raises `Unavailable`; the next call reconnects and reads again what is waited for.
        """

    @abstractmethod
    async def close(self) -> None:
        """Give up the address; a `receive` that waits raises `Closed`. Idempotent."""

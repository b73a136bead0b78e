"""The contract of a Composition: how the engine uses a broker and a storage as a pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from qtasks_core.contracts.subscription import Subscription
from qtasks_core.schemas import Completion, Delivery, Outcome, Task, TaskMessage, Verdict


class Composition(ABC):
    """Does the three steps in which a broker and a storage must agree."""

    @abstractmethod
    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        """Publish messages and record them as `new` (or `scheduled`). Return an outcome for each.

        Several clients may submit messages with a `submission` under one uuid. Only the messages of
        one of these submissions run. All others get the outcome `taken`, with the record that has
        the key. After an error, the caller submits the messages again under a new submission.
        Otherwise two copies of a message could run side by side.

        With `transaction`, messages and records become durable and visible when the caller's
        transaction commits, and receivers are woken then. The call runs on the transaction's
        connection, so on the loop of that connection, and awaits nothing else. A pair that cannot
        do this raises `NotSupported` before anything is written.
        """

    @abstractmethod
    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        """Say which deliveries still have to run, with the record that decided each of them.

        The record may be None if it is the first one of the message (`new`, `scheduled`): then it
        says no more than the message does. A verdict may rely on a record that was read when the
        delivery was received, for at most a second.
        """

    @abstractmethod
    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        """Record the results of runs and settle their deliveries. Return an outcome for each.

        If a completion has a record, the outcome is that of saving it. Otherwise it is that of the
        settlement. A crash at any point leaves either a final record or a delivery that runs again.
        With a final record, `admit` stops a redelivery.
        """

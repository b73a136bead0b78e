"""The contract of a Composition: how the engine uses a broker and a storage as a pair."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from qtasks_core.contracts.subscription import Subscription
from qtasks_core.schemas import Completion, Delivery, Outcome, Task, TaskMessage, Verdict


class Composition(ABC):
    """The three moments in which a broker and a storage must agree."""

    @abstractmethod
    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        """Publish messages and record them as `new` (or `scheduled`); an outcome for each.

        Of messages with a `submission` and one uuid, whoever submits them, only those of one
        submission are run. `taken` is the answer to all others, with the record that has the key.
        After an error they are submitted again under a new submission, or two copies of one could
        run side by side.
        """

    @abstractmethod
    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        """Say which deliveries still have to run, with the record that decided it."""

    @abstractmethod
    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        """Record the ends of runs and settle their deliveries; an outcome for each.

        The outcome is that of the record where there is one, else that of the settlement. A crash
        at any point leaves either a final record, at which `admit` stops a redelivery, or a
        delivery that runs again.
        """

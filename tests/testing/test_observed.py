"""What the ledger notes where the memory broker cannot show it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qtasks.testing.observed import Ledger, ObservedComposition
from qtasks_core import (
    DONE,
    Completion,
    Composition,
    Delivery,
    Outcome,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.errors import Unavailable
from qtasks_core.records import record_of
from qtasks_memory import MemoryStorage

FIRST = TaskMessage(uuid="1", task_name="a")
SECOND = TaskMessage(uuid="2", task_name="b")


class Submitting(Composition):
    """Answers submissions with the given outcomes, or raises."""

    def __init__(self, *outcomes: Outcome) -> None:
        self._outcomes = list(outcomes)

    async def submit(
        self, messages: Sequence[TaskMessage], transaction: object | None = None
    ) -> list[Outcome]:
        if not self._outcomes:
            raise Unavailable("nothing answers")
        return self._outcomes

    async def admit(self, deliveries: Sequence[Delivery]) -> list[tuple[Verdict, Task | None]]:
        raise AssertionError("nothing is received here")

    async def complete(
        self, subscription: Subscription, completions: Sequence[Completion]
    ) -> list[Outcome]:
        raise AssertionError("nothing is received here")


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(lambda: 0.0)


async def test_what_is_refused_was_not_enqueued(ledger: Ledger) -> None:
    composition = ObservedComposition(Submitting(Outcome("refused", "full"), DONE), ledger)
    await composition.submit([FIRST, SECOND])
    assert ledger.enqueued == [SECOND]
    assert ledger.due() == [SECOND]


async def test_what_raises_was_not_enqueued(ledger: Ledger) -> None:
    with pytest.raises(Unavailable):
        await ObservedComposition(Submitting(), ledger).submit([FIRST])
    assert ledger.enqueued == []
    assert ledger.due() == []


async def test_a_key_that_is_taken_leaves_the_first_task_due(ledger: Ledger) -> None:
    await ObservedComposition(Submitting(DONE), ledger).submit([FIRST])
    again = TaskMessage(uuid="1", task_name="a", submission="other")
    await ObservedComposition(Submitting(Outcome("taken")), ledger).submit([again])
    assert ledger.enqueued == [FIRST]
    assert ledger.due() == [FIRST]


async def test_a_transaction_counts_once_it_is_committed(ledger: Ledger) -> None:
    """A record that is visible tells so; one that was rolled back never is."""
    storage = MemoryStorage("observed")
    await storage.start("observed")
    composition = ObservedComposition(Submitting(DONE, DONE), ledger)
    await composition.submit([FIRST, SECOND], transaction=object())
    await ledger.look_at_transactions(storage)
    assert (ledger.enqueued, ledger.due()) == ([], [])
    await storage.save([record_of(SECOND)])
    await ledger.look_at_transactions(storage)
    await ledger.look_at_transactions(storage)
    assert (ledger.enqueued, ledger.due()) == ([SECOND], [SECOND])
    await storage.stop()

"""Converts messages to columns of their table."""

from __future__ import annotations

from collections.abc import Sequence

from qtasks_core import TaskMessage
from qtasks_postgres.connection import storable
from qtasks_postgres.floors import PRIORITIES

LONGEST_DELAY = 100 * 365 * 86400.0
"""Seconds. A longer delay may exceed the range of a timestamp."""


def columns_of(
    batch: Sequence[tuple[TaskMessage, bytes]],
) -> tuple[list[str], list[int], list[float], list[bytes]]:
    """Return queue, priority, delay and body of messages, column by column."""
    return (
        [storable(message.queue) for message, _ in batch],
        [min(max(message.priority, 0), PRIORITIES - 1) for message, _ in batch],
        [min(message.delay, LONGEST_DELAY) for message, _ in batch],
        [body for _, body in batch],
    )

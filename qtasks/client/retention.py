"""How long records are kept.

A final record is also what stops its message, should that be delivered again. So some are kept
longer than was asked for.
"""

from __future__ import annotations

import time

from qtasks_core import Task

LEASES = 2.0
"""A message whose end was not settled comes back within one lease, and soon finds a worker."""
_CANCELLED = 86_400.0
"""Seconds from when it is due that a cancelled task's message may have to wait in its queue."""


def kept_for(asked: float | None, default: float | None, least: float) -> float | None:
    """Return the retention to record, in seconds: what was asked for, `least` where that is less.

    `default` is the storage's, which counts where nothing was asked for.
    """
    keep = default if asked is None else asked
    return asked if keep is None or keep >= least else least


def cancelled_kept_for(record: Task, default: float | None) -> float | None:
    """Return the retention of a task that is cancelled now: its message is still in the queue."""
    wait = max(0.0, record.due_at - time.time()) if record.due_at is not None else 0.0
    return kept_for(record.retention, default, wait + _CANCELLED)

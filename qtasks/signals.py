"""What a task's function raises to decide its own end."""

from __future__ import annotations

import math


class Retry(Exception):
    """Run this task again, after `after` seconds (None: the backoff of the task's retries).

    Raises `ValueError` for a number that is negative or not finite.
    """

    def __init__(self, after: float | None = None) -> None:
        if after is not None and not (math.isfinite(after) and after >= 0):
            raise ValueError(f"Retry(after={after}): it takes seconds, 0 or more")
        super().__init__(after)
        self.after = after


class Reject(Exception):
    """End this task in `error` at once, without a further try."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

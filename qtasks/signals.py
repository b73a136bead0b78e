"""What a task's function raises to decide its own end."""

from __future__ import annotations


class Retry(Exception):
    """Run this task again, after `after` seconds (None: the task's usual backoff)."""

    def __init__(self, after: float | None = None) -> None:
        super().__init__(after)
        self.after = after


class Reject(Exception):
    """End this task in `error` at once, without a further try."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

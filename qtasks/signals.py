"""Exceptions that a task's function raises to decide what happens next."""

from __future__ import annotations

import math


class Retry(Exception):
    """Raise it to run this task again, `after` so many seconds.

        raise Retry(after=60)

    None: after the backoff of the task's retries. The constructor raises `ValueError` for a number
    that is negative or not finite.
    """

    def __init__(self, after: float | None = None) -> None:
        if after is not None and not (math.isfinite(after) and after >= 0):
            raise ValueError(
                f"Retry(after={after}): `after` must be a number of seconds, 0 or more"
            )
        super().__init__(after)
        self.after = after


class Reject(Exception):
    """Raise it to finish this task with status `error` at once, without another attempt.

    raise Reject("the address does not exist")
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

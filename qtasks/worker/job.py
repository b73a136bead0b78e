"""One run of one task in a worker, from its delivery to its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal

from msgspec.structs import replace

from qtasks_core import (
    Ack,
    Completion,
    Delivery,
    Release,
    Retry,
    Status,
    Task,
    TaskMessage,
)
from qtasks_core.schemas import LONGEST
from qtasks_core.separate import record_of


class Job:
    """What a worker holds: a delivery, the message in it, and what became of the run."""

    __slots__ = (
        "again", "also", "begun", "cancelled", "delivery", "execution", "lone_runs", "lost",
        "message", "noted", "record", "returned", "settling", "started",
    )  # fmt: skip

    def __init__(self, delivery: Delivery, message: TaskMessage, execution: str) -> None:
        self.delivery = delivery
        self.message = message
        self.also: tuple[Delivery, ...] = ()
        """Deliveries of the same message beside it. One may have come because the lease of another
        was lost, as with a connection, or the message was published twice."""
        self.execution = execution
        self.started = time.time()
        self.begun = False
        """It was handed to the runner."""
        self.returned = False
        """Its function has come to an end."""
        self.settling = False
        """Its end is on its way to the server, whose answer says whether it still had the lease."""
        self.noted = False
        """`process` was recorded."""
        self.lost = False
        """The lease is gone: another worker may run it."""
        self.cancelled = False
        """The record says `cancel`: there is no end to be recorded any more."""
        self.lone_runs = 0
        """How often the message has begun to run alone as a suspect, this run included."""
        self.record: Task | None = None
        """How the run ended; None for a run that was given back."""
        self.again: TaskMessage | None = None
        """The message of the next attempt."""

    def adopt(self, delivery: Delivery) -> None:
        """Take another delivery of the message: the newest is ours in any case, and is settled.

        The others are kept until then, so that nobody else runs them meanwhile.
        """
        if self.settling:
            self.also += (delivery,)
            return
        self.also += (self.delivery,)
        self.delivery = delivery
        self.lost = False

    def as_record(self, status: Status, **fields: str | bytes | float | None) -> Task:
        """Return the record of this run with the given status and fields."""
        return replace(
            record_of(self.message),
            status=status,
            execution=self.execution,
            worker=self.execution.partition("/")[0],
            started_at=self.started,
            **fields,  # no more of them than needed: each costs time
        )

    def retry(self, delay: float, error: str, traceback: str | None) -> None:
        """End this run with another attempt after `delay` seconds."""
        delay = min(delay, LONGEST)
        self.again = replace(self.message, attempt=self.message.attempt + 1, delay=delay)
        due = time.time() + delay
        self.record = self.as_record("retry", error=error, traceback=traceback, due_at=due)

    def end(
        self, status: Literal["success", "error", "cancel"], **fields: str | bytes | None
    ) -> None:
        """End this run for good."""
        self.record = self.as_record(status, finished_at=time.time(), **fields)

    def completion(self) -> Completion:
        """Return what the composition has to do now that the run is over."""
        if self.cancelled:
            return Completion(None if self.lost else Ack(self.delivery), None)
        if self.record is None:
            return Completion(None if self.lost else Release(self.delivery), None)
        if self.lost:
            # A result may still count; whether it does, the order of records decides.
            return Completion(None, None if self.again else self.record)
        if self.again is not None:
            return Completion(Retry(self.delivery, self.again), self.record)
        return Completion(Ack(self.delivery), self.record)


def count_in(headers: Mapping[str, str], name: str) -> int:
    """Return the count that a header keeps; what other programs wrote there may be none."""
    text = headers.get(name, "")
    return int(text) if text.isdecimal() and len(text) < 10 else 0

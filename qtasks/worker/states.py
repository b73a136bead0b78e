"""The states of a job and of a worker, and the transitions between them, as tables.

`Job` alone changes the state of a job, `Life` alone that of a worker. docs/design.md draws both
tables as diagrams, and a test compares them.
"""

from __future__ import annotations

from enum import Enum
from typing import Generic, NamedTuple, TypeVar

S = TypeVar("S", bound=Enum)


class IllegalTransition(RuntimeError):
    """A job or a worker was told to do what its state does not allow: a bug in the worker."""


class Transition(NamedTuple, Generic[S]):
    """From one of `sources` to `target`."""

    name: str
    sources: tuple[S, ...]
    target: S

    def refused(self, state: S) -> IllegalTransition:
        """Return the error of trying this in another state."""
        kind = type(state).__name__
        return IllegalTransition(f"{self.name}: not allowed in {kind}.{state.name}")


class JobState(Enum):
    """Where a job is on its way through a worker."""

    ADMITTING = "admitting"
    """Received. The storage is asked whether it still has to run."""
    WAITING = "waiting"
    """It is a poison candidate and waits for its isolated run."""
    RUNNING = "running"
    """The runner has it."""
    CANCELLING = "cancelling"
    """The runner has it, but the task was cancelled: the function is being stopped."""
    FINISHED = "finished"
    """It is in the completion buffer: with a result, or without one to be released."""
    DISCARDED = "discarded"
    """It is in the completion buffer and nothing is left to record: its delivery is acknowledged.
    The storage has a final record already, or a later attempt."""
    SETTLING = "settling"
    """Its record and its settlement are on their way to the servers."""
    CLOSED = "closed"
    """The worker does not hold it any more."""


ADMITTING, WAITING, RUNNING, CANCELLING, FINISHED, DISCARDED, SETTLING, CLOSED = JobState
"""Python 3.11 looks a member up in its class by a function call, which the hot path avoids."""


class WorkerState(Enum):
    """Where a worker is in its life."""

    STARTING = "starting"
    """It subscribes to its queues."""
    RECEIVING = "receiving"
    """It receives and runs jobs."""
    STOPPING = "stopping"
    """It receives no more. Running functions have their grace period."""
    DRAINING = "draining"
    """The grace period is over: the last results are recorded, the rest is released."""
    ENDED = "ended"
    """Nothing is left to do."""


SET_ASIDE = Transition("set_aside", (ADMITTING,), WAITING)
START = Transition("start", (ADMITTING, WAITING), RUNNING)
CANCEL = Transition("cancel", (RUNNING,), CANCELLING)
FINISH = Transition("finish", (RUNNING, ADMITTING, WAITING), FINISHED)
DISCARD = Transition("discard", (ADMITTING, WAITING, CANCELLING), DISCARDED)
SETTLE = Transition("settle", (FINISHED, DISCARDED), SETTLING)
CLOSE = Transition("close", (SETTLING,), CLOSED)
JOB_TRANSITIONS = (SET_ASIDE, START, CANCEL, FINISH, DISCARD, SETTLE, CLOSE)

_W = WorkerState
RECEIVE = Transition("receive", (_W.STARTING,), _W.RECEIVING)
STOP = Transition("stop", (_W.STARTING, _W.RECEIVING), _W.STOPPING)
DRAIN = Transition("drain", (_W.STOPPING,), _W.DRAINING)
END = Transition("end", (_W.STOPPING, _W.DRAINING), _W.ENDED)
WORKER_TRANSITIONS = (RECEIVE, STOP, DRAIN, END)

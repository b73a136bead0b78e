"""The life of a worker: which state it is in, and how it failed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from qtasks.worker.states import DRAIN, END, RECEIVE, STOP, Transition, WorkerState

logger = logging.getLogger("qtasks")


class Life:
    """The state of one worker, which only the methods of this class change.

    It belongs to the I/O loop. `Worker` calls the transitions. The worker's other objects wait for
    the events below, and report errors that a retry cannot fix by `fail`. `notify` is called after
    each transition, so that calls that wait for a change of the jobs check the state again.
    """

    def __init__(self, worker_id: str, notify: Callable[[], None]) -> None:
        self.state = WorkerState.STARTING
        self.failure: Exception | None = None
        """The first error that a retry cannot fix."""
        self.stopping = asyncio.Event()
        """Set from STOPPING on."""
        self.draining = asyncio.Event()
        """Set from DRAINING on."""
        self.ended = asyncio.Event()
        """Set in ENDED."""
        self.failed = asyncio.Event()
        """Set with the first failure, and in ENDED."""
        self._worker_id = worker_id
        self._notify = notify

    def receive(self) -> None:
        """The subscription is open."""
        self._change(RECEIVE)

    def stop(self) -> None:
        """Receive no more: the worker was told to stop, or it has failed."""
        self._change(STOP)
        self.stopping.set()
        self._notify()

    def drain(self) -> None:
        """Wait no longer for running functions: none is left, or the grace period is over."""
        self._change(DRAIN)
        self.draining.set()
        self._notify()

    def end(self) -> None:
        """Nothing is left to do."""
        self._change(END)
        self.ended.set()
        self.failed.set()

    def fail(self, error: Exception) -> None:
        """Keep the first error, log it, and receive no more. Running functions may finish."""
        if self.failure is not None:
            return
        self.failure = error
        if not self.stopping.is_set():
            self.stop()
        self.failed.set()
        logger.error("worker %s failed: %s: %s", self._worker_id, type(error).__name__, error)

    def _change(self, transition: Transition[WorkerState]) -> None:
        if self.state not in transition.sources:
            raise transition.refused(self.state)
        self.state = transition.target

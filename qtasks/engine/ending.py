"""How a process comes to its end: the signals that ask for it, and leaving behind what does not."""

from __future__ import annotations

import atexit
import logging
import os
import signal
from threading import Event, Thread

from qtasks.engine.io_thread import end_at_exit

logger = logging.getLogger("qtasks")

PATIENCE = 10.0
"""Seconds from a worker's end until its process ends, whatever still goes on there: more than
servers have that do not answer."""


def stop_signals() -> list[signal.Signals]:
    """Return the signals that mean: come to an end. A hang-up too, unless that is ignored here."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


class Leaving:
    """Ends the process although its main thread is held up, by a task that does not end mostly."""

    def __init__(self) -> None:
        self._left = Event()

    def begin(self, status: int) -> None:
        """Wait, in a thread of its own: nothing that a task does can be in the way of that."""
        Thread(target=self._wait, args=(status,), name="qtasks-leaving", daemon=True).start()

    def done(self) -> None:
        """Let the process live: the main thread has come through."""
        self._left.set()

    def _wait(self, status: int) -> None:
        if not self._left.wait(PATIENCE):
            logger.warning("the process is held up, and ends without what does not end")
            # Else what the main thread waits for would fail, and be told of.
            atexit.unregister(end_at_exit)
            leave(status)


def leave(status: int) -> None:
    """End the process at once, with what has to be done at exit."""
    atexit._run_exitfuncs()
    logging.shutdown()
    os._exit(status)

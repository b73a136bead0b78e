"""How a worker's process comes to its end, whatever holds it up."""

from __future__ import annotations

import atexit
import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from types import CodeType, FrameType

from qtasks.bridge.io_thread import end_at_exit

logger = logging.getLogger("qtasks")

PATIENCE = 10.0
"""Seconds from a worker's end until its process ends, whatever still goes on there: more than
servers have that do not answer. A program that goes on after its worker has them from its own end.
"""
_LOOK = 0.2
"""Seconds between looks at whether the program has come to its end."""
_LAST_WORDS = 2.0
"""Seconds for what has to be done at exit, and for the log: both before the last resort."""
LAST_RESORT = 5.0
"""Seconds beyond `PATIENCE` after which a process ends that no thread of its own can end."""


class Leaving:
    """Ends the process although something holds it up.

    A thread does it, and says so. Where no thread runs any more, since a function keeps the
    interpreter's lock or the interpreter is being torn down, it is a timer of the interpreter's
    own (`faulthandler`), which writes all stacks to standard error.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._main = threading.main_thread()
        self._program = self._outermost()
        self._status = 0
        self._begun = False
        self._came_back = Event()
        self._is_exiting = False

    def begin(self, status: int) -> None:
        """Count from now: the worker is over."""
        if not self._begun:
            self._begun, self._status = True, status
            self._arm()
            with suppress(RuntimeError):  # no more threads can be had: the timer is left
                Thread(target=self._watch, name="qtasks-leaving", daemon=True).start()

    def come_back(self, status: int) -> None:
        """Let the program go on: the main thread has come through. At its end it counts again."""
        self.begin(status)
        self._came_back.set()
        faulthandler.cancel_dump_traceback_later()
        # The last that is registered comes first; what follows may be what does not end.
        atexit.register(self._exit)

    def _watch(self) -> None:
        if self._came_back.wait(PATIENCE):
            while self._goes_on():
                time.sleep(_LOOK)
            self._arm()
            time.sleep(PATIENCE)
        logger.warning(
            "the process is held up, and ends without what does not end%s", self._culprits()
        )
        # Else what the main thread waits for would fail, and be told of.
        atexit.unregister(end_at_exit)
        leave(self._status, at_exit=not self._is_exiting)

    def _goes_on(self) -> bool:
        """Say whether the main thread is still in the program that it was in at the begin."""
        if self._is_exiting:
            return False
        # A prompt may follow the program.
        is_interactive = hasattr(sys, "ps1") or bool(sys.flags.inspect)
        return is_interactive or self._outermost() is self._program

    def _exit(self) -> None:
        if os.getpid() == self._pid:
            self._is_exiting = True
            self._arm()

    def _arm(self) -> None:
        try:
            faulthandler.dump_traceback_later(PATIENCE + LAST_RESORT, exit=True, file=2)
        except (OSError, RuntimeError, ValueError) as error:
            logger.info("no timer for the end of the process: %s", error)

    def _outermost(self) -> CodeType | None:
        frame = self._main_frame()
        while frame is not None and frame.f_back is not None:
            frame = frame.f_back
        return frame.f_code if frame is not None else None

    def _main_frame(self) -> FrameType | None:
        return sys._current_frames().get(self._main.ident or 0)

    def _culprits(self) -> str:
        """Return the threads that are waited for at exit, and where the main thread is."""
        threads = [t.name for t in threading.enumerate() if not t.daemon and t is not self._main]
        named = f" (threads: {', '.join(threads)})" if threads else ""
        frame = self._main_frame()
        return f"{named}\n{''.join(traceback.format_stack(frame))}" if frame is not None else named


def leave(status: int, *, at_exit: bool = True) -> None:
    """End the process at once, with what has to be done at exit if `at_exit`."""
    if at_exit:
        _in_time(atexit._run_exitfuncs)
    _in_time(logging.shutdown)
    os._exit(status)


def _in_time(call: Callable[[], None]) -> None:
    """Make a call that may be what does not end; in the main thread the guard watches over it."""
    if threading.current_thread() is threading.main_thread():
        call()
        return
    thread = Thread(target=call, name="qtasks-exit", daemon=True)
    with suppress(RuntimeError):  # too late for another thread
        thread.start()
        thread.join(_LAST_WORDS)

"""Exiting: a worker's process exits, even if something in it blocks."""

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

from qtasks.bridge.crossing import end_at_exit

logger = logging.getLogger("qtasks")

PATIENCE = 10.0
"""Seconds in which the process has to exit once its worker has ended. Closing the connections takes
less, even if a server does not answer. If the program goes on after its worker, they count from
the end of the program."""
_LOOK = 0.2
"""Seconds between checks whether the program has ended."""
_AT_EXIT_WITHIN = 2.0
"""Seconds for the exit handlers, and as many for the log; less than `LAST_RESORT` together."""
LAST_RESORT = 5.0
"""Seconds after `PATIENCE` in which a thread has to make the process exit; then a timer does."""


class Leaving:
    """Makes the process exit although something blocks it.

    A thread does that and logs it. If Python threads cannot run any more, because a function holds
    the interpreter's lock or the interpreter is being finalized, a timer of the interpreter
    (`faulthandler`) does it, and writes all stacks to standard error.
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
        """The worker has ended: the time counts from now."""
        if not self._begun:
            self._begun, self._status = True, status
            self._arm()
            with suppress(RuntimeError):  # no thread can be started: the timer remains
                Thread(target=self._watch, name="qtasks-leaving", daemon=True).start()

    def come_back(self, status: int) -> None:
        """The main thread has returned from the worker: the time counts again at its exit."""
        self.begin(status)
        self._came_back.set()
        faulthandler.cancel_dump_traceback_later()
        # Exit handlers run in reverse order, and one of those that follow may block.
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
        # Otherwise the calls that the main thread waits for would fail and be logged.
        atexit.unregister(end_at_exit)
        leave(self._status, at_exit=not self._is_exiting)

    def _goes_on(self) -> bool:
        """Return whether the main thread still runs the program that started the worker."""
        if self._is_exiting:
            return False
        # An interactive prompt may follow the program.
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
        """Return the threads that the exit waits for, and the stack of the main thread."""
        threads = [t.name for t in threading.enumerate() if not t.daemon and t is not self._main]
        named = f" (threads: {', '.join(threads)})" if threads else ""
        frame = self._main_frame()
        return f"{named}\n{''.join(traceback.format_stack(frame))}" if frame is not None else named


def leave(status: int, *, at_exit: bool = True) -> None:
    """Exit at once; with `at_exit`, after the exit handlers."""
    if at_exit:
        _in_time(atexit._run_exitfuncs)
    _in_time(logging.shutdown)
    os._exit(status)


def _in_time(call: Callable[[], None]) -> None:
    """Make a call that may block. In the main thread the time above limits it."""
    if threading.current_thread() is threading.main_thread():
        call()
        return
    thread = Thread(target=call, name="qtasks-exit", daemon=True)
    with suppress(RuntimeError):  # the interpreter starts no more threads
        thread.start()
        thread.join(_AT_EXIT_WITHIN)

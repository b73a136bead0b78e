"""The signals that ask a process for its end: handled from its start until it is gone.

What a process forks has the system's own handling again: else `terminate` would do nothing there.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

_Handler = Callable[[int, FrameType | None], None]

_TOGETHER = 3.0
"""Seconds after the end in which another signal means the same as the first."""

_handlers: dict[int, _Handler] = {}
"""What this process has in place of the default."""


class StopSignals:
    """Calls `arrived` with the name of each signal, amid whatever the main thread does."""

    def __init__(self, arrived: Callable[[str], object]) -> None:
        self._arrived = arrived
        self._over: float | None = None

    def listen(self) -> None:
        """Begin, on the loop of the main thread."""
        # Not by the loop's own `add_signal_handler`: when it closes it resets the signals, and
        # the next one would kill the process amid its end.
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        asyncio.get_running_loop().add_reader(self._reader, self._woken_up)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _stop_signals():
            handle(number, self._handle)

    def leave(self) -> None:
        """Take the end for begun; call it on that loop."""
        self._over = time.monotonic()
        signal.set_wakeup_fd(-1)
        asyncio.get_running_loop().remove_reader(self._reader)
        self._reader.close()
        self._writer.close()

    def _woken_up(self) -> None:
        # Another thread may have got the signal: this one runs the handler, once it is awake.
        with suppress(BlockingIOError):
            self._reader.recv(4096)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._over is None:
            self._arrived(signal.Signals(number).name)
        elif time.monotonic() - self._over > _TOGETHER:
            # The program does something else by now.
            _reset(number)
            os.kill(os.getpid(), number)


def handle(number: int, handler: _Handler) -> None:
    """Have this process, and nothing that it forks, handle a signal. In the main thread."""
    _handlers[number] = handler
    signal.signal(number, handler)
    signal.siginterrupt(number, False)


def _stop_signals() -> list[int]:
    """Return the signals that mean: come to an end. A hang-up too, unless that is ignored here."""
    numbers: list[int] = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def _reset(number: int) -> None:
    is_interrupt = number == signal.SIGINT
    signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


def _ignore_at_exit() -> None:
    # What is left of the end is short, and the interpreter resets handlers in it.
    if threading.current_thread() is threading.main_thread():
        for number, handler in _handlers.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, signal.SIG_IGN)


# As early as this, so that it comes after all that takes its time at exit.
atexit.register(_ignore_at_exit)


_blocked = threading.local()


def _block() -> None:
    # One that comes before its default is back would be lost in the child.
    if _handlers:
        _blocked.before = signal.pthread_sigmask(signal.SIG_BLOCK, _handlers)


def _unblock() -> None:
    if (before := _blocked.__dict__.pop("before", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reset_in_child() -> None:
    if _handlers:
        signal.set_wakeup_fd(-1)  # the parent's loop
    for number, handler in _handlers.items():
        if signal.getsignal(number) == handler:
            _reset(number)
    _handlers.clear()
    _unblock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_reset_in_child)

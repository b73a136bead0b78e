"""The signals that ask a process to stop. They are handled from its start until it has exited.

A forked child gets the default handlers again: otherwise `terminate()` would have no effect there.
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
"""Seconds after `leave` in which further signals are ignored: they mean the same stop."""

_handlers: dict[int, _Handler] = {}
"""The handlers that this process uses instead of the defaults."""


class StopSignals:
    """Calls `arrived` with the name of each signal.

    The call is made on the main thread, between any two instructions of its code.
    """

    def __init__(self, arrived: Callable[[str], object]) -> None:
        self._arrived = arrived
        self._over: float | None = None

    def listen(self) -> None:
        """Start to handle the signals. Call it on the loop of the main thread."""
        # Not by `loop.add_signal_handler`: a loop that closes resets the signals, and the next
        # signal would kill the process while it exits.
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        asyncio.get_running_loop().add_reader(self._reader, self._woken_up)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in _stop_signals():
            handle(number, self._handle)

    def leave(self) -> None:
        """Do not call `arrived` any more: the worker has ended. Call it on the same loop."""
        self._over = time.monotonic()
        signal.set_wakeup_fd(-1)
        asyncio.get_running_loop().remove_reader(self._reader)
        self._reader.close()
        self._writer.close()

    def _woken_up(self) -> None:
        # Another thread may have got the signal. This thread runs the handler once it is awake.
        with suppress(BlockingIOError):
            self._reader.recv(4096)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._over is None:
            self._arrived(signal.Signals(number).name)
        elif time.monotonic() - self._over > _TOGETHER:
            # The program goes on after its worker: give the signal its default effect.
            _reset(number)
            os.kill(os.getpid(), number)


def handle(number: int, handler: _Handler) -> None:
    """Handle a signal in this process, but not in its forked children. In the main thread."""
    _handlers[number] = handler
    signal.signal(number, handler)
    signal.siginterrupt(number, False)


def _stop_signals() -> list[int]:
    """Return SIGTERM, SIGINT, and SIGHUP unless the process ignores it."""
    numbers: list[int] = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def _reset(number: int) -> None:
    is_interrupt = number == signal.SIGINT
    signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


def _ignore_at_exit() -> None:
    # The interpreter is about to reset these handlers, and a signal would then kill the
    # process. The rest of the exit is short.
    if threading.current_thread() is threading.main_thread():
        for number, handler in _handlers.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, signal.SIG_IGN)


# Registered at import, so that it runs after exit handlers that may take long.
atexit.register(_ignore_at_exit)


_blocked = threading.local()


def _block() -> None:
    # A signal that arrives before the child has reset the handlers would be lost.
    if _handlers:
        _blocked.before = signal.pthread_sigmask(signal.SIG_BLOCK, _handlers)


def _unblock() -> None:
    if (before := _blocked.__dict__.pop("before", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _reset_in_child() -> None:
    if _handlers:
        signal.set_wakeup_fd(-1)  # it wakes the loop of the parent
    for number, handler in _handlers.items():
        if signal.getsignal(number) == handler:
            _reset(number)
    _handlers.clear()
    _unblock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_block, after_in_parent=_unblock, after_in_child=_reset_in_child)

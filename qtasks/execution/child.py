"""A child process of a worker: it runs functions one after the other until its line is cut."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from queue import SimpleQueue
from types import FrameType

import msgspec

from qtasks.bridge.stop_signals import handle
from qtasks.execution.definition import TaskDefinition
from qtasks.execution.failures import line_of, reason_of, storable, trace_of
from qtasks.execution.frames import (
    LARGEST,
    Answer,
    AskedForRetry,
    NotCallable,
    NotStorable,
    Place,
    Raised,
    Rejected,
    Returned,
    Run,
    Setting,
    receive,
    send,
)
from qtasks.execution.places import definition_at
from qtasks.signals import Reject, Retry
from qtasks_core.errors import BadArguments, UnstorableResult

_LAST_WORDS = 1.0
"""Seconds an end in order may take, beside threads that functions have left behind."""

_here = False

_settings = msgspec.msgpack.Decoder(Setting)
_runs = msgspec.msgpack.Decoder(Run)


def is_child() -> bool:
    """Say whether this process runs functions for a worker, and is not to become one."""
    return _here


def main() -> None:
    """Serve the worker at the other end of the socket that the command names."""
    global _here
    _here = True
    for number in (signal.SIGINT, signal.SIGTERM):
        # Not ignored: that would be inherited by what functions start.
        handle(number, _let_the_worker_decide)
    line = socket.socket(fileno=int(sys.argv[1]))
    # What a function starts must not hold the line open when this process is dead.
    line.set_inheritable(False)
    os.register_at_fork(after_in_child=line.close)
    if (setting := receive(line, _settings)) is not None:
        _adopt(setting)
        Child(line).serve()


def _let_the_worker_decide(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the worker hears of signals, and ends its children."""


def _adopt(setting: Setting) -> None:
    sys.path[:] = setting.path
    if setting.python_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = setting.python_path


class Child:
    """Runs in the main thread, as functions may expect; another thread listens meanwhile."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._runs: SimpleQueue[Run | None] = SimpleQueue()
        self._busy = threading.Event()
        self._tasks: dict[tuple[Place, str], TaskDefinition] = {}

    def serve(self) -> None:
        """Answer until the worker is gone."""
        threading.Thread(target=self._listen, daemon=True, name="qtasks-line").start()
        while (run := self._runs.get()) is not None:
            answer = self._answer(run)
            with suppress(Exception):  # whatever a function has put in their place
                sys.stdout.flush()
                sys.stderr.flush()
            try:
                self._busy.clear()
                send(self._line, answer)
            except OSError:
                return

    def _listen(self) -> None:
        with suppress(MemoryError, OSError):  # no more can be heard: as good as cut
            while (run := receive(self._line, _runs)) is not None:
                self._busy.set()
                self._runs.put(run)
        if not self._busy.is_set():
            self._runs.put(None)
            time.sleep(_LAST_WORDS)
        # The worker is dead, and its task will run elsewhere: not beside what it started here.
        with suppress(ProcessLookupError):  # it has left its group
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    def _answer(self, run: Run) -> Answer:
        try:
            definition = self._definition(run)
            if run.message is None:
                return Returned(b"")
            result = definition.invoke(run.message)
            return _returned(definition, result, run.message.store_result)
        except Retry as retry:
            return AskedForRetry(retry.after)
        except Reject as reject:
            return Rejected(reason_of(reject))
        except BadArguments as error:
            return NotCallable(storable(str(error)))
        except UnstorableResult as error:
            return NotStorable(str(error))
        except BaseException as error:  # noqa: BLE001  # told to the worker
            mro = [Place(str(kind.__module__), kind.__qualname__) for kind in type(error).__mro__]
            return Raised(mro, line_of(error), trace_of(error), _asked(error))

    def _definition(self, run: Run) -> TaskDefinition:
        key = (run.place, run.name)
        if key not in self._tasks:
            module = import_module(run.place.module)
            self._tasks[key] = definition_at(module, run.place, run.name)
        return self._tasks[key]


def _asked(error: BaseException) -> float | None:
    asked = getattr(error, "retry_after", None)
    try:
        return float(asked) if isinstance(asked, int | float) else None
    except OverflowError:
        return None


def _returned(definition: TaskDefinition, result: object, wanted: bool) -> Answer:
    try:
        data = definition.encode_result(result) if wanted else b""
    except Exception as error:  # noqa: BLE001  # what a result's own methods raise
        return NotStorable(line_of(error))
    if len(data) > LARGEST:
        return NotStorable(
            f"it takes {len(data)} bytes, and {LARGEST} are the most that come from a child process"
        )
    return Returned(data)

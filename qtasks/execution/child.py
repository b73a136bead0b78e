"""A child process of a worker: it runs functions one after the other until its socket closes."""

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
    RunRequest,
    Setting,
    receive,
    send,
)
from qtasks.execution.places import definition_at
from qtasks.signals import Reject, Retry
from qtasks_core.errors import BadArguments, UnstorableResult

_EXIT_WITHIN = 1.0
"""Seconds for an orderly exit: threads that functions have started may delay it."""

_here = False

_settings = msgspec.msgpack.Decoder(Setting)
_requests = msgspec.msgpack.Decoder(RunRequest)


def is_child() -> bool:
    """Return whether this process runs functions for a worker, so that it must not start one."""
    return _here


def main() -> None:
    """Run functions for the worker at the other end of the socket in the command line."""
    global _here
    _here = True
    for number in (signal.SIGINT, signal.SIGTERM):
        # SIG_IGN would be inherited by the programs that functions start.
        handle(number, _let_the_worker_decide)
    line = socket.socket(fileno=int(sys.argv[1]))
    # Programs that a function starts must not keep the socket open when this process is dead.
    line.set_inheritable(False)
    os.register_at_fork(after_in_child=line.close)
    if (setting := receive(line, _settings)) is not None:
        _adopt(setting)
        FunctionServer(line).serve()


def _let_the_worker_decide(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the worker handles signals, and stops its children."""


def _adopt(setting: Setting) -> None:
    sys.path[:] = setting.path
    if setting.python_path is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = setting.python_path


class FunctionServer:
    """Runs functions in the main thread, as they may expect; another thread listens meanwhile."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._requests: SimpleQueue[RunRequest | None] = SimpleQueue()
        self._busy = threading.Event()
        self._tasks: dict[tuple[Place, str], TaskDefinition] = {}

    def serve(self) -> None:
        """Answer until the worker is gone."""
        threading.Thread(target=self._listen, daemon=True, name="qtasks-line").start()
        while (request := self._requests.get()) is not None:
            answer = self._answer(request)
            with suppress(Exception):  # a function may have replaced the stream
                sys.stdout.flush()
                sys.stderr.flush()
            try:
                self._busy.clear()
                send(self._line, answer)
            except OSError:
                return

    def _listen(self) -> None:
        with suppress(MemoryError, OSError):  # no more can be read: treat it as closed
            while (request := receive(self._line, _requests)) is not None:
                self._busy.set()
                self._requests.put(request)
        if not self._busy.is_set():
            self._requests.put(None)
            time.sleep(_EXIT_WITHIN)
        # The worker is dead and its task will run elsewhere: stop all that it started here.
        with suppress(ProcessLookupError):  # this process has left its group
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    def _answer(self, request: RunRequest) -> Answer:
        try:
            definition = self._definition(request)
            if request.message is None:
                return Returned(b"")
            result = definition.invoke(request.message)
            return _returned(definition, result, request.message.store_result)
        except Retry as retry:
            return AskedForRetry(retry.after)
        except Reject as reject:
            return Rejected(reason_of(reject))
        except BadArguments as error:
            return NotCallable(storable(str(error)))
        except UnstorableResult as error:
            return NotStorable(str(error))
        except BaseException as error:  # noqa: BLE001  # sent to the worker
            mro = [Place(str(kind.__module__), kind.__qualname__) for kind in type(error).__mro__]
            return Raised(mro, line_of(error), trace_of(error), _asked(error))

    def _definition(self, request: RunRequest) -> TaskDefinition:
        key = (request.place, request.name)
        if key not in self._tasks:
            module = import_module(request.place.module)
            self._tasks[key] = definition_at(module, request.place, request.name)
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

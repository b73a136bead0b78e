"""Plain functions in child processes, which can be killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import msgspec

from qtasks.execution.failures import remote_error
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
from qtasks.execution.limited import limited
from qtasks.execution.places import check, place_of
from qtasks.execution.threads import in_thread
from qtasks.signals import Reject, Retry
from qtasks_core import Encoded, Executor, Runnable, TaskMessage
from qtasks_core.errors import BadArguments, ConfigurationError, UnstorableResult

_EXIT_WITHIN = 1.0
"""Seconds in which idle children have to exit."""
_BESIDE = 2**20
"""Most bytes of an answer without its result. The texts of an error take less."""


class ProcessDied(Exception):
    """The process of a function has died: it was killed, has crashed, or the function exited it."""


class ProcessExecutor(Executor):
    """Runs plain functions in child processes, at most `processes` (the CPUs) at once a worker.

    Children are started when first needed and used again. They import the function by its module
    and its name, so it has to be at the top level of a module. The child of a run that is cancelled
    or takes more than `max_time` is killed, with all processes that it started. If a child dies,
    the task that it ran fails with `ProcessDied`. Raises `ConfigurationError`.
    """

    def __init__(self, processes: int | None = None) -> None:
        if processes is not None and processes < 1:
            raise ConfigurationError(f"processes={processes} is below 1")
        if sys.platform == "win32":
            raise ConfigurationError("ProcessExecutor needs a POSIX system")
        self._most = processes or _cpus()
        self._pools: WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = WeakKeyDictionary()

    def accept(self, task: Runnable) -> None:
        """Refuse coroutine functions, and functions that no other process can import."""
        if task.is_async:
            raise ConfigurationError(
                f"task {task.name}: a coroutine function runs on the loop (LoopExecutor), not in "
                "a process; make it a plain function"
            )
        place_of(task)

    def bind(self, task: Runnable) -> Callable[[TaskMessage], Awaitable[Any]]:
        """Return a coroutine function that awaits the function in a child, once one is free."""
        place = place_of(task)
        check(task, place)
        loop = asyncio.get_running_loop()
        pool = self._pools.setdefault(loop, _Pool(self._most))
        ask = limited(_ask, task.max_time)

        async def run(message: TaskMessage) -> Any:
            async with pool.slots:
                child = pool.take()
                try:
                    answer = await _prepare(child, place, task.name)
                    if answer is None:
                        answer = await ask(child, RunRequest(place, task.name, message))
                except BaseException:
                    child.kill()
                    raise
                pool.idle.append(child)
            return _result(answer)

        return run

    def stop(self) -> None:
        """End the idle children."""
        pool = self._pools.get(asyncio.get_running_loop())
        if pool is not None:
            pool.close()


class _Pool:
    """The child processes of the workers on one loop."""

    def __init__(self, most: int) -> None:
        self.slots = asyncio.Semaphore(most)
        self.idle: list[ChildProcess] = []

    def take(self) -> ChildProcess:
        """Return an idle child, or a new one."""
        while self.idle:
            child = self.idle.pop()
            if child.lives():
                return child
            child.end(0.0)
        return ChildProcess()

    def close(self) -> None:
        """End the idle children: close all sockets, then wait for all."""
        children, self.idle = self.idle, []
        for child in children:
            child.hang_up()
        deadline = time.monotonic() + _EXIT_WITHIN
        for child in children:
            child.end(max(0.0, deadline - time.monotonic()))


async def _prepare(child: ChildProcess, place: Place, name: str) -> Answer | None:
    """Have a child start and import the function; return why it cannot.

    This does not count as time of the run.
    """
    if (place, name) in child.knows:
        return None
    answer = await _ask(child, RunRequest(place, name, None))
    if not isinstance(answer, Returned):
        return answer
    child.knows.add((place, name))
    return None


async def _ask(child: ChildProcess, request: RunRequest) -> Answer:
    return await in_thread(partial(child.ask, request))


def _result(answer: Answer) -> Encoded:
    match answer:
        case Returned(result):
            return Encoded(result)
        case Raised(kinds, line, trace, retry_after):
            names = [(kind.module, kind.qualname) for kind in kinds]
            error = remote_error(names, line, trace)
            error.retry_after = retry_after
            raise error
        case AskedForRetry(after):
            raise Retry(after)
        case Rejected(reason):
            raise Reject(reason)
        case NotCallable(reason):
            raise BadArguments(reason)
        case NotStorable(reason):
            raise UnstorableResult(reason)


class ChildProcess:
    """A child process, as its worker sees it. `ask` and `end` block."""

    def __init__(self) -> None:
        self.knows: set[tuple[Place, str]] = set()
        """The tasks whose functions it has imported."""
        self._lock = threading.Lock()
        self._killed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._line, self._theirs = socket.socketpair()
        _lines.add(self._line)

    def lives(self) -> bool:
        """Return whether the process is alive."""
        return self._process is None or self._process.poll() is None

    def ask(self, request: RunRequest) -> Answer:
        """Send a request and wait for the answer.

        Raises `ProcessDied`, and `OSError` if no process can be started.
        """
        is_new = self._process is None
        if is_new:
            self._start()
        try:
            if is_new:
                send(self._line, Setting(sys.path, os.environ.get("PYTHONPATH")))
            send(self._line, request)
            answer = receive(self._line, _answers, LARGEST + _BESIDE)
        except OSError:
            answer = None
        except msgspec.DecodeError:
            # The function wrote into the socket.
            self.kill()
            self.end(_EXIT_WITHIN)
            raise ProcessDied("its process sent something that is no answer") from None
        if answer is None:
            raise ProcessDied(f"its process died ({_shown_status(self.end(_EXIT_WITHIN))})")
        return answer

    def _start(self) -> None:
        with self._theirs as theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                pass_fds=(theirs.fileno(),),
                process_group=0,  # Ctrl-C is for the worker
            )
        with self._lock:
            self._process = process
            if self._killed:
                _kill(process)

    def kill(self) -> None:
        """Kill it with all processes that it has started. From any thread."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                _kill(self._process)

    def hang_up(self) -> None:
        """Close the socket: it exits in order."""
        self._line.close()

    def end(self, patience: float) -> int:
        """Wait `patience` seconds for its exit, then kill it; return the exit status."""
        self._line.close()
        if self._process is None:
            return 0
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()


def _cpus() -> int:
    """Return how many CPUs this process may use, if the system says that, or how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _shown_status(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    text = (signal.strsignal(-status) or "unknown").lower()
    return f"signal {-status}: {text}{', out of memory?' if status == -signal.SIGKILL else ''}"


_COMMAND = "from qtasks.execution.child import main; main()"
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_lines: WeakSet[socket.socket] = WeakSet()


def _hang_up_in_child() -> None:
    # A socket that a fork keeps open too would stay open when this process dies.
    for line in list(_lines):
        line.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hang_up_in_child)

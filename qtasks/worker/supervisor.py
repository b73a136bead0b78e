"""The supervisor: it starts several worker processes, replaces those that exit, and stops all.

A worker is started with the command of this process and an environment variable that makes it a
worker. So neither fork nor pickle is needed, whatever threads this process has. Each worker has its
own session: Ctrl-C reaches only the supervisor, which passes it on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from typing import Any

from qtasks.bridge.stop_signals import StopSignals
from qtasks.client.retrying import Backoff
from qtasks.worker import leaving
from qtasks.worker.health import answer_probes
from qtasks.worker.supervised import ASK, GIVE_BACK, NOT_READY, OVER, READY, STOPS, VARIABLE
from qtasks_core.errors import ConfigurationError

logger = logging.getLogger("qtasks")

_LONG = 60.0
"""Seconds after which a worker that exits does not count as a failed start."""
_EXIT_WITHIN = 15.0
"""Seconds after the grace period until a worker that does not exit is killed."""
_ANSWER = 1.0
"""Seconds in which a worker has to say whether it is ready."""


class Supervisor:
    """Keeps `count` worker processes alive. `grace` is theirs, in seconds."""

    def __init__(self, count: int, grace: float | None) -> None:
        if count < 1:
            raise ConfigurationError(f"processes={count} is below 1")
        if sys.platform == "win32":
            raise ConfigurationError("processes= needs a POSIX system")
        if len(sys.orig_argv) < 2:
            raise ConfigurationError("processes= runs this program's command again; there is none")
        self._grace = grace
        patience = None if grace is None else grace + _EXIT_WITHIN
        self._slots = [Slot(number + 1, patience) for number in range(count)]
        self._signals: asyncio.Queue[str] = asyncio.Queue()
        self._stopping = asyncio.Event()
        self._failed: int | None = None

    async def run(self, health: tuple[str, int] | None) -> int:
        """Supervise until SIGTERM or SIGINT; return the exit status.

        `health`: where to answer probes. If a worker fails before any worker was ever ready, the
        set-up is wrong, and all are stopped.
        """
        tell = asyncio.get_running_loop().call_soon_threadsafe
        signals = StopSignals(lambda name: tell(self._signals.put_nowait, name))
        signals.listen()
        probe = await answer_probes(*health, self.ready) if health else None
        logger.info("supervisor %d: %d worker processes", os.getpid(), len(self._slots))
        supervising = {asyncio.create_task(self._supervise(slot)) for slot in self._slots}
        try:
            await self._until_told(supervising)
            self._stopping.set()
            await self._stop_all(supervising)
        finally:
            for slot in self._slots:
                slot.signal(signal.SIGKILL)
            if probe is not None:
                probe.close()
            signals.leave()
        for task in supervising:
            task.result()
        return self._failed or 0

    async def ready(self) -> bool:
        """Ask all workers whether they are ready."""
        return all(await asyncio.gather(*(slot.ready() for slot in self._slots)))

    async def _until_told(self, supervising: set[asyncio.Task[None]]) -> None:
        told = asyncio.create_task(self._signals.get())
        await asyncio.wait({told, *supervising}, return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            logger.info("%s: the workers stop", told.result())
        told.cancel()

    async def _stop_all(self, supervising: set[asyncio.Task[None]]) -> None:
        """Stop all workers: first with their grace period, then at once, finally by SIGKILL."""
        everyone: asyncio.Future[Any] = asyncio.gather(*supervising, return_exceptions=True)
        again = asyncio.create_task(self._signals.get())
        patience = None if self._grace is None else self._grace + _EXIT_WITHIN
        for slot in self._slots:
            slot.signal(signal.SIGTERM)
        await asyncio.wait({everyone, again}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        for slot in self._slots:
            slot.release()
        await asyncio.wait({everyone}, timeout=_EXIT_WITHIN)
        again.cancel()
        for slot in self._slots:
            if slot.signal(signal.SIGKILL):
                logger.error("%s did not end and was killed", slot)
        await everyone

    async def _supervise(self, slot: Slot) -> None:
        """Keep one worker process running until the supervisor stops."""
        backoff = Backoff(first=0.2, most=30.0)
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                status = await slot.run(self._stopping)
                how = f"ended ({_words(status)})"
            except OSError as error:
                status, how = 1, f"could not be started ({error})"
            if self._stopping.is_set():
                return
            if status > 0 and not any(other.was_up for other in self._slots):
                logger.error("%s %s before any worker was up", slot, how)
                self._failed = self._failed or status
                return
            if time.monotonic() - started > _LONG:
                backoff.reset()
            pause = backoff.next() if status or time.monotonic() - started < 1.0 else 0.0
            level = logging.ERROR if status else logging.INFO
            logger.log(level, "%s %s; another in %.1f s", slot, how, pause)
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            except TimeoutError:
                continue


class Slot:
    """A numbered place for one worker process at a time; its stop may take `patience` seconds."""

    def __init__(self, number: int, patience: float | None) -> None:
        self.was_up = False
        """Whether a worker in this place was ever ready."""
        self._number = number
        self._patience = patience
        self._exit_limit: asyncio.Timeout | None = None
        """The time by which the process has to exit."""
        self._process: Process | None = None
        self._line: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._answered: asyncio.Future[bool] | None = None

    def __str__(self) -> str:
        pid = self._process.pid if self._process is not None else "-"
        return f"worker process {self._number} (pid {pid})"

    async def run(self, stopping: asyncio.Event) -> int:
        """Start a worker process and return its exit status, as `Popen.returncode` gives it.

        Raises `OSError` when the system starts none.
        """
        self._process = None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *sys.orig_argv[1:],
                    env={**os.environ, VARIABLE: str(theirs.fileno())},
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,  # not process_group, which uvloop does not know
                )
        except BaseException:
            ours.close()
            raise
        if stopping.is_set():
            # The signal was sent before this process existed.
            self.signal(signal.SIGTERM)
        self._line = reader, writer = await asyncio.open_unix_connection(sock=ours)
        listening = asyncio.create_task(self._listen(reader))
        try:
            return await self._exited(self._process)
        finally:
            self._line = None
            self._hear(False)
            listening.cancel()
            writer.close()

    async def _exited(self, process: Process) -> int:
        """Wait for the exit of a process. It is killed if it stays after its worker has ended."""
        try:
            async with asyncio.timeout(None) as self._exit_limit:
                return await process.wait()
        except TimeoutError:
            logger.error("%s is held up at its end, and is killed", self)
            self.signal(signal.SIGKILL)
            return await process.wait()
        finally:
            self._exit_limit = None

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while word := await reader.read(1):
            self.was_up = self.was_up or word == READY
            if word in (READY, NOT_READY):
                self._hear(word == READY)
            elif word == STOPS and self._patience is not None:
                self._exit_within(self._patience)
            elif word == OVER:
                # Before that the process makes itself exit, if it can: see `Leaving`.
                self._exit_within(leaving.PATIENCE + 2 * leaving.LAST_RESORT)

    def _exit_within(self, seconds: float) -> None:
        if self._exit_limit is not None and not self._exit_limit.expired():
            self._exit_limit.reschedule(asyncio.get_running_loop().time() + seconds)

    def _hear(self, ready: bool) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(ready)

    async def ready(self) -> bool:
        """Ask the worker whether it is ready; no answer means no."""
        if self._line is None:
            return False
        if self._answered is None or self._answered.done():
            self._answered = asyncio.get_running_loop().create_future()
            self._line[1].write(ASK)
        try:
            async with asyncio.timeout(_ANSWER):
                return await asyncio.shield(self._answered)
        except TimeoutError:
            return False

    def release(self) -> None:
        """Have the worker release its running tasks, if there is a worker."""
        if self._line is not None:
            self._line[1].write(GIVE_BACK)

    def signal(self, number: signal.Signals) -> bool:
        """Send a signal; say whether there was a process to get it."""
        if self._process is None or self._process.returncode is not None:
            return False
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            return False
        return True


def _words(status: int) -> str:
    if status == 0:
        return "in order"
    return f"exit status {status}" if status > 0 else f"by {signal.Signals(-status).name}"

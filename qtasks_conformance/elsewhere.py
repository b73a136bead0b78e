"""The parent's side of another process that can be told, stopped and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress

import qtasks_core as core
from qtasks_conformance.child import LINE_LIMIT
from qtasks_conformance.commands import (
    Admit,
    Answer,
    Append,
    Broadcast,
    Command,
    Complete,
    Extend,
    Half,
    Halt,
    Hands,
    How,
    Increment,
    Publish,
    Receive,
    Save,
    Seen,
    Settle,
    Setup,
    SetValue,
    Stream,
    Submit,
    Subscribe,
    TakeClaim,
    answer_decoder,
    encode,
)
from qtasks_conformance.waiting import PATIENCE
from qtasks_core import Outcome, Status, Task, TaskMessage, Verdict
from qtasks_core.errors import Unavailable

STARTED_WITHIN = 30.0
"""Seconds for a new process, which is none of the part's doing, on a busy machine."""


class Elsewhere(ABC):
    """Parts in another process, or what stands for one."""

    @abstractmethod
    async def start(self) -> None:
        """Build and start the parts there."""

    @abstractmethod
    async def kill(self) -> None:
        """End it without giving it a chance to say goodbye."""

    @abstractmethod
    def pause(self) -> None:
        """Stop it in its tracks, as SIGSTOP does."""

    @abstractmethod
    def resume(self) -> None:
        """Let it go on, unaware of the time that has passed."""

    @abstractmethod
    async def close(self) -> None:
        """Free what is left of it; harmless after `kill`."""

    @abstractmethod
    async def _ask(self, line: bytes) -> bytes:
        """Send a line and wait for the answer's."""

    async def publish(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        """Publish there."""
        return (await self._tell(Publish(list(messages)))).outcomes

    async def stream(self, messages: Sequence[TaskMessage], pause: float) -> list[Outcome]:
        """Publish there one by one, with a pause (seconds) after each."""
        within = PATIENCE + 3 * pause * len(messages)
        return (await self._tell(Stream(list(messages), pause), within)).outcomes

    async def subscribe(self, capacity: int) -> None:
        """Subscribe to queue `q` there, before anything is received."""
        await self._tell(Subscribe({"q": capacity}))

    async def receive(self, count: int, *queues: str) -> list[Seen]:
        """Receive and hold `count` more there; returns all that is held."""
        wanted = dict.fromkeys(queues or ("q",), count)
        return (await self._tell(Receive(wanted, count))).held

    async def settle(self, *how: tuple[int, How]) -> list[Outcome]:
        """Settle held deliveries there, by position."""
        return (await self._tell(Settle(list(how)))).outcomes

    async def extend(self) -> list[bool]:
        """Extend all that is held there; says which are still held."""
        return (await self._tell(Extend())).mine

    async def save(self, *tasks: Task) -> list[Outcome]:
        """Save records there."""
        return (await self._tell(Save(list(tasks)))).outcomes

    async def submit(self, *messages: TaskMessage) -> list[Outcome]:
        """Submit there."""
        return (await self._tell(Submit(list(messages)))).outcomes

    async def submit_halfway(self, message: TaskMessage, only: Half) -> bool:
        """Submit there, but only publish or only record; says whether these are two steps."""
        return (await self._tell(Submit([message], only))).halted

    async def admit(self) -> list[Verdict]:
        """Admit all that is held there."""
        return (await self._tell(Admit())).verdicts

    async def complete(self, *ends: tuple[int, How, Status]) -> list[Outcome]:
        """Complete held deliveries there: position, settlement, status to record."""
        return (await self._tell(Complete(list(ends)))).outcomes

    async def complete_halfway(self, end: tuple[int, How, Status], halt: Halt) -> bool:
        """Complete there, but halt for good at the settling; says whether it came to that."""
        return (await self._tell(Complete([end], halt))).halted

    async def broadcast(self, command: core.Command) -> None:
        """Broadcast from there."""
        await self._tell(Broadcast(command))

    async def claim(self, key: str, owner: str, ttl: float) -> bool:
        """Claim there; says whether it was had."""
        return (await self._tell(TakeClaim(key, owner, ttl))).mine == [True]

    async def set(self, key: str, value: bytes | None) -> None:
        """Set a shared value there."""
        await self._tell(SetValue(key, value))

    async def increment(self, key: str, times: int) -> None:
        """Count a shared value up there."""
        await self._tell(Increment(key, times))

    async def append(self, uuid: str, batches: Sequence[Sequence[bytes]]) -> None:
        """Append to a stream there, batch by batch."""
        await self._tell(Append(uuid, [list(batch) for batch in batches]))

    async def _tell(self, command: Command, within: float = PATIENCE) -> Answer:
        try:
            async with asyncio.timeout(within):
                answer = answer_decoder.decode(await self._ask(encode(command)))
        except TimeoutError:
            raise AssertionError(f"no answer within {within} s to {command}") from None
        if answer.unavailable is not None:
            raise Unavailable(answer.unavailable)
        assert answer.failure is None, f"in the other process:\n{answer.failure}"
        return answer


class Process(Elsewhere):
    """A child process."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "qtasks_conformance.child",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_LIMIT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        async with asyncio.timeout(STARTED_WITHIN):
            assert await self._ask(encode(self._setup)), "the child process did not start"

    async def kill(self) -> None:
        process = self._running()
        if process.returncode is None:
            process.kill()
        await process.wait()

    def pause(self) -> None:
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    async def close(self) -> None:
        if self._process is not None:
            await self.kill()
            if self._process.stdin is not None:
                self._process.stdin.close()

    async def _ask(self, line: bytes) -> bytes:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(ConnectionError):  # it has ended: the missing answer says so
            process.stdin.write(line + b"\n")
            await process.stdin.drain()
        answer = await process.stdout.readline()
        assert answer, f"the child process ended with {await process.wait()}"
        return answer

    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "not started"
        return self._process


class Inside(Elsewhere):
    """Other instances in this process, for parts that end with it.

    Killing drops them without a word. While nothing is asked of them they do nothing, which is
    all that stopping means.
    """

    def __init__(self, setup: Setup) -> None:
        self._hands = Hands(setup)
        self._running: asyncio.Task[bytes] | None = None

    async def start(self) -> None:
        await self._hands.start()

    async def kill(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    async def close(self) -> None:
        await self.kill()
        await self._hands.stop()

    async def _ask(self, line: bytes) -> bytes:
        self._running = asyncio.create_task(self._hands.obey(line))
        return await self._running

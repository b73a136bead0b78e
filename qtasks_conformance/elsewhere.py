"""The test's side of another process: sends it commands, freezes it and kills it."""

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
    CommandRunner,
    Complete,
    Extend,
    Halt,
    How,
    Increment,
    Publish,
    Receive,
    Save,
    Seen,
    Settle,
    Setup,
    SetValue,
    Step,
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

STARTED_WITHIN = 4 * PATIENCE
"""Seconds for a new process to start on a busy machine. The backend has little part in that."""


class Elsewhere(ABC):
    """A broker and a storage in another process. Each method runs there what it is named after."""

    @abstractmethod
    async def start(self) -> None:
        """Start the process, and the broker and the storage in it."""

    @abstractmethod
    async def kill(self) -> None:
        """Kill it without a chance to clean up, as SIGKILL does."""

    @abstractmethod
    def pause(self) -> None:
        """Freeze it, as SIGSTOP does."""

    @abstractmethod
    def resume(self) -> None:
        """Let it continue after `pause`. It does not notice how much time has passed."""

    @abstractmethod
    async def close(self) -> None:
        """Free its resources. Safe to call after `kill`."""

    @abstractmethod
    async def _ask(self, line: bytes) -> bytes:
        """Send a command as a line and return the answer as a line."""

    async def publish(self, messages: Sequence[TaskMessage]) -> list[Outcome]:
        """Publish messages; return their outcomes."""
        return (await self._tell(Publish(list(messages)))).outcomes

    async def stream(self, messages: Sequence[TaskMessage], pause: float) -> list[Outcome]:
        """Publish messages one by one, with a pause in seconds after each."""
        within = PATIENCE + 3 * pause * len(messages)
        return (await self._tell(Stream(list(messages), pause), within)).outcomes

    async def subscribe(self, capacity: int) -> None:
        """Subscribe to queue `q`, before anything is received."""
        await self._tell(Subscribe({"q": capacity}))

    async def receive(self, count: int, *queues: str) -> list[Seen]:
        """Receive and hold `count` more deliveries; return all held deliveries."""
        wanted = dict.fromkeys(queues or ("q",), count)
        return (await self._tell(Receive(wanted, count))).held

    async def settle(self, *how: tuple[int, How]) -> list[Outcome]:
        """Settle held deliveries, by position; return the outcomes."""
        return (await self._tell(Settle(list(how)))).outcomes

    async def extend(self) -> list[bool]:
        """Extend all held deliveries; return for each whether it is still held."""
        return (await self._tell(Extend())).mine

    async def save(self, *tasks: Task) -> list[Outcome]:
        """Save records; return the outcomes."""
        return (await self._tell(Save(list(tasks)))).outcomes

    async def submit(self, *messages: TaskMessage) -> list[Outcome]:
        """Submit messages; return the outcomes."""
        return (await self._tell(Submit(list(messages)))).outcomes

    async def submit_halfway(self, message: TaskMessage, only: Step) -> bool:
        """Submit, but only publish or only record; return whether these are separate steps."""
        return (await self._tell(Submit([message], only))).halted

    async def admit(self) -> list[Verdict]:
        """Ask the composition about all held deliveries; return the verdicts."""
        return (await self._tell(Admit())).verdicts

    async def complete(self, *ends: tuple[int, How, Status]) -> list[Outcome]:
        """Complete held deliveries: position, settlement, status to record."""
        return (await self._tell(Complete(list(ends)))).outcomes

    async def complete_halfway(self, end: tuple[int, How, Status], halt: Halt) -> bool:
        """Complete, but hang forever before or after settling; return whether it came to that."""
        return (await self._tell(Complete([end], halt))).halted

    async def broadcast(self, command: core.Command) -> None:
        """Broadcast a command."""
        await self._tell(Broadcast(command))

    async def claim(self, key: str, owner: str, ttl: float) -> bool:
        """Claim a key for `ttl` seconds; return whether the claim was granted."""
        return (await self._tell(TakeClaim(key, owner, ttl))).mine == [True]

    async def set(self, key: str, value: bytes | None) -> None:
        """Set a shared value."""
        await self._tell(SetValue(key, value))

    async def increment(self, key: str, times: int) -> None:
        """Add 1 to a shared value `times` times."""
        await self._tell(Increment(key, times))

    async def append(self, uuid: str, batches: Sequence[Sequence[bytes]]) -> None:
        """Append to the stream of a task, batch by batch."""
        await self._tell(Append(uuid, [list(batch) for batch in batches]))

    async def _tell(self, command: Command, within: float = PATIENCE) -> Answer:
        try:
            async with asyncio.timeout(within):
                answer = answer_decoder.decode(await self._ask(encode(command)))
        except TimeoutError:
            raise AssertionError(
                f"in another process, this call did not return within {within:g} s: {command}"
            ) from None
        if answer.unavailable is not None:
            raise Unavailable(answer.unavailable)
        assert answer.failure is None, f"a call in another process raised:\n{answer.failure}"
        return answer


class Process(Elsewhere):
    """A real child process."""

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
            await self._ask(encode(self._setup))

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
        with suppress(ConnectionError):  # it has exited, and so the answer below is empty
            process.stdin.write(line + b"\n")
            await process.stdin.drain()
        answer = await process.stdout.readline()
        assert answer, (
            f"the other process ended with {await process.wait()} before it answered; "
            "its stderr is in the test's output"
        )
        return answer

    def _running(self) -> asyncio.subprocess.Process:
        assert self._process is not None, "not started"
        return self._process


class InProcess(Elsewhere):
    """Stands for another process if the data ends with the process: other instances in this one.

    Killing cancels the running call and abandons the instances. Pausing needs no code: the
    instances do nothing until they get a command.
    """

    def __init__(self, setup: Setup) -> None:
        self._runner = CommandRunner(setup)
        self._running: asyncio.Task[bytes] | None = None

    async def start(self) -> None:
        await self._runner.start()

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
        await self._runner.stop()

    async def _ask(self, line: bytes) -> bytes:
        self._running = asyncio.create_task(self._runner.execute(line))
        return await self._running

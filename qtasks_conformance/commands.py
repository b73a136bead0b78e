"""The commands that a test sends to another process, and the answers that come back.

That process has a broker and a storage of its own. Commands and answers are JSON, one a line, so
that they travel through a pipe.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

import qtasks_core as core
from qtasks_conformance.subject import Part
from qtasks_conformance.waiting import retry_call
from qtasks_core import (
    Ack,
    Completion,
    Delivery,
    Outcome,
    Release,
    Retry,
    Settlement,
    Status,
    Storage,
    Subscription,
    Task,
    TaskMessage,
    Verdict,
)
from qtasks_core.errors import Closed, Unavailable
from qtasks_core.records import record_of
from qtasks_core.separate import compose

How = Literal["ack", "retry", "release"]
Halt = Literal["before", "after"]
Step = Literal["published", "recorded"]


class Setup(Struct, frozen=True):
    """The first line: which broker and storage to build, and in which namespace to start them."""

    broker: Part
    storage: Part
    namespace: str


class Publish(Struct, frozen=True, tag=True):
    """Publish messages; answers with outcomes."""

    messages: list[TaskMessage]


class Stream(Struct, frozen=True, tag=True):
    """Publish messages one by one, with a pause in seconds after each; answers with outcomes."""

    messages: list[TaskMessage]
    pause: float


class Subscribe(Struct, frozen=True, tag=True):
    """Subscribe to queues, without receiving from them yet."""

    queues: dict[str, int]


class Receive(Struct, frozen=True, tag=True):
    """Receive `count` more deliveries and hold them; answers with all held deliveries."""

    wanted: dict[str, int]
    count: int


class Settle(Struct, frozen=True, tag=True):
    """Settle held deliveries, each by its position; answers with outcomes."""

    how: list[tuple[int, How]]


class Extend(Struct, frozen=True, tag=True):
    """Extend all held deliveries; answers for each whether it is still held."""


class Save(Struct, frozen=True, tag=True):
    """Save records; answers with outcomes."""

    tasks: list[Task]


class Submit(Struct, frozen=True, tag=True):
    """Submit messages through the composition; answers with outcomes.

    With `only` it does only that one of the two steps, and then hangs forever. The answer says
    whether it did. If the composition does both in one step, it submits normally.
    """

    messages: list[TaskMessage]
    only: Step | None = None


class Admit(Struct, frozen=True, tag=True):
    """Ask the composition about all held deliveries; answers with verdicts."""


class Complete(Struct, frozen=True, tag=True):
    """Complete held deliveries: position, settlement, status to record; answers with outcomes.

    With `halt` it hangs forever, before or after settling. The answer says whether it did. If the
    composition records and settles in one step, it completes normally.
    """

    ends: list[tuple[int, How, Status]]
    halt: Halt | None = None


class Broadcast(Struct, frozen=True, tag=True):
    """Broadcast a command."""

    command: core.Command


class TakeClaim(Struct, frozen=True, tag=True):
    """Claim a key for `ttl` seconds; answers whether the claim was granted."""

    key: str
    owner: str
    ttl: float


class SetValue(Struct, frozen=True, tag=True):
    """Set a shared value, whatever its current value is."""

    key: str
    value: bytes | None


class Increment(Struct, frozen=True, tag=True):
    """Add 1 to a shared value `times` times, each time by compare-and-set."""

    key: str
    times: int


class Append(Struct, frozen=True, tag=True):
    """Append items to the stream of a task, batch by batch."""

    uuid: str
    batches: list[list[bytes]]


Command = (
    Publish
    | Stream
    | Subscribe
    | Receive
    | Settle
    | Extend
    | Save
    | Submit
    | Admit
    | Complete
    | Broadcast
    | TakeClaim
    | SetValue
    | Increment
    | Append
)


class Seen(Struct, frozen=True):
    """A delivery that the other process received."""

    message: TaskMessage
    count: int | None


class Answer(Struct, frozen=True):
    """The result of a command; only the fields that belong to the command are set."""

    outcomes: list[Outcome] = []
    held: list[Seen] = []
    mine: list[bool] = []
    verdicts: list[Verdict] = []
    halted: bool = False
    unavailable: str | None = None
    failure: str | None = None


command_decoder = msgspec.json.Decoder(Command)
answer_decoder = msgspec.json.Decoder(Answer)
setup_decoder = msgspec.json.Decoder(Setup)
part_decoder = msgspec.json.Decoder(Part)
encode = msgspec.json.encode


class CommandRunner:
    """Builds a broker and a storage, and executes commands on them, one at a time."""

    def __init__(self, setup: Setup) -> None:
        self._namespace = setup.namespace
        self._broker = setup.broker.broker()
        self._storage = setup.storage.storage()
        self._subscription: Subscription | None = None
        self._held: list[Delivery] = []
        self._halfway: asyncio.Task[list[Outcome]] | None = None

    async def start(self) -> None:
        """Start the broker and the storage. On a busy machine, the server may be slow at first."""
        await retry_call(partial(self._broker.start, self._namespace))
        await retry_call(partial(self._storage.start, self._namespace))
        self._composition = compose(self._broker, self._storage)

    async def stop(self) -> None:
        """Stop the broker and the storage properly, as a crash would not."""
        if self._halfway is not None:
            self._halfway.cancel()
            await asyncio.wait({self._halfway})
        await self._broker.stop()
        await self._storage.stop()

    async def execute(self, line: bytes) -> bytes:
        """Execute the command in a line and return the answer as a line. Errors are answers too."""
        try:
            answer = await self._do(command_decoder.decode(line))
        except Unavailable as error:
            answer = Answer(unavailable=str(error))
        except Exception:  # noqa: BLE001 (the parent process raises it)
            answer = Answer(failure=traceback.format_exc())
        return encode(answer)

    async def _do(self, command: Command) -> Answer:
        match command:
            case Publish(messages):
                return Answer(await self._broker.publish(messages))
            case Stream(messages, pause):
                return Answer(await self._stream(messages, pause))
            case Subscribe(queues):
                self._subscription = await self._broker.subscribe(queues)
            case Receive(wanted, count):
                await self._receive(wanted, count)
                return Answer(held=[Seen(message_of(d), d.count) for d in self._held])
            case Settle(how):
                settlements = [settlement(self._held[at], kind) for at, kind in how]
                return Answer(await self._open().settle(settlements))
            case Extend():
                extended = await self._open().extend(self._held)
                kept = zip(extended, self._held, strict=True)
                self._held = [new or old for new, old in kept]
                return Answer(mine=[delivery is not None for delivery in extended])
            case Save(tasks):
                return Answer(await self._storage.save(tasks))
            case Submit(messages, only):
                if only is not None:
                    return Answer(halted=await self._submit_halfway(messages, only))
                return Answer(await self._composition.submit(messages))
            case Admit():
                admitted = await self._composition.admit(self._held)
                return Answer(verdicts=[verdict for verdict, _ in admitted])
            case Complete(ends, halt):
                completions = [
                    Completion(settlement(self._held[at], kind), self._record(at, status))
                    for at, kind, status in ends
                ]
                if halt is not None:
                    return Answer(halted=await self._complete_halfway(completions, halt))
                return Answer(await self._composition.complete(self._open(), completions))
            case Broadcast(broadcast):
                await self._broker.broadcast(broadcast)
            case TakeClaim(key, owner, ttl):
                return Answer(mine=[await self._storage.claim(key, owner, ttl) is not None])
            case SetValue(key, value):
                await self._storage.set(key, value)
            case Increment(key, times):
                for _ in range(times):
                    await count_up(self._storage, key)
            case Append(uuid, batches):
                for batch in batches:
                    await self._storage.append(uuid, batch)
        return Answer()

    async def _stream(self, messages: list[TaskMessage], pause: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for message in messages:
            outcomes += await self._broker.publish([message])
            await asyncio.sleep(pause)
        return outcomes

    async def _complete_halfway(self, completions: list[Completion], halt: Halt) -> bool:
        """Start to complete; return whether `settle` was called. If so, the call never returns."""
        subscription = self._open()
        settle = subscription.settle
        halted = asyncio.Event()

        async def settle_and_halt(settlements: Sequence[Settlement]) -> list[Outcome]:
            outcomes = await settle(settlements) if halt == "after" else []
            halted.set()
            await asyncio.Event().wait()
            return outcomes

        setattr(subscription, "settle", settle_and_halt)  # noqa: B010 a method is replaced
        return await self._until(halted, self._composition.complete(subscription, completions))

    async def _submit_halfway(self, messages: list[TaskMessage], only: Step) -> bool:
        """Start to submit; return whether a second step was called. If so, it is never done."""
        broker, storage = (self._broker, "publish"), (self._storage, "save")
        (part, method), left = (broker, storage) if only == "published" else (storage, broker)
        halted, idle = asyncio.Event(), asyncio.Event()
        idle.set()
        first = getattr(part, method)

        async def do(*arguments: object) -> list[Outcome]:
            idle.clear()
            outcomes: list[Outcome] = await first(*arguments)
            idle.set()
            return outcomes

        async def halt(*_: object) -> list[Outcome]:
            halted.set()
            await asyncio.Event().wait()
            return []

        setattr(part, method, do)
        setattr(left[0], left[1], halt)
        halfway = await self._until(halted, self._composition.submit(messages))
        await idle.wait()
        return halfway

    async def _until(
        self, halted: asyncio.Event, call: Coroutine[object, object, list[Outcome]]
    ) -> bool:
        """Start a call; return True when it halts, False when it is done without halting."""
        self._halfway = asyncio.create_task(call)
        halting = asyncio.create_task(halted.wait())
        await asyncio.wait({self._halfway, halting}, return_when="FIRST_COMPLETED")
        if halting.done():
            return True
        halting.cancel()
        self._halfway.result()
        return False

    async def _receive(self, wanted: dict[str, int], count: int) -> None:
        if self._subscription is None:
            self._subscription = await self._broker.subscribe(wanted)
        enough = len(self._held) + count
        while (missing := enough - len(self._held)) > 0:
            self._held += await retry_call(partial(self._subscription.receive, wanted, missing))

    def _record(self, at: int, status: Status) -> Task:
        message = message_of(self._held[at])
        return replace(record_of(message), status=status, execution=f"{self._namespace}-{id(self)}")

    def _open(self) -> Subscription:
        if self._subscription is None:
            raise Closed("not subscribed: nothing was received yet")
        return self._subscription


async def count_up(storage: Storage, key: str) -> None:
    """Add 1 to a shared number, safely while other processes do the same."""
    while True:
        was = await storage.get_value(key)
        if await storage.set(key, str(int(was or b"0") + 1).encode(), expect=was):
            return


def message_of(delivery: Delivery) -> TaskMessage:
    """Return the message of a delivery that must be decodable."""
    assert isinstance(delivery.message, TaskMessage), (
        f"a message that `publish` took was delivered as `Raw`, as if it could not be decoded: "
        f"{delivery}"
    )
    return delivery.message


def settlement(delivery: Delivery, how: How) -> Settlement:
    """Return a settlement of this kind. A retry has no delay and the next attempt's number."""
    if how == "ack":
        return Ack(delivery)
    if how == "release":
        return Release(delivery)
    message = message_of(delivery)
    return Retry(delivery, replace(message, attempt=message.attempt + 1, delay=0.0))

"""A fault at any await inside a call loses nothing. The awaits are tried one after the other."""

from __future__ import annotations

import asyncio
import time
from asyncio import locks
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any, Generic, Literal, TypeVar

import pytest
from msgspec.structs import replace

from qtasks_conformance.commands import message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled
from qtasks_conformance.contracts.keys import QUIET
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.waiting import PATIENCE, collect, patient, retry_call, retry_call_untimed
from qtasks_core import Ack, Broker, Delivery, Release, Retry, Settlement, Subscription, TaskMessage
from qtasks_core.errors import Unavailable

T = TypeVar("T")
Kind = Literal["cancel", "error"]
Moment = Literal["early", "late"]

CALLS = ("receive waiting messages", "receive new messages", "settle", "extend", "publish")
MOMENTS: tuple[Moment, ...] = ("early", "late")
PLACES = 4
"""How many awaits of each call are tried without `--full`."""
CUTS = 2
"""How often a retry is interrupted before it may succeed."""
MOST_PLACES = 100
"""How many awaits of each call are tried at most with `--full`."""


class FaultContract(Contract):
    """Invariants 1 and 10: no await inside a call is a place where a message can get lost."""

    @pytest.mark.parametrize("kind", ["cancel", "error"])
    async def test_a_fault_inside_a_call_loses_nothing(
        self, rig: Rig, request: pytest.FixtureRequest, kind: Kind
    ) -> None:
        """After a fault at any await, every message is still received and settled.

        A fault is a cancel, or a broken connection. It comes instead of the awaited operation
        (early), or after it, instead of its answer (late). A message may be delivered twice. Each
        call is tried on a separate broker, all at the same time.
        """
        full = request.config.getoption("full", default=False)
        trials = [
            rig.background(_try(rig, call, kind, moment, full))
            for call in CALLS
            for moment in MOMENTS
        ]
        await asyncio.wait(trials, return_when="FIRST_EXCEPTION")
        for trial in trials:
            if trial.done():
                trial.result()

    @pytest.mark.parametrize("kind", ["cancel", "error"])
    async def test_a_retry_that_is_cut_off_leaves_few_messages(
        self, rig: Rig, request: pytest.FixtureRequest, kind: Kind
    ) -> None:
        """A retry is interrupted twice at each await, then repeated by the same holder.

        If `atomic_retries` is declared, exactly one message is left: the next attempt. Else each
        try may leave one, and the old message may be left too. None comes back once it is
        acknowledged.
        """
        full = request.config.getoption("full", default=False)
        trials = [rig.background(_try_to_retry(rig, kind, moment, full)) for moment in MOMENTS]
        await asyncio.wait(trials, return_when="FIRST_EXCEPTION")
        for trial in trials:
            if trial.done():
                trial.result()


@dataclass
class Fault:
    """What goes wrong, at which await of a call, and whether the call got that far."""

    kind: Kind
    moment: Moment
    at: int
    reached: bool = False


class Faulted(Generic[T]):
    """Awaits a call step by step, and makes it fail at one of its awaits.

    Only awaits in the call's own task are seen. Background tasks of the broker are not affected.
    No error comes where the call waits for a lock of asyncio: no connection can break there, and
    such an error would leave all others waiting for that lock.
    """

    def __init__(self, call: Coroutine[Any, Any, T], fault: Fault) -> None:
        self._call = call
        self._fault = fault

    def __await__(self) -> Generator[Any, None, T]:
        task = asyncio.current_task()
        assert task is not None
        fault, suspensions = self._fault, 0
        error: BaseException | None = None
        while True:
            try:
                awaited = self._call.send(None) if error is None else self._call.throw(error)
            except StopIteration as end:
                result: T = end.value
                return result
            error = None
            counts = fault.kind == "cancel" or not _waits_for_a_lock(self._call)
            suspensions += counts
            here = counts and suspensions == fault.at
            fault.reached = fault.reached or here
            if here and fault.kind == "cancel":
                self._cancel(task, awaited)
            if here and fault.kind == "error" and fault.moment == "early":
                if awaited is not None:
                    awaited.cancel()  # an operation that failed does not continue
            else:
                try:
                    yield awaited
                except BaseException as raised:  # noqa: BLE001 (passed on to the call)
                    error = raised
            if here and fault.kind == "error":
                error = ConnectionResetError("a fault of the test")

    def _cancel(self, task: asyncio.Task[Any], awaited: asyncio.Future[Any] | None) -> None:
        """Cancel the task: now, or when the answer is there but not yet read."""
        if self._fault.moment == "early" or awaited is None:
            task.cancel()
        else:
            awaited.add_done_callback(lambda _: task.cancel())


def _waits_for_a_lock(call: object) -> bool:
    """Return whether a suspended call waits for a lock, an event or the like of asyncio."""
    while (inner := getattr(call, "cr_await", None)) is not None and hasattr(inner, "cr_code"):
        call = inner
    code: CodeType = call.cr_code  # type: ignore[attr-defined]
    return code.co_filename == locks.__file__


async def _try(rig: Rig, call: str, kind: Kind, moment: Moment, full: bool) -> None:
    """Make a call fail at its first await, then at its second and so on, until it has no more."""
    # A separate namespace, so that a message that comes to another trial is found out.
    namespace = f"{rig.namespace}-{CALLS.index(call)}-{moment}"
    # A settle that is made again after the lease may have had its effect, and be refused now.
    more = {"lease": LONG_LEASE} if call == "settle" else {}
    trial = Trial(rig, await rig.broker(namespace=namespace, **more))
    at = 0
    try:
        trial.subscription = await retry_call(partial(trial.broker.subscribe, {"q": 10}))
        for at in range(1, (MOST_PLACES if full else PLACES) + 1):
            fault = Fault(kind, moment, at)
            await trial.go(call, fault)
            if not fault.reached:
                break
        await trial.expect_empty(rig.subject.lease + 0.5 if full else 0.3)
    except (AssertionError, Unavailable, OSError) as error:
        error.add_note(f"after a fault ({kind}, {moment}) at await number {at} of: {call}")
        raise


async def _try_to_retry(rig: Rig, kind: Kind, moment: Moment, full: bool) -> None:
    """Interrupt one retry at its first await, the next one at its second, and so on."""
    broker = await rig.broker(namespace=f"{rig.namespace}-retry-{moment}", lease=LONG_LEASE)
    trial = Trial(rig, broker)
    trial.subscription = await retry_call(partial(broker.subscribe, {"q": 10}))
    came: dict[str, list[int]] = {}
    for at in range(1, (MOST_PLACES if full else PLACES) + 1):
        fault = Fault(kind, moment, at)
        came[await trial.retry(fault, came)] = []
        if not fault.reached:
            break
    await trial.drain(came)
    for at, attempts in enumerate(came.values(), 1):
        what = (
            f"after a fault ({kind}, {moment}) at await number {at} of a retry, messages of these "
            f"attempts are left: {attempts}"
        )
        if broker.guarantees.atomic_retries:
            assert attempts == [2], what
        assert len(attempts) <= CUTS + 2, what
        assert set(attempts) <= {1, 2}, what


class Trial:
    """A broker, a subscription, and the published messages that must not be lost."""

    subscription: Subscription

    def __init__(self, rig: Rig, broker: Broker) -> None:
        self.broker = broker
        self._rig = rig
        self._published: set[str] = set()

    async def go(self, call: str, fault: Fault) -> None:
        """Make a call fail once, repeat it, and check that every message can be settled."""
        messages = self._rig.messages(3)
        uuids = {message.uuid for message in messages}
        self._published |= uuids
        if call == "publish":
            publish = partial(self.broker.publish, messages)
            await self._fail(publish, fault)
            assert_done(await retry_call(publish))
            await self._finish(uuids)
        elif call == "receive new messages":
            publishing = self._rig.background(self._publish_soon(messages))
            taken = await self._fail(partial(self.subscription.receive, {"q": 3}, 3), fault)
            await publishing
            await self._finish(uuids, taken or [])
        else:
            assert_done(await retry_call(partial(self.broker.publish, messages)))
            if call == "receive waiting messages":
                taken = await self._fail(partial(self.subscription.receive, {"q": 3}, 3), fault)
                await self._finish(uuids, taken or [])
            elif call == "extend":
                await self._extend(uuids, fault)
            else:
                await self._settle(uuids, fault)

    async def retry(self, fault: Fault, came: dict[str, list[int]]) -> str:
        """Publish a message, receive it, and retry it with interruptions; return its uuid.

        Messages of earlier calls that come meanwhile are acknowledged; `came` notes their attempts.
        """
        message = self._rig.message()
        self._published.add(message.uuid)
        assert_done(await retry_call(partial(self.broker.publish, [message])))
        held: Delivery | None = None
        while held is None:
            (delivery,) = await collect(self.subscription, 1)
            if message_of(delivery).uuid == message.uuid:
                held = delivery
            else:
                await self._note(delivery, came)
        settle = partial(self.subscription.settle, [Retry(held, replace(message, attempt=2))])
        for _ in range(CUTS):
            await self._fail(settle, fault)
        await retry_call(settle)
        return message.uuid

    async def drain(self, came: dict[str, list[int]]) -> None:
        """Receive until each message has come at least once and the queue is empty."""
        while not all(came.values()):
            (delivery,) = await collect(self.subscription, 1)
            await self._note(delivery, came)
        with suppress(TimeoutError):
            while True:
                async with asyncio.timeout(QUIET):
                    (delivery,) = await self.subscription.receive({"q": 1}, 1)
                await self._note(delivery, came)

    async def _note(self, delivery: Delivery, came: dict[str, list[int]]) -> None:
        message = message_of(delivery)
        came[message.uuid].append(message.attempt)
        assert len(came[message.uuid]) <= CUTS + 2, (
            "a message that is acknowledged is delivered again and again"
        )
        await self._acknowledge([delivery])

    async def _publish_soon(self, messages: list[TaskMessage]) -> None:
        await asyncio.sleep(0.05)
        assert_done(await retry_call(partial(self.broker.publish, messages)))

    async def _extend(self, uuids: set[str], fault: Fault) -> None:
        held = await self._receive(len(uuids))
        extend = partial(self.subscription.extend, held)
        await self._fail(extend, fault)
        extended = await retry_call(extend)
        await self._finish(uuids, [delivery for delivery in extended if delivery is not None])

    async def _settle(self, uuids: set[str], fault: Fault) -> None:
        held: dict[str, Delivery] = {}
        while not uuids <= held.keys():
            held |= {message_of(d).uuid: d for d in await self._receive(len(uuids))}
        acked, retried, released = [held[uuid] for uuid in sorted(uuids)]
        again = replace(message_of(retried), attempt=2)
        ends: list[Settlement] = [Ack(acked), Retry(retried, again), Release(released)]
        settle = partial(self.subscription.settle, ends)
        await self._fail(settle, fault)
        outcomes = await retry_call(settle)
        left = set(uuids)
        if outcomes[0].status != "refused":
            assert_settled(outcomes[:1], self.broker.guarantees)
            left.discard(message_of(acked).uuid)
        await self._finish(left)

    async def _fail(self, call: Callable[[], Coroutine[Any, Any, T]], fault: Fault) -> T | None:
        """Make a call with a fault; return its result if it succeeds in spite of it, else None.

        A busy server may not answer before there is a fault. Then the call is made again.
        """

        async def make() -> T:
            return await Faulted(call(), fault)

        deadline = time.monotonic() + PATIENCE
        while True:
            making = self._rig.background(make())
            await asyncio.wait({making}, timeout=PATIENCE)
            assert making.done(), "the call hangs after a fault; it must raise or return"
            if making.cancelled():
                assert fault.kind == "cancel", (
                    "the call raised `CancelledError` though nobody cancelled it: raise "
                    "`Unavailable`"
                )
                return None
            try:
                return making.result()
            except (Unavailable, ConnectionResetError) as error:
                starved = isinstance(error, Unavailable) and not fault.reached
                if starved and time.monotonic() < deadline:
                    continue
                assert fault.reached, "the call raised an error before there was a fault"
                assert fault.kind == "error", (
                    "a cancelled call must raise `CancelledError`, not another error"
                )
                return None

    async def _finish(self, uuids: set[str], held: list[Delivery] | None = None) -> None:
        """Acknowledge what is held; receive the rest, and again what has lost its lease."""
        left = uuids - await self._acknowledge(held or [])
        try:
            async with patient(PATIENCE, "receiving the rest after a fault"):
                while left:
                    left -= await self._acknowledge(await self._receive(10))
        except TimeoutError:
            raise AssertionError(
                f"{len(left)} of {len(uuids)} messages are lost: after the fault they were not "
                f"delivered within {PATIENCE:g} s"
            ) from None

    async def _receive(self, most: int) -> list[Delivery]:
        return await retry_call_untimed(lambda: self.subscription.receive({"q": most}, most))

    async def _acknowledge(self, deliveries: list[Delivery]) -> set[str]:
        """Acknowledge deliveries; return the uuids of those that were not refused."""
        came = [message_of(delivery).uuid for delivery in deliveries]
        assert set(came) <= self._published, "a message of another namespace was delivered"
        if not deliveries:
            return set()
        ends = [Ack(delivery) for delivery in deliveries]
        outcomes = await retry_call(partial(self.subscription.settle, ends))
        mine = [outcome for outcome in outcomes if outcome.status != "refused"]
        if mine:
            assert_settled(mine, self.broker.guarantees)
        return {u for u, o in zip(came, outcomes, strict=True) if o.status != "refused"}

    async def expect_empty(self, silent: float) -> None:
        """Acknowledge repeated deliveries until nothing comes for so many seconds."""
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    try:
                        async with asyncio.timeout(silent):
                            again = await self._receive(10)
                    except TimeoutError:
                        return
                    await self._acknowledge(again)
        except TimeoutError:
            raise AssertionError("settled messages are delivered again and again") from None

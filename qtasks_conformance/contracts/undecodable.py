"""Messages that cannot be decoded: another program, or a newer release, has written them."""

from __future__ import annotations

import math

import pytest

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import assert_done, assert_settled
from qtasks_conformance.rig import LONG_LEASE, Rig
from qtasks_conformance.waiting import assert_silent, collect
from qtasks_core import Ack, Raw, Release, Settlement, TaskMessage
from qtasks_core.wire import encode_message

FOREIGN = (
    b"{}",
    b"\x00\xff not a message",
    b"\x01",
    bytes([99]) + encode_message(TaskMessage(uuid="u", task_name="t"))[1:],
    encode_message(TaskMessage(uuid="u", task_name="t"))[:-1],
    encode_message(TaskMessage(uuid="", task_name="t")),
    encode_message(TaskMessage(uuid="u" * 201, task_name="t")),
    encode_message(TaskMessage(uuid="u" * 10_000, task_name="t")),
    encode_message(TaskMessage(uuid="u\0", task_name="t")),
    encode_message(TaskMessage(uuid="u", task_name="t", reply_to="\0" * 20)),
    encode_message(TaskMessage(uuid="u", task_name="t", priority=-1, attempt=2**60)),
    encode_message(TaskMessage(uuid="u", task_name="t", delay=math.nan, created_at=math.inf)),
)


class UndecodableContract(Contract):
    """Invariant 6, for messages that cannot be decoded."""

    async def test_what_cannot_be_decoded_is_delivered_raw(self, rig: Rig) -> None:
        """Bytes that are no message are delivered as `Raw`, with the bytes and the reason.

        They can be extended, released and acknowledged. Other messages are delivered as usual.
        """
        inject = rig.subject.inject
        if inject is None:
            pytest.skip("the subject has no `inject`")
        broker = await rig.broker(lease=LONG_LEASE)
        subscription = await broker.subscribe({"q": 100})
        first, last = rig.message(), rig.message()
        assert_done(await broker.publish([first]))
        for data in FOREIGN:
            await inject(rig.namespace, "q", data)
        assert_done(await broker.publish([last]))
        deliveries = await collect(subscription, len(FOREIGN) + 2)
        raws = [d for d in deliveries if isinstance(d.message, Raw)]
        assert sorted(raw_of(d.message) for d in raws) == sorted(FOREIGN)
        assert {d.queue for d in raws} == {"q"}
        messages = [d.message for d in deliveries if isinstance(d.message, TaskMessage)]
        assert sorted(m.uuid for m in messages) == sorted([first.uuid, last.uuid])
        assert None not in await subscription.extend(raws)
        released = raws[0]
        ends: list[Settlement] = [
            Release(released),
            *(Ack(d) for d in deliveries if d is not released),
        ]
        assert_settled(await subscription.settle(ends), broker.guarantees)
        (again,) = await collect(subscription, 1)
        assert raw_of(again.message) == raw_of(released.message)
        assert_settled(await subscription.settle([Ack(again)]), broker.guarantees)
        await assert_silent(subscription, 0.5)


def raw_of(message: TaskMessage | Raw) -> bytes:
    """Return the bytes of a `Raw`, which must have a reason."""
    assert isinstance(message, Raw), f"bytes that are no message were decoded as {message}"
    assert message.error, "`Raw.error` is empty: it must say why decoding failed"
    return message.data

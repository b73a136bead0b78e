"""A client is killed while it submits a task, and another one submits the same task again."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from qtasks_conformance.commands import Step, message_of
from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.keys import complete, received
from qtasks_conformance.rig import LONG_LEASE, Rig, new_uuid
from qtasks_conformance.waiting import assert_silent, collect
from qtasks_core import Ack, Completion
from qtasks_core.separate import compose


class SubmittingContract(Contract):
    """Invariants 1 and 2, for the two steps of `submit`: to publish and to record."""

    @pytest.mark.parametrize("key", ["plain", "keyed"])
    @pytest.mark.parametrize("only", ["published", "recorded"])
    async def test_a_client_killed_while_submitting_loses_nothing(
        self, rig: Rig, only: Step, key: str
    ) -> None:
        """A client is killed after one of the two steps; another client submits the task again.

        The task runs. If it was published, it runs even without the second submit. A task with a
        key runs only once.
        """
        message = rig.message(submission=new_uuid() if key == "keyed" else "")
        victim = await rig.elsewhere(lease=LONG_LEASE)
        halfway = await victim.submit_halfway(message, only)
        await victim.kill()
        broker, storage = await rig.broker(lease=LONG_LEASE), await rig.storage()
        composition = compose(broker, storage)
        subscription = await broker.subscribe({"q": 10})
        run = []
        if not halfway or only == "published":
            (delivery,) = await collect(subscription, 1)
            ((verdict, _),) = await composition.admit([delivery])
            assert verdict == "run"
            run.append(delivery)
        again = replace(message, submission=new_uuid()) if key == "keyed" else message
        (outcome,) = await composition.submit([again])
        if run and key == "keyed":
            assert outcome.current is not None
            assert outcome.current.submission == message.submission
        else:
            assert outcome.status == "done"
            for delivery in await received(subscription):
                ((verdict, _),) = await composition.admit([delivery])
                assert verdict == "run"
                run.append(delivery)
        assert {message_of(delivery).uuid for delivery in run} == {message.uuid}
        assert key == "plain" or len(run) == 1
        await complete(composition, subscription, run[:1])
        await composition.complete(subscription, [Completion(Ack(d), None) for d in run[1:]])
        (record,) = await storage.get([message.uuid])
        assert record is not None
        assert record.status == "success"
        await assert_silent(subscription, 0.3)

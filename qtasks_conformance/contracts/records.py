"""Records: which saves a storage accepts, which it refuses, and what it returns."""

from __future__ import annotations

import asyncio
from functools import partial
from itertools import product

import pytest
from msgspec.structs import replace

from qtasks_conformance.contracts.base import Contract
from qtasks_conformance.contracts.delivering import MANY, SEPARATORS, assert_done
from qtasks_conformance.rig import SCRIPTS, Rig, longest_ids, new_uuid
from qtasks_conformance.waiting import SOON, patient, retry_call
from qtasks_core import Status, Storage, Task
from qtasks_core.wire import encode_task

STATUSES: tuple[Status, ...] = (
    "new", "scheduled", "process", "retry", "success", "error", "cancel",
)  # fmt: skip
FIRST, FINAL = STATUSES[:2], STATUSES[4:]
STATES = tuple(product((1, 2), STATUSES))
"""Every (attempt, status) of two attempts."""


def expected(first: Task, second: Task) -> str:
    """Return the expected outcome of the second save, by the rules and not by the core's function.

    Saving the same record again (same attempt, status and execution) is `done`. A final record
    refuses every other one. A first record (`new`, `scheduled`) replaces no other. For the rest,
    (attempt, rank of status) must not go back.
    """
    was, now = [(t.attempt, STATUSES.index(t.status)) for t in (first, second)]
    if was == now and first.execution == second.execution:
        return "done"
    if first.status in FINAL or second.status in FIRST:
        return "refused"
    return "done" if now >= was else "refused"


class RecordContract(Contract):
    """Invariants 2 (records never go back) and 8 (separate namespaces)."""

    async def test_a_record_comes_as_it_went(self, rig: Rig) -> None:
        """Every field of a record is read by another client as it was saved."""
        saver, reader = await rig.storage(), await rig.storage()
        record = rig.record(
            "error", task_name="models.übung", args=bytes(range(256)), kwargs=b"\x00",
            encoding="json", priority=9, attempt=4, execution="e1", returning=b"\xff\x00",
            error="ValueError: größer\0", traceback="Traceback\n  …\0", dead="too often",
            worker="w:1", reply_to="client", created_at=1.5, started_at=2.5, finished_at=3.25,
            due_at=4.0, retention=3e9, headers={"ключ": "значение\0"}, submission="publishing",
        )  # fmt: skip
        assert_done(await saver.save([record]))
        assert await reader.get([record.uuid]) == [record]

    async def test_many_at_once(self, rig: Rig) -> None:
        """A batch of 2000 works, even if the server takes fewer in one statement."""
        storage = await rig.storage()
        records = [rig.record("process", execution="a") for _ in range(MANY)]
        assert_done(await storage.save(records))
        assert await storage.get([record.uuid for record in records]) == records

    async def test_calls_run_side_by_side(self, rig: Rig) -> None:
        """Concurrent calls of `save` and `get` each get their own answer."""
        storage = await rig.storage()
        records = [rig.record("success", execution="a") for _ in range(40)]
        assert_done(await storage.save(records[:20]))
        saved, read = await asyncio.gather(
            asyncio.gather(*(retry_call(partial(storage.save, [each])) for each in records)),
            asyncio.gather(
                *(retry_call(partial(storage.get, [each.uuid])) for each in records[:20])
            ),
        )
        for outcomes in saved:
            assert_done(outcomes)
        assert read == [[record] for record in records[:20]]

    async def test_the_largest_record_fits(self, rig: Rig) -> None:
        """A record with 1 MiB of arguments and a result of 1 MiB is saved, read and pushed."""
        storage = await rig.storage()
        inbox = await rig.inbox(await rig.storage())
        large = bytes(range(256)) * 4096
        record = rig.record("success", args=large, returning=large, reply_to=inbox.address)
        inbox.expect([record.uuid])
        assert_done(await storage.save([record]))
        assert await storage.get([record.uuid]) == [record]
        async with patient(SOON, "receiving a large record from an inbox"):
            assert await inbox.receive() == [record]

    @pytest.mark.parametrize("script", SCRIPTS)
    async def test_the_longest_uuids_fit(self, rig: Rig, script: str) -> None:
        """Uuids and addresses of 200 characters of any script work; each uuid has its own record.

        A `reply_to` that belongs to no inbox is ignored, even if it starts like a real address.
        """
        storage, reader = await rig.storage(), await rig.storage()
        kind = (await rig.inbox(storage)).address[:8]
        uuids = longest_ids(script)
        records = [
            rig.record("success", uuid=uuid, execution="e", reply_to=(kind + uuid)[:length])
            for uuid, length in zip(uuids, (200, 62, 20), strict=True)
        ]
        assert_done(await storage.save(records))
        assert_done(await storage.save(records))
        assert await reader.get(uuids) == records
        outcomes = await storage.save([replace(r, status="error") for r in records])
        assert [outcome.current for outcome in outcomes] == records

    async def test_what_was_saved_outlives_its_process(self, rig: Rig) -> None:
        """When `save` returns, the record is on the server: the saving process is killed then."""
        storage, victim = await rig.storage(), await rig.elsewhere()
        records = [rig.record("success"), rig.record("process")]
        assert_done(await victim.save(*records))
        await victim.kill()
        assert await storage.get([record.uuid for record in records]) == records

    async def test_get_answers_in_order(self, rig: Rig) -> None:
        """`get` answers in the order of its uuids: None for unknown ones, duplicates repeated."""
        storage = await rig.storage()
        one, two = rig.record("new"), rig.record("process")
        assert_done(await storage.save([one, two]))
        asked = [two.uuid, new_uuid(), one.uuid, two.uuid]
        assert await storage.get(asked) == [two, None, one, two]
        assert await storage.get([]) == []
        assert await storage.save([]) == []

    async def test_get_sees_what_was_saved_elsewhere(self, rig: Rig) -> None:
        """`get` sees every save that has returned before, by any process."""
        storage, other = await rig.storage(), await rig.elsewhere()
        for _ in range(20):
            records = [rig.record("process"), rig.record("success")]
            assert_done(await other.save(*records))
            assert await storage.get([record.uuid for record in records]) == records

    @pytest.mark.parametrize("executions", ["same", "different"])
    @pytest.mark.parametrize("calls", ["one call", "two calls", "two clients"])
    async def test_every_pair_of_states(self, rig: Rig, executions: str, calls: str) -> None:
        """For every pair of states, the second save is accepted or refused as the rules say.

        A state is an attempt (1 or 2) and a status. `expected` has the rules. The outcome of a
        refused save has the existing record in `current`.
        """
        first_storage, second_storage = await rig.storage(), await rig.storage()
        if calls != "two clients":
            second_storage = first_storage
        pairs = [self._pair(rig, one, two, executions) for one, two in product(STATES, STATES)]
        if calls == "one call":
            outcomes = await first_storage.save([record for pair in pairs for record in pair])
            assert_done(outcomes[0::2])
            outcomes = outcomes[1::2]
        else:
            assert_done(await first_storage.save([first for first, _ in pairs]))
            outcomes = await second_storage.save([second for _, second in pairs])
        there = await first_storage.get([first.uuid for first, _ in pairs])
        for (first, second), outcome, record in zip(pairs, outcomes, there, strict=True):
            what = (
                f"saving {second.status!r} of attempt {second.attempt} after {first.status!r} of "
                f"attempt {first.attempt}, {executions} execution: must be "
                f"{expected(first, second)}, see `qtasks_core.records.judge`"
            )
            assert outcome.status == expected(first, second), what
            if outcome.status == "refused":
                assert outcome.current == first, what
            assert record in self._newest(first, second), what

    @staticmethod
    def _pair(
        rig: Rig, one: tuple[int, Status], two: tuple[int, Status], executions: str
    ) -> tuple[Task, Task]:
        first = rig.record(one[1], attempt=one[0], execution="a", error="first")
        execution = "a" if executions == "same" else "b"
        error = "first" if one == two and executions == "same" else "second"
        return first, replace(
            first, status=two[1], attempt=two[0], execution=execution, error=error
        )

    @staticmethod
    def _newest(first: Task, second: Task) -> tuple[Task, ...]:
        return (second,) if expected(first, second) == "done" else (first,)

    async def test_one_of_two_finals_is_taken(self, rig: Rig) -> None:
        """If two processes save two final records of a task at once, exactly one is accepted.

        Every reader sees that one, and the other process gets it in `current` of its outcome.
        """
        storage, other = await rig.storage(), await rig.elsewhere()
        mine = [rig.record("success", execution="mine") for _ in range(25)]
        theirs = [replace(r, status="error", execution="theirs") for r in reversed(mine)]
        answers = await asyncio.gather(storage.save(mine), other.save(*theirs))
        there = await (await rig.storage()).get([record.uuid for record in mine])
        theirs_by_uuid = dict(zip((t.uuid for t in theirs), answers[1], strict=True))
        for record, outcome, winner in zip(mine, answers[0], there, strict=True):
            both = (outcome, theirs_by_uuid[record.uuid])
            assert sorted(o.status for o in both) == ["done", "refused"], (
                "exactly one of two final records must be accepted: decide it atomically"
            )
            assert winner is not None
            assert (winner.execution == "mine") == (outcome.status == "done")
            assert next(o.current for o in both if o.status == "refused") == winner

    async def test_one_of_two_first_records_is_taken(self, rig: Rig) -> None:
        """If two processes save two first records of a task at once, exactly one is accepted."""
        storage, other = await rig.storage(), await rig.elsewhere()
        mine = [rig.record("new", execution="mine") for _ in range(25)]
        theirs = [replace(r, status="scheduled", execution="theirs") for r in reversed(mine)]
        answers = await asyncio.gather(storage.save(mine), other.save(*theirs))
        there = await (await rig.storage()).get([record.uuid for record in mine])
        for record, outcome, their_outcome in zip(
            there, answers[0], reversed(answers[1]), strict=True
        ):
            assert sorted(o.status for o in (outcome, their_outcome)) == ["done", "refused"], (
                "exactly one of two first records must be accepted: decide it atomically"
            )
            assert record is not None
            assert (record.execution == "mine") == (outcome.status == "done")
            assert next(o.current for o in (outcome, their_outcome) if o.current) == record

    async def test_a_watched_task_is_recorded(self, rig: Rig) -> None:
        """Watching a task that has no record yet does not prevent its first record."""
        storage = await rig.storage()
        first, second = rig.record("new", execution="a"), rig.record("scheduled")
        await (await rig.inbox(storage)).watch([first.uuid, second.uuid])
        assert_done(await storage.save([first, second]))
        assert await storage.get([first.uuid, second.uuid]) == [first, second]
        (outcome,) = await storage.save([replace(first, execution="b")])
        assert (outcome.status, outcome.current) == ("refused", first)

    async def test_a_final_can_be_saved_again(self, rig: Rig) -> None:
        """The same final record can be saved again, by any client: the outcome is `done`.

        A worker repeats a save if it does not know whether the first one worked. A final record of
        another execution is refused.
        """
        first, second = await rig.storage(), await rig.storage()
        record = rig.record("success", execution="a", returning=b"1")
        for storage in (first, first, second):
            assert_done(await storage.save([record]))
        other = replace(record, execution="b", returning=b"2")
        (outcome,) = await second.save([other])
        assert (outcome.status, outcome.current) == ("refused", record)
        assert await first.get([record.uuid]) == [record]

    async def test_a_record_that_cannot_be_read_hides_no_other(self, rig: Rig) -> None:
        """A record whose bytes are damaged does not stop `get` from returning the others.

        It is returned with its uuid, attempt and execution; if it was final, with status `error`,
        else with the status that it had. Its `error` says that it cannot be read.
        """
        spoil = rig.subject.spoil
        if spoil is None:
            pytest.skip("the subject has no `spoil`")
        storage = await rig.storage()
        good, bad, running = (
            rig.record(status, attempt=2, execution="e")
            for status in ("success", "success", "process")
        )
        assert_done(await storage.save([good, bad, running]))
        for data in (b"", b"\x01\xff", bytes([9]) + encode_task(bad)[1:]):
            await spoil(rig.namespace, bad.uuid, data)
            await spoil(rig.namespace, running.uuid, data)
            first, found, begun = await storage.get([good.uuid, bad.uuid, running.uuid])
            assert first == good
            assert found is not None
            assert begun is not None
            assert (found.uuid, found.attempt, found.execution) == (bad.uuid, 2, "e")
            assert (found.status, found.returning, begun.status) == ("error", None, "process")
            assert "cannot be read" in str(found.error)
            (outcome,) = await storage.save([replace(bad, execution="other")])
            assert (outcome.status, outcome.current) == ("refused", found)

    async def test_namespaces_never_meet(self, rig: Rig) -> None:
        """The same uuid has separate records in different namespaces."""
        storage = await rig.storage()
        record = rig.record("success")
        assert_done(await storage.save([record]))
        for name, other in (await self._neighbours(rig)).items():
            assert await other.get([record.uuid]) == [None], name
            theirs = replace(record, task_name=name, status="process")
            assert_done(await other.save([theirs]))
            assert await other.get([record.uuid]) == [theirs], name
        assert await storage.get([record.uuid]) == [record]

    async def _neighbours(self, rig: Rig) -> dict[str, Storage]:
        names = ["other" + rig.namespace, *(f"{rig.namespace}{mark}x" for mark in SEPARATORS)]
        return {name: await rig.storage(namespace=name) for name in names}

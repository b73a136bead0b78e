"""`qtasks.control` in both faces: dead tasks are revived once, and only they."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import date, timedelta
from decimal import Decimal

import pytest

import qtasks
from qtasks import NotSupported, control
from qtasks.asyncio import QueueTasks
from qtasks.cli.output import plain, task_row
from qtasks.client.client import Client
from qtasks_core import Outcome, Task, TaskQuery
from qtasks_memory import MemoryStorage


async def test_a_dead_task_is_revived_once_however_often_it_is_asked() -> None:
    app = QueueTasks("control", "memory://")
    runs: list[int] = []

    @app.task(store_result=False)
    async def fail_first(x: int) -> int:
        runs.append(x)
        if len(runs) == 1:
            raise RuntimeError("not yet")
        return x

    async with app.worker():
        dead = await fail_first.add_task(7, timeout=120)
    without = [fail_first.name]
    async with app:
        first = await app.control(control.revive, [dead.uuid], without)
        again = await app.control(control.revive, [dead.uuid], without)
        for (outcome,) in (first, again):
            assert outcome.status == "done"
            assert outcome.current is not None
            assert outcome.current.uuid == control.revived_uuid(dead.uuid)
            assert outcome.current.headers == {control.REVIVED_FROM: dead.uuid}
        async with app.worker():
            revived = await app.wait(control.revived_uuid(dead.uuid), 10)
        assert (revived.status, revived.returning, runs) == ("success", None, [7, 7])
        (after,) = await app.control(control.revive, [dead.uuid])
        assert after.current == revived
        assert runs == [7, 7]


async def test_a_key_that_dies_a_second_time_is_revived_a_second_time() -> None:
    app = QueueTasks("control-key", "memory://")
    runs: list[int] = []

    @app.task()
    async def fail_by_turns() -> None:
        runs.append(1)
        if len(runs) % 2:
            raise RuntimeError("not yet")

    async with app.worker():
        for life in (1, 2):
            dead = await fail_by_turns.add_task(key="k", timeout=120)
            assert dead.status == "error"
            (outcome,) = await app.control(control.revive, [dead.uuid])
            assert outcome.current is not None
            assert (await app.wait(outcome.current.uuid, 10)).status == "success"
            assert len(runs) == 2 * life
            await app.control(control.drop, [dead.uuid])


async def test_a_batch_has_an_outcome_for_each() -> None:
    app = QueueTasks("control-batch", "memory://")

    @app.task()
    async def divide(x: int, y: int) -> float:
        return x / y

    async with app.worker():
        dead = await divide.add_task(1, 0, timeout=120)
        fine = await divide.add_task(1, 1, timeout=120)
        nobody = "01a20dfb-e3ce-7219-9105-d62351f4eea8"
        for operation in (control.revive, control.drop):
            outcomes = await app.control(operation, [nobody, dead.uuid, fine.uuid])
            assert [outcome.status for outcome in outcomes] == ["refused", "done", "refused"]
            assert outcomes[0].reason == f"there is no record of a task {nobody}"
            assert outcomes[2].reason == f"task {fine.uuid} is not dead: its status is 'success'"
        assert await app.get(dead.uuid) is None
        assert await app.get(fine.uuid) is not None


def test_the_blocking_face_has_it_too() -> None:
    with qtasks.QueueTasks("control-blocking", "memory://") as app:

        @app.task()
        def add(x: int, y: int) -> int:
            return x + y

        add.add_task(1, 2)
        depth = app.control_blocking(control.depths, ["default"])["default"]
        assert (depth.ready, depth.in_flight) == (1, 0)
        page = app.control_blocking(control.query, TaskQuery(queue="default"))
        assert [task.task_name for task in page.tasks] == [add.name]
        assert app.control_blocking(control.purge, "default") == 1


async def test_what_a_part_cannot_do_is_raised_where_it_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def cannot(self: MemoryStorage, query: TaskQuery) -> None:
        raise NotSupported("this storage lists nothing")

    monkeypatch.setattr(MemoryStorage, "query", cannot)
    async with QueueTasks("control-cannot", "memory://") as app:
        with pytest.raises(NotSupported, match="lists nothing"):
            await asyncio.wait_for(app.control(control.query, TaskQuery()), 120)


async def test_what_was_never_decoded_cannot_be_revived_but_dropped() -> None:
    app = QueueTasks("control-raw", "memory://")
    raw = Task(
        uuid="7d44a4a8-0d7d-5d6a-8d3c-0b7a4f5d2c11",
        task_name="",
        status="error",
        args=b"\xc1\x00",
        encoding="raw",
        error="not a message",
        dead="undecodable",
    )
    async with app:
        await app.control(save, raw)
        (outcome,) = await app.control(control.revive, [raw.uuid])
        assert outcome.status == "refused"
        assert outcome.reason == (
            f"task {raw.uuid} cannot be revived: its message was never decoded: not a message"
        )
        assert task_row(app, raw)["raw"] == b"\xc1\x00"
        assert (await app.control(control.drop, [raw.uuid]))[0].status == "done"
        assert await app.get(raw.uuid) is None


async def save(client: Client, record: Task) -> None:
    await client.storage.save([record])


def test_values_that_json_does_not_know_are_said_as_text() -> None:
    said = plain({
        1: (Decimal("1.5"), date(2030, 1, 31), b"\xff", float("nan"), 1 << 70, {2}),
        "complex": 1j,
        "delta": timedelta(seconds=90),
    })  # fmt: skip
    assert json.loads(json.dumps(said, allow_nan=False)) == {
        "1": ["1.5", "2030-01-31", "/w==", "nan", 1 << 70, [2]],
        "complex": "1j",
        "delta": "PT90S",
    }


class TakesNoLargeEnd(MemoryStorage):
    """Takes no `cancel` that has arguments; nothing is there instead."""

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        large = [task.status == "cancel" and bool(task.args) for task in tasks]
        saved = iter(await super().save([t for t, no in zip(tasks, large, strict=True) if not no]))
        return [Outcome("refused", "over 0 bytes") if no else next(saved) for no in large]


async def test_what_is_purged_ends_though_its_record_is_not_taken_with_its_arguments() -> None:
    app = QueueTasks("purged", "memory://", TakesNoLargeEnd("purged"))

    @app.task()
    async def never(text: str) -> None: ...

    async with app:
        task = await never.add_task("large")
        assert await app.control(control.purge, "default") == 1
        assert (await task.wait_result(120)).status == "cancel"

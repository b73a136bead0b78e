"""Listing records with `query`."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from qtasks_conformance.contracts.base import Contract, needs
from qtasks_conformance.contracts.delivering import assert_done
from qtasks_conformance.rig import Rig
from qtasks_core import Storage, Task, TaskQuery
from qtasks_core.errors import Refused

FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"status": ("success",)},
    {"status": ("new", "error")},
    {"status": ("process", "retry", "scheduled", "cancel")},
    {"status": ("error", "cancel")},
    {"task_name": "mails.send"},
    {"queue": "größe"},
    {"dead": True},
    {"dead": False},
    {"dead": False, "status": ("error",)},
    {"created_after": 1010.0},
    {"created_before": 1010.0},
    {"created_after": 1005.0, "created_before": 1020.0, "queue": "q", "status": ("success",)},
    {"task_name": "no.such"},
)


class QueryContract(Contract):
    """`query`, if the storage has it."""

    async def test_pages_are_stable_while_tasks_come(self, rig: Rig) -> None:
        """Pages show each existing record once, newest first, although tasks are added meanwhile.

        A record that changes meanwhile is shown with its newest state.
        """
        needs(rig.subject.storage, "query")
        storage, other = await rig.storage(), await rig.storage()
        records = [rig.record("new", created_at=1000.0 + at // 3) for at in range(25)]
        assert_done(await other.save(records))
        shown: list[Task] = []
        cursor: str | None = None
        for number in range(4):
            page = await storage.query(TaskQuery(limit=7, cursor=cursor))
            assert len(page.tasks) == (4 if number == 3 else 7)
            shown += page.tasks
            cursor = page.cursor
            assert_done(await other.save([rig.record("new", created_at=2000.0 + number)]))
            if number == 0:  # this record is on a later page
                records[0] = replace(records[0], status="success")
                assert_done(await other.save([records[0]]))
        assert cursor is None
        assert shown == sorted(records, key=place, reverse=True)

    async def test_the_last_page_has_no_cursor(self, rig: Rig) -> None:
        """The last page has no cursor, even if it is full. No records are one empty page."""
        needs(rig.subject.storage, "query")
        storage = await rig.storage()
        empty = await storage.query(TaskQuery())
        assert (empty.tasks, empty.cursor) == ([], None)
        assert_done(await storage.save([rig.record("new", created_at=float(at)) for at in (1, 2)]))
        page = await storage.query(TaskQuery(limit=2))
        assert (len(page.tasks), page.cursor) == (2, None)

    @pytest.mark.parametrize("at", range(len(FILTERS)))
    async def test_a_filter_shows_what_fits(self, rig: Rig, at: int) -> None:
        """Each filter shows exactly the records that match in their newest state."""
        needs(rig.subject.storage, "query")
        storage = await rig.storage()
        fields = FILTERS[at]
        records = self._many(rig)
        first = [replace(r, status="new", dead=None) for r in records if r.status != "scheduled"]
        assert_done(await storage.save(first))
        assert_done(await storage.save(records))
        expected = [r for r in records if fits(r, fields)]
        assert bool(expected) == (fields.get("task_name") != "no.such")
        shown = await all_pages(storage, TaskQuery(limit=4, **fields))
        assert shown == sorted(expected, key=place, reverse=True)

    @staticmethod
    def _many(rig: Rig) -> list[Task]:
        records: list[Task] = []
        for status in ("new", "scheduled", "process", "retry", "success", "error", "cancel"):
            for name, queue in (("mails.send", "q"), ("mails.send", "größe"), ("other", "q")):
                records.append(
                    rig.record(
                        status, task_name=name, queue=queue, created_at=1000.0 + len(records)
                    )
                )
                if status == "error":
                    records.append(replace(rig.record("error"), dead="no", created_at=1003.5))
        return records

    async def test_a_cursor_that_is_none_is_refused(self, rig: Rig) -> None:
        """A cursor that the storage did not make raises `Refused`."""
        needs(rig.subject.storage, "query")
        storage = await rig.storage()
        with pytest.raises(Refused):
            await storage.query(TaskQuery(cursor="no cursor"))

    async def test_lists_stay_in_their_namespace(self, rig: Rig) -> None:
        """Tasks of another app are not shown."""
        needs(rig.subject.storage, "query")
        storage = await rig.storage()
        other = await rig.storage(namespace="other" + rig.namespace)
        mine, theirs = rig.record("error", created_at=1.0), rig.record("error", created_at=1.0)
        assert_done(await storage.save([mine]))
        assert_done(await other.save([theirs]))
        for query in (TaskQuery(), TaskQuery(status=("error",))):
            assert (await storage.query(query)).tasks == [mine]
            assert (await other.query(query)).tasks == [theirs]


def place(task: Task) -> tuple[float, str]:
    """Return the sort key of lists."""
    return task.created_at, task.uuid


def fits(task: Task, fields: dict[str, Any]) -> bool:
    """Tell whether a record matches a filter, by the contract and not by the core's function."""
    for name, wanted in fields.items():
        if name == "created_after":
            fitting = task.created_at >= wanted
        elif name == "created_before":
            fitting = task.created_at < wanted
        elif name == "status":
            fitting = task.status in wanted
        elif name == "dead":
            fitting = (task.dead is not None) is wanted
        else:
            fitting = getattr(task, name) == wanted
        if not fitting:
            return False
    return True


async def all_pages(storage: Storage, query: TaskQuery) -> list[Task]:
    """Return the records of all pages."""
    shown: list[Task] = []
    while True:
        page = await storage.query(query)
        assert len(page.tasks) <= query.limit
        shown += page.tasks
        if page.cursor is None:
            return shown
        assert len(page.tasks) == query.limit
        query = replace(query, cursor=page.cursor)

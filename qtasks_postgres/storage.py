"""A storage on Postgres: the server decides on saves, and NOTIFY pushes final records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakSet

from qtasks_core import DONE, Guarantees, Inbox, Outcome, Storage, Task
from qtasks_core.errors import Closed, WireError
from qtasks_core.records import (
    FIRST_BEGUN,
    FIRST_FINAL,
    RANKS,
    judge,
    order_of,
    refused_by,
    unreadable,
)
from qtasks_core.together import together
from qtasks_core.wire import decode_task, encode_task
from qtasks_postgres.batches import LARGEST, TOO_LARGE, batches, fitting, size_of, slices
from qtasks_postgres.connection import Database, Listener, storable
from qtasks_postgres.inbox import PostgresInbox

RIGHTS = {"records": ("SELECT", "INSERT", "UPDATE", "DELETE")}

# The WHERE is `judge`, evaluated under the row's lock. Each returned row was accepted. The payload
# of a notification is limited to 8000 bytes, so a larger record is announced by its uuid. Only
# addresses of this kind of storage are notified, because an invalid channel name would be an error.
SAVE = f"""
    WITH saved AS (
        INSERT INTO qtasks.records AS stored (
            namespace, uuid, progress, execution, status, task_name, queue, created_at, dead,
            reply_to, record
        )
        SELECT $1, * FROM unnest(
            $2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::float8[],
            $9::text[], $10::text[], $11::bytea[]
        )
        ON CONFLICT (namespace, uuid) DO UPDATE SET
            progress = excluded.progress, execution = excluded.execution,
            status = excluded.status, task_name = excluded.task_name, queue = excluded.queue,
            created_at = excluded.created_at, dead = excluded.dead, reply_to = excluded.reply_to,
            record = excluded.record
        WHERE stored.record IS NULL OR (
            stored.progress & {RANKS - 1} < {FIRST_FINAL}
            AND stored.progress <= excluded.progress
            AND excluded.progress & {RANKS - 1} >= {FIRST_BEGUN}
            AND (stored.progress, stored.execution)
                IS DISTINCT FROM (excluded.progress, excluded.execution)
        )
        RETURNING uuid, progress, reply_to, watchers, record
    ), told AS (
        SELECT pg_notify(
            address,
            CASE WHEN length(record) <= 5800 THEN '=' || encode(record, 'base64')
                 ELSE '?' || uuid END
        )
        FROM saved CROSS JOIN LATERAL unnest(array_append(watchers, reply_to)) AS told (address)
        WHERE progress & {RANKS - 1} >= {FIRST_FINAL}
            AND address LIKE 'qtasks:%' AND octet_length(address) < 64
    )
    SELECT uuid FROM saved WHERE (SELECT count(*) FROM told) >= 0
"""

# LIMIT makes the server look up each uuid separately. Without it, a plan made for an empty table
# would later read the whole namespace.
GET = """
    SELECT found.uuid, found.record
    FROM unnest($2::text[]) AS asked (uuid)
    CROSS JOIN LATERAL (
        SELECT uuid, record FROM qtasks.records
        WHERE namespace = $1 AND uuid = asked.uuid
        LIMIT 1
    ) AS found
    WHERE found.record IS NOT NULL
"""

# The columns that describe a record without its bytes.
KNOWN = """
    SELECT uuid, progress AS "order", execution, task_name, queue, created_at,
        dead IS NOT NULL AS dead
    FROM qtasks.records WHERE namespace = $1 AND uuid = ANY($2::text[])
"""


class PostgresStorage(Storage):
    """Keeps records in a table. `listen_url` is as for `PostgresBroker`.

    Raises `ConfigurationError` if the URL is wrong.
    """

    driver_loggers = ("asyncpg",)

    def __init__(self, url: str, *, listen_url: str | None = None) -> None:
        self._database = Database(url, listen_url)
        self._listener = Listener(self._database)
        self._inboxes: WeakSet[PostgresInbox] = WeakSet()
        self._namespace: str | None = None

    @property
    def guarantees(self) -> Guarantees:
        durability = self._database.durability
        return Guarantees(
            part="PostgresStorage",
            server=durability.server,
            survives=durability.survives,
            durability=durability.settings,
            largest=LARGEST,
            transactions=True,
            unsupported=(
                "query", "claim", "release", "set", "get_value", "values", "watch_value",
                "append", "read", "delete", "expire",
            ),
        )  # fmt: skip

    async def start(self, namespace: str) -> None:
        await self._database.start(RIGHTS)
        try:
            await self._listener.start()
        except BaseException:
            await self._database.stop()
            raise
        self._namespace = namespace

    async def stop(self) -> None:
        await self._listener.stop()
        try:
            await together([inbox.close() for inbox in self._inboxes])
        finally:
            self._namespace = None
            await self._database.stop()

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        namespace = self._started()
        outcomes = [DONE] * len(tasks)
        for wave in waves(tasks):
            # All saves lock rows in the same order. Otherwise they could deadlock.
            places = sorted(wave, key=lambda place: tasks[place].uuid)
            saved: set[str] = set()
            large: set[int] = set()
            for batch in batches(places, lambda place: encode_task(tasks[place])):
                fit = [(tasks[place], record) for place, record in fitting(batch)]
                if not fit:
                    large.add(batch[0][0])
                    continue
                rows = await self._database.fetch(
                    SAVE, namespace, *columns_of(fit), transaction=transaction, size=size_of(fit)
                )
                saved.update(row["uuid"] for row in rows)
            others = [place for place in places if storable(tasks[place].uuid) not in saved]
            if others:
                there = await self._get([tasks[place].uuid for place in others], transaction)
                for place, record in zip(others, there, strict=True):
                    verdict = judge(tasks[place], record)
                    if place in large and verdict == "accept":
                        outcomes[place] = Outcome("refused", TOO_LARGE)
                    elif verdict != "repeat":
                        outcomes[place] = refused_by(record)
        return outcomes

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        return await self._get(uuids)

    async def _get(
        self, uuids: Sequence[str], transaction: object | None = None
    ) -> list[Task | None]:
        namespace = self._started()
        keys = [storable(uuid) for uuid in uuids]
        records: dict[str, Task] = {}
        wrong: dict[str, WireError] = {}
        for some in slices(keys):
            rows = await self._database.fetch(GET, namespace, some, transaction=transaction)
            for row in rows:
                try:
                    records[row["uuid"]] = decode_task(row["record"])
                except WireError as error:
                    wrong[row["uuid"]] = error
        if wrong:
            rows = await self._database.fetch(
                KNOWN, namespace, list(wrong), transaction=transaction
            )
            records.update(
                (row["uuid"], unreadable(error=wrong[row["uuid"]], **row)) for row in rows
            )
        return [records.get(key) for key in keys]

    async def inbox(self) -> Inbox:
        inbox = PostgresInbox(self.get, self._database, self._listener, self._started())
        await inbox.open()
        self._inboxes.add(inbox)
        return inbox

    async def clock(self) -> float | None:
        self._started()
        return await self._database.clock()

    async def migrate(self, namespace: str) -> list[str]:
        return await self._database.migrate()

    def _started(self) -> str:
        if self._namespace is None:
            raise Closed("PostgresStorage is not started")
        return self._namespace


def waves(tasks: Sequence[Task]) -> Iterator[list[int]]:
    """Yield the tasks' positions in waves, in which no uuid is repeated; earlier saves first.

    One statement can change a row only once.
    """
    left = list(range(len(tasks)))
    while left:
        seen: set[str] = set()
        wave: list[int] = []
        later: list[int] = []
        for place in left:
            uuid = tasks[place].uuid
            (later if uuid in seen else wave).append(place)
            seen.add(uuid)
        yield wave
        left = later


def progress_of(task: Task) -> int:
    """Return `order_of(task)`, limited to the range of the column for any attempt."""
    order = order_of(task)
    return max(-(1 << 62), min(order, (1 << 62) + order % RANKS))


def columns_of(batch: Sequence[tuple[Task, bytes]]) -> tuple[list[object], ...]:
    """Return the columns of records, from uuid to record, in the order of `SAVE`."""
    rows = (
        (
            storable(task.uuid),
            progress_of(task),
            storable(task.execution),
            task.status,
            storable(task.task_name),
            storable(task.queue),
            task.created_at,
            storable(task.dead) if task.dead is not None else None,
            storable(task.reply_to) if task.reply_to is not None else None,
            record,
        )
        for task, record in batch
    )
    return tuple(list(column) for column in zip(*rows, strict=True))

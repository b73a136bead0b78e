"""A storage on Postgres: the server decides on saves. NOTIFY pushes final records."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Sequence
from math import inf
from typing import Any
from weakref import WeakSet

from msgspec import UNSET, UnsetType

from qtasks_core import (
    DONE,
    Claim,
    Guarantees,
    Inbox,
    Outcome,
    ReviewedMigration,
    Storage,
    Task,
    TaskPage,
    TaskQuery,
)
from qtasks_core.errors import Closed, WireError
from qtasks_core.names import checked_id, is_text
from qtasks_core.options import checked_retention
from qtasks_core.queries import cursor_at, place_of
from qtasks_core.records import (
    FINAL,
    FIRST_BEGUN,
    FIRST_FINAL,
    RANK,
    RANKS,
    RETENTION,
    expiry_of,
    judge,
    order_of,
    refused_by,
    retention_note,
)
from qtasks_core.together import together
from qtasks_core.wire import decode_task, encode_task
from qtasks_postgres import shared
from qtasks_postgres.batches import LARGEST, TOO_LARGE, batches, fitting, size_of, slices
from qtasks_postgres.connection import BEST_SETTINGS, Database, Listener, storable
from qtasks_postgres.doorbell import RING, Doorbell
from qtasks_postgres.doorbell import columns_of as in_columns
from qtasks_postgres.inbox import ADDRESS, PostgresInbox
from qtasks_postgres.listening import Listeners
from qtasks_postgres.listing import COLUMNS as KNOWN_COLUMNS
from qtasks_postgres.listing import (
    DELETE,
    DELETED,
    EXPIRE,
    KEPT,
    OLDEST,
    UNREMARKABLE,
    found,
    looking,
    task_of,
)
from qtasks_postgres.rows import arrays, blob_at, blobs, numbers, texts
from qtasks_postgres.schema import DEFAULT

RIGHTS = dict.fromkeys(
    ("records", "expiries", "values", "claims", "streams", "items"),
    ("SELECT", "INSERT", "UPDATE", "DELETE"),
)

COLUMNS = """
    uuid, progress, execution, status, task_name, queue, created_at, dead, expires_at, remarkable,
    record
"""
GIVEN = {
    "uuid": "text", "progress": "bigint", "execution": "text", "task_name": "text", "queue": "text",
    "created_at": "float8", "dead": "text", "expires_at": "float8", "place": "int", "size": "int",
}  # fmt: skip
"""What is given for each record, and the types. A last parameter has all encoded records."""

STATUS = f"('{{{','.join(RANK)}}}'::text[])[1 + (progress & {RANKS - 1})]"
UNREMARKABLE_RANKS = ", ".join(str(RANK[status]) for status in UNREMARKABLE)

EXPIRED = "stored.expires_at <= extract(epoch FROM clock_timestamp())"

# A record keeps its first `created_at`, its place in lists.
REPLACE = f"""
    ON CONFLICT (namespace, uuid) DO UPDATE SET
        progress = excluded.progress, execution = excluded.execution,
        status = excluded.status, task_name = excluded.task_name, queue = excluded.queue,
        created_at = CASE WHEN stored.record IS NULL OR {EXPIRED} THEN excluded.created_at
                     ELSE stored.created_at END,
        dead = excluded.dead, expires_at = excluded.expires_at,
        remarkable = excluded.remarkable, record = excluded.record
    WHERE stored.record IS NULL OR {EXPIRED}
"""


def saving(first: int, *, settled: bool = False, final: bool = True) -> str:
    """Return the parts of a statement that save records. `first` is the number of the first column.

    The WHERE is `judge`, evaluated under the row's lock. Each row of `saved` was accepted. With
    `settled`, the parameter before the first column has the id of each record's message, and a
    record is only saved if `gone` has this id. Without `final`, there are no final records.
    """
    messages = f"${first - 1}" if settled else "NULL"
    saved = f"""
        saved AS (
            INSERT INTO qtasks.records AS stored (namespace, {COLUMNS})
            SELECT $1, uuid, progress, execution, {STATUS}, task_name, queue, created_at, dead,
                   expires_at,
                   CASE WHEN progress & {RANKS - 1} NOT IN ({UNREMARKABLE_RANKS}) THEN {STATUS} END,
                   {blob_at(first + len(GIVEN))}
            FROM unnest({messages}::bigint[], {arrays(first, GIVEN.values())})
                 AS given (message, {", ".join(GIVEN)})
            {"WHERE message IN (SELECT id FROM gone)" if settled else ""}
            {REPLACE} OR (
                stored.progress & {RANKS - 1} < {FIRST_FINAL}
                AND stored.progress <= excluded.progress
                AND excluded.progress & {RANKS - 1} >= {FIRST_BEGUN}
                AND (stored.progress, stored.execution)
                    IS DISTINCT FROM (excluded.progress, excluded.execution)
            )
            RETURNING uuid, expires_at, watchers
        )
    """
    if not final:
        return saved
    return f"""
        {saved}, expiring AS (
            INSERT INTO qtasks.expiries (namespace, expires_at, uuids)
            SELECT $1, max(expires_at), array_agg(uuid) FROM saved
            WHERE expires_at IS NOT NULL GROUP BY floor(expires_at)
        )
    """


SAVED = """
    (SELECT array_agg(uuid) FROM saved) AS uuids,
    (
        SELECT array_agg(ARRAY[uuid, address]) FROM saved CROSS JOIN unnest(watchers) AS address
    ) AS watchers
"""
"""What `saved` says, in one row: a row for each record would cost more to read."""

SAVE = f"WITH {saving(2)} SELECT {SAVED}"

# LIMIT makes the server look up each uuid separately. Without it, a plan made for an empty table
# would later read the whole namespace.
GET = f"""
    SELECT found.uuid, found.record
    FROM unnest($2::text::text[]) AS asked (uuid)
    CROSS JOIN LATERAL (
        SELECT uuid, record FROM qtasks.records
        WHERE namespace = $1 AND uuid = asked.uuid AND {KEPT}
        LIMIT 1
    ) AS found
    WHERE found.record IS NOT NULL
"""
BEGUN = GET.replace(KEPT, f"{KEPT} AND progress NOT IN ({RANKS}, {RANKS + 1})")
"""The other records are first records of a first attempt."""
FINALS = GET.replace(KEPT, f"{KEPT} AND progress & {RANKS - 1} >= {FIRST_FINAL}")

KNOWN = (
    f"SELECT {KNOWN_COLUMNS} FROM qtasks.records WHERE namespace = $1 AND uuid = ANY($2::text[])"
)

LONGEST_CHANNEL = 63
PUSHED = 5800
"""Bytes of the largest record that is pushed. The payload of a notification has up to 8000.

A larger record is announced by its uuid.
"""


class PostgresStorage(Storage, ReviewedMigration):
    """Keeps records in a table.

    `retention` is in seconds, None means for ever. It applies to final records without a retention.
    `listen_url` and `schema` are as for `PostgresBroker`. Raises `ConfigurationError` if an
    argument is wrong.
    """

    driver_loggers = ("asyncpg",)

    def __init__(
        self,
        url: str,
        *,
        retention: float | None = RETENTION,
        listen_url: str | None = None,
        schema: str = DEFAULT,
    ) -> None:
        self.database = Database(url, listen_url, schema)
        self._retention = checked_retention(retention)
        self._listener = Listener(self.database)
        self._doorbell = Doorbell(self.database)
        self._inboxes: WeakSet[PostgresInbox] = WeakSet()
        self._listeners = Listeners()
        self._namespace: str | None = None

    @property
    def guarantees(self) -> Guarantees:
        durability = self.database.durability
        return Guarantees(
            part="PostgresStorage",
            server=durability.server,
            survives=durability.survives,
            durability=durability.settings,
            at_best="machine crash",
            best_settings=BEST_SETTINGS,
            retention=self._retention,
            largest=LARGEST,
            transactions=True,
            notes=(retention_note(self._retention),),
        )

    async def start(self, namespace: str) -> None:
        await self.database.start(RIGHTS)
        try:
            await self._listener.start()
        except BaseException:
            await self.database.stop()
            raise
        self._namespace = namespace

    async def refresh(self) -> None:
        await self.database.refresh()

    async def stop(self) -> None:
        self._listeners.stop()
        await self._listener.stop()
        try:
            await together([inbox.close() for inbox in self._inboxes])
        finally:
            self._namespace = None
            await self.database.calls.ended()
            await self._doorbell.stop()
            await self.database.stop()

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        namespace = self.started()
        if transaction is not None:
            return await self._save(namespace, tasks, transaction)
        # If the caller is cancelled, the records that are saved must still be pushed.
        return await self.database.calls.run(self._save(namespace, tasks, None))

    async def _save(
        self, namespace: str, tasks: Sequence[Task], transaction: object | None
    ) -> list[Outcome]:
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
                (row,) = await self.database.fetch(
                    SAVE, namespace, *self.columns_of(fit), transaction=transaction,
                    size=size_of(fit),
                )  # fmt: skip
                saved.update(row["uuids"] or ())
                if transaction is None:
                    self.push(fit, row)
                elif pushes := pushes_of(fit, row):
                    await self.database.fetch(RING, *in_columns(pushes), transaction=transaction)
            others = [place for place in places if storable(tasks[place].uuid) not in saved]
            if others:
                there = await self.get_in([tasks[place].uuid for place in others], transaction)
                for place, record in zip(others, there, strict=True):
                    verdict = judge(tasks[place], record)
                    if place in large and verdict == "accept":
                        outcomes[place] = Outcome("refused", TOO_LARGE)
                    elif verdict != "repeat":
                        outcomes[place] = refused_by(record)
                    elif transaction is None:
                        self._push_again(tasks[place])
        return outcomes

    def _push_again(self, task: Task) -> None:
        """Push a record that is saved again: the first save may have got no answer."""
        row = {"uuids": [storable(task.uuid)], "watchers": ()}
        self.push([(task, encode_task(task))], row)

    def push(self, batch: Sequence[tuple[Task, bytes]], row: Any) -> None:
        """Push the final records among those that a row of `SAVED` names."""
        self._doorbell.send(pushes_of(batch, row))

    def columns_of(self, batch: Sequence[tuple[Task, bytes]]) -> tuple[str | bytes | None, ...]:
        """Return the columns of records, from uuid to record, in the order of `COLUMNS`."""
        tasks = [task for task, _ in batch]
        return (
            texts([task.uuid for task in tasks]),
            numbers(progress_of(task) for task in tasks),
            texts([task.execution for task in tasks]),
            texts([task.task_name for task in tasks]),
            texts([task.queue for task in tasks]),
            numbers(task.created_at for task in tasks),
            texts([task.dead for task in tasks]),
            numbers(expiry_of(task, self._retention) for task in tasks),
            *blobs([record for _, record in batch]),
        )

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        return await self.get_in(uuids)

    async def get_in(
        self, uuids: Sequence[str], transaction: object | None = None, statement: str = GET
    ) -> list[Task | None]:
        """Do the same as `get`, in the caller's transaction if there is one."""
        namespace = self.started()
        keys = [storable(uuid) for uuid in uuids]
        records: dict[str, Task] = {}
        wrong: list[str] = []
        for some in slices(keys):
            rows = await self.database.fetch(
                statement, namespace, texts(some), transaction=transaction
            )
            for row in rows:
                try:
                    records[row["uuid"]] = decode_task(row["record"])
                except WireError:
                    wrong.append(row["uuid"])
        if wrong:
            rows = await self.database.fetch(KNOWN, namespace, wrong, transaction=transaction)
            records.update((row["uuid"], task_of(row)) for row in rows)
        return [records.get(key) for key in keys]

    async def begun(self, uuids: Sequence[str]) -> list[Task]:
        """Return the records of these tasks, except first records of a first attempt.

        Those say no more than their messages.
        """
        found = await self.get_in(uuids, statement=BEGUN)
        return [record for record in found if record is not None]

    async def finals(self, uuids: Sequence[str]) -> list[Task | None]:
        """Return the records of these tasks that are final."""
        return await self.get_in(uuids, statement=FINALS)

    async def inbox(self) -> Inbox:
        inbox = PostgresInbox(self.finals, self.database, self._listener, self.started())
        await inbox.open()
        self._inboxes.add(inbox)
        return inbox

    async def clock(self) -> float | None:
        self.started()
        return await self.database.clock()

    async def query(self, query: TaskQuery) -> TaskPage:
        namespace = self.started()
        tasks: list[Task] = []
        last = None if query.cursor is None else place_of(query.cursor)
        more = True
        while more and len(tasks) < query.limit:
            missing = query.limit - len(tasks)
            statement, values = looking(namespace, query, last, missing)
            some, last, more = found(await self.database.fetch(statement, *values), missing)
            tasks += some
        return TaskPage(tasks, cursor_at(last) if more and last is not None else None)

    async def claim(self, key: str, owner: str, ttl: float) -> Claim | None:
        namespace = self.started()
        checked_id(key, "the key of a claim")
        checked_id(owner, "the owner of a claim")
        rows = await self.database.fetch(shared.CLAIM, namespace, key, owner, ttl)
        return Claim(key, owner, rows[0]["expires_at"]) if rows else None

    async def release(self, claim: Claim) -> None:
        await self.database.fetch(shared.RELEASE, self.started(), claim.key, claim.owner)

    async def set(
        self, key: str, value: bytes | None, expect: bytes | UnsetType | None = UNSET
    ) -> bool:
        namespace = self.started()
        statement, values = shared.setting(namespace, key, value, expect)
        if not await self.database.fetch(statement, *values):
            return False
        self._doorbell.ring([self._channel_of(key)])
        return True

    async def get_value(self, key: str) -> bytes | None:
        namespace = self.started()
        rows = await self.database.fetch(
            shared.VALUE, namespace, checked_id(key, "the key of a value")
        )
        return rows[0]["value"] if rows else None

    async def values(self, prefix: str) -> dict[str, bytes]:
        rows = await self.database.fetch(shared.VALUES, self.started(), storable(prefix))
        return {row["key"]: row["value"] for row in rows}

    async def watch_value(self, key: str) -> AsyncIterator[bytes | None]:
        self.started()
        seen: bytes | UnsetType | None = UNSET
        async with self._listeners.listening(self._listener, self._channel_of(key)) as ear:
            while True:
                ear.clear()
                value = await self.get_value(key)
                if value != seen:
                    seen = value
                    yield value
                await ear.next()

    def _channel_of(self, key: str) -> str:
        return self.database.channel_of(self.started(), f"\0value {key}")

    async def append(self, uuid: str, items: Sequence[bytes]) -> None:
        namespace = self.started()
        checked_id(uuid, "a uuid")
        if items:
            size = sum(map(len, items))
            await self.database.fetch(shared.APPEND, namespace, uuid, list(items), size=size)

    async def read(self, uuid: str, after: int) -> list[tuple[int, bytes]]:
        namespace = self.started()
        items: list[tuple[int, bytes]] = []
        while True:
            rows = await self.database.fetch(shared.READ, namespace, storable(uuid), after)
            items += [(row["position"], row["data"]) for row in rows]
            if len(rows) < shared.READ_AT_ONCE:
                return items
            after = items[-1][0]

    async def delete(self, uuids: Sequence[str]) -> int:
        namespace = self.started()
        count = 0
        for some in slices(sorted({storable(uuid) for uuid in uuids})):
            rows = await self.database.fetch(DELETE, namespace, some)
            count += rows[0]["count"]
        return count

    async def expire(self) -> int:
        namespace = self.started()
        clock = asyncio.get_running_loop().time
        count = 0
        while True:
            begun = clock()
            rows = oldest(await self.database.fetch(OLDEST, namespace))
            if not rows:
                break
            times, ids, uuids = columns(rows)
            (row,) = await self.database.fetch(EXPIRE, namespace, times, ids, uuids)
            count += row["count"]
            # Leave half of the time to tasks, and to vacuum.
            await asyncio.sleep(min(clock() - begun, 1.0))
        await self.database.fetch(shared.CLAIMS_OVER, namespace)
        await self._forget_streams(namespace)
        return count

    async def _forget_streams(self, namespace: str) -> None:
        """Delete old streams whose task has no record."""
        if self._retention == inf:
            return
        before = time.time() - self._retention
        while (
            len(await self.database.fetch(shared.STREAMS_OVER, namespace, before)) == shared.TIDIED
        ):
            pass

    async def migrate(self, namespace: str) -> list[str]:
        return await self.database.migrate()

    async def migration(self, namespace: str) -> str:
        return await self.database.migration()

    def started(self) -> str:
        """Return the namespace. Raises `Closed`."""
        if self._namespace is None:
            raise Closed("PostgresStorage is not started")
        return self._namespace


def pushes_of(batch: Sequence[tuple[Task, bytes]], row: Any) -> list[tuple[str, str]]:
    """Return the notifications of the final records among those that a row of `SAVED` names.

    Only addresses of this kind of storage are notified: another one may be no name of a channel.
    """
    told: dict[str, set[str]] = {}
    for uuid, address in row["watchers"] or ():
        told.setdefault(uuid, set()).add(address)
    saved: set[str] | None = None
    pushes: list[tuple[str, str]] = []
    for task, record in batch:
        if (task.reply_to is None and not told) or task.status not in FINAL:
            continue
        saved = set(row["uuids"] or ()) if saved is None else saved
        uuid = storable(task.uuid)
        if uuid not in saved:
            continue
        wanted = {*told.get(uuid, ()), *((task.reply_to,) if task.reply_to is not None else ())}
        addresses = [address for address in wanted if is_address(address)]
        if addresses:
            small = len(record) <= PUSHED
            payload = f"={b64encode(record).decode()}" if small else f"?{uuid}"
            pushes += [(address, payload) for address in addresses]
    return pushes


def is_address(text: str) -> bool:
    """Say whether this is the address of an inbox of this kind of storage."""
    return text.startswith(ADDRESS) and len(text.encode()) <= LONGEST_CHANNEL and is_text(text)


def oldest(rows: Sequence[Any]) -> Sequence[Any]:
    """Return the first of these rows of `expiries`, with not much more than `DELETED` uuids."""
    count = 0
    for at, row in enumerate(rows):
        if count >= DELETED:
            return rows[:at]
        count += len(row["uuids"])
    return rows


def columns(rows: Sequence[Any]) -> tuple[list[float], list[int], list[str]]:
    """Return times, ids and uuids of rows of `expiries`, column by column."""
    uuids = sorted({uuid for row in rows for uuid in row["uuids"]})
    return [row["expires_at"] for row in rows], [row["id"] for row in rows], uuids


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
    if -_MOST <= order <= _MOST:
        return order
    return max(-_MOST, min(order, _MOST + order % RANKS))


_MOST = 1 << 62

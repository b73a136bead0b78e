"""The database schema as numbered steps, and how to apply them safely.

All apps share one set of tables. The column `namespace` tells them apart, and it comes first in
every index. With one schema per namespace, apps would be separated a little better. But each app
would need the right to create schemas. Each migration would run once per app. The server would
cache every statement once per app.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtasks_core.errors import ConfigurationError

if TYPE_CHECKING:
    from asyncpg import Connection

LOCK = 0x7174_6173_6B73
"""The advisory lock that lets one client at a time change the schema ("qtasks" in ASCII)."""

# `wake_at` is a message's complete state. NULL means that it was published without a delay and was
# never received. Otherwise it is the time from which the message may be received: when its delay or
# its lease finishes, or when it was released. Each partial index covers one of the two cases. So a
# backlog does not slow down delayed messages, and delayed messages do not slow down a backlog. New
# entries are at the end of both indexes: see `floors`. `delivery` counts the deliveries and is half
# of the fence.
#
# Every message is deleted soon, and a receiver scans the index entries of deleted rows until they
# are vacuumed. So vacuum starts after a fixed number of dead rows, not after a share of the table.
# It does not pause. Half-empty pages keep the new version of a leased row beside the old one.
#
# A new version of a record changes no indexed column. So if its page has room, it needs no new
# index entry. `progress` is `qtasks_core.records.order_of`. The other columns repeat values of
# `record` that queries filter by. A row without a record only holds `watchers`: the inboxes that
# asked for a task before its first save.
STEPS = (
    """
    CREATE TABLE qtasks.messages (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        wake_at timestamptz,
        delivery integer NOT NULL DEFAULT 0,
        priority smallint NOT NULL,
        namespace text COLLATE "C" NOT NULL,
        queue text COLLATE "C" NOT NULL,
        body bytea NOT NULL
    ) WITH (
        fillfactor = 60,
        autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_threshold = 20000,
        autovacuum_vacuum_cost_delay = 0,
        toast.autovacuum_vacuum_scale_factor = 0,
        toast.autovacuum_vacuum_threshold = 20000,
        toast.autovacuum_vacuum_cost_delay = 0
    );
    CREATE INDEX messages_ready ON qtasks.messages (namespace, queue, priority, id)
        WHERE wake_at IS NULL;
    CREATE INDEX messages_waiting ON qtasks.messages (namespace, queue, wake_at)
        WHERE wake_at IS NOT NULL;

    CREATE TABLE qtasks.records (
        progress bigint NOT NULL,
        created_at double precision NOT NULL,
        namespace text COLLATE "C" NOT NULL,
        uuid text COLLATE "C" NOT NULL,
        execution text COLLATE "C",
        status text COLLATE "C",
        task_name text COLLATE "C",
        queue text COLLATE "C",
        dead text COLLATE "C",
        reply_to text,
        watchers text[],
        record bytea,
        PRIMARY KEY (namespace, uuid)
    ) WITH (
        fillfactor = 60,
        autovacuum_vacuum_scale_factor = 0.05,
        autovacuum_vacuum_cost_delay = 0,
        toast.autovacuum_vacuum_scale_factor = 0.05,
        toast.autovacuum_vacuum_cost_delay = 0
    );
    """,
    """
    DROP INDEX qtasks.messages_waiting;
    CREATE INDEX messages_due ON qtasks.messages (namespace, queue, priority, wake_at)
        WHERE wake_at IS NOT NULL;

    CREATE TABLE qtasks.floors (
        ready bigint NOT NULL,
        due timestamptz NOT NULL,
        priority smallint NOT NULL,
        namespace text COLLATE "C" NOT NULL,
        queue text COLLATE "C" NOT NULL,
        PRIMARY KEY (namespace, queue, priority)
    ) WITH (fillfactor = 60);
    """,
)
VERSION = len(STEPS)


async def ensure_schema(connection: Connection) -> list[str]:
    """Create or update the tables. Return the changes, in words.

    If the tables are up to date, this does nothing and needs no rights.

    Raises `ConfigurationError` if a newer release has changed the schema.
    """
    if await _version(connection) == VERSION:
        return []
    # Inside a caller's open transaction, this is a savepoint.
    async with connection.transaction():
        await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK)
        found = await _version(connection)
        if found > VERSION:
            raise ConfigurationError(
                f"the schema qtasks has version {found}, this release knows up to {VERSION}: "
                "upgrade qtasks here, or use another database"
            )
        if found == 0:
            await connection.execute("CREATE SCHEMA IF NOT EXISTS qtasks")
            await connection.execute("CREATE TABLE qtasks.version (version integer NOT NULL)")
            await connection.execute("INSERT INTO qtasks.version VALUES (0)")
        for step in STEPS[found:]:
            await connection.execute(step)
        await connection.execute("UPDATE qtasks.version SET version = $1", VERSION)
    if found == VERSION:
        return []  # another client did it while this one waited for the lock
    if found == 0:
        return [f"the schema qtasks created, now has version {VERSION}"]
    return [f"the schema qtasks updated from version {found} to {VERSION}"]


async def _version(connection: Connection) -> int:
    """Return the version of the schema in the database, 0 if it does not exist."""
    # to_regclass would use the session's cache, which waiting for a lock does not refresh.
    there = await connection.fetchval(
        "SELECT true FROM pg_tables WHERE schemaname = 'qtasks' AND tablename = 'version'"
    )
    if not there:
        return 0
    version: int = await connection.fetchval("SELECT version FROM qtasks.version")
    return version

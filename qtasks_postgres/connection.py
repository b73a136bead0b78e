"""The connections to Postgres: a small pool for statements, and one connection that listens."""

from __future__ import annotations

import asyncio
import re
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Hashable,
    Iterable,
    Mapping,
    Sequence,
    Set,
)
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar
from uuid import uuid4

from qtasks_core.drivers import importing_driver
from qtasks_core.errors import (
    Closed,
    ConfigurationError,
    ServerTooOld,
    Unavailable,
)
from qtasks_core.options import Kind
from qtasks_postgres.callers import callers_connection
from qtasks_postgres.errors import (
    NO_TLS,
    PASSING,
    leads_elsewhere,
    translated,
    translated_at_start,
)
from qtasks_postgres.options import Options, options_of
from qtasks_postgres.schema import (
    DEFAULT,
    LOCK,
    VERSION,
    ensure_schema,
    named,
    steps_from,
    version_of,
)

if TYPE_CHECKING:
    from asyncpg import Connection

T = TypeVar("T")

TIMEOUT = 5.0
"""Seconds after which a server that does not answer counts as unreachable."""

MIGRATION = 3600.0
"""Seconds for `migrate`, which may have to build an index of a large table."""

SLOWEST = 2 * 1024 * 1024
"""Bytes a second that every server can write. Large statements get a longer timeout accordingly."""

OLDEST = 12
"""The oldest supported major version. Older versions have had no fixes for years."""

CONNECTIONS = 4
"""The most connections of one pool. Calls come in batches, so a few serve many tasks."""

SCHEMA_PATTERN = re.compile(r"(?!pg_)[a-z_][a-z0-9_]{0,62}")
SCHEMA_NAME = Kind(
    "a name of 1 to 63 of the characters a-z, 0-9 and _, and not start with a digit or pg_",
    lambda name: isinstance(name, str) and SCHEMA_PATTERN.fullmatch(name) is not None,
)

# All statements find their rows by an index, and none is worth compiling (JIT). These settings are
# sent after connecting. Connection poolers refuse a client that sends them while it connects.
SETTINGS = {
    "default_transaction_isolation": "read committed",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
}

SET = ", ".join(f"set_config('{name}', '{value}', $1)" for name, value in SETTINGS.items())
SET_UP = f"""
    SELECT pg_backend_pid() AS pid,
           pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on' AS elsewhere,
           {SET}
"""
SET_LOCALLY = "; ".join(
    f"SET LOCAL {name} = '{value}'"
    for name, value in SETTINGS.items()
    if not name.startswith("default_")
)
READ_ONLY = f"the server is read-only or in recovery ({PASSING['25006']})"
ELSEWHERE = "SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on'"


class Durability(NamedTuple):
    """The durability of a commit, according to the server's settings."""

    survives: Literal["client crash", "server crash", "machine crash"] = "client crash"
    settings: str = "known once started"
    server: str = "PostgreSQL"


class Calls:
    """Lets every call finish, even if its caller is cancelled.

    Cancelling a statement costs its connection, and its outcome stays unknown anyway. So the
    statement keeps running, but not longer than its timeout.
    """

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], Set[Hashable]] = {}

    async def run(self, call: Coroutine[Any, Any, T], keys: Set[Hashable] = frozenset()) -> T:
        """Return the result of `call`. `keys` identify the call for `others`."""
        running = asyncio.create_task(call)
        self._running[running] = keys
        running.add_done_callback(self._end)
        return await asyncio.shield(running)

    def _end(self, running: asyncio.Task[Any]) -> None:
        del self._running[running]
        if not running.cancelled():
            running.exception()  # mark it as retrieved: the caller may have left

    async def others(self, keys: Set[Hashable]) -> None:
        """Wait until no call with one of these keys is running."""
        while others := [call for call, its in self._running.items() if not keys.isdisjoint(its)]:
            await asyncio.wait(others)

    async def ended(self) -> None:
        """Wait until no call is running."""
        if self._running:
            await asyncio.wait(tuple(self._running))


class Database:
    """Runs single statements, each in its own transaction, on a few pooled connections.

    The driver's own pool waits for a connection whose statement timed out. This pool drops such a
    connection together with all idle ones. So a dead server costs one timeout, not one per
    connection.

    Behind a connection pooler (PgBouncer), each transaction may run on another server connection.
    So in that case nothing is kept on a connection: no prepared statements, no settings.
    """

    def __init__(self, url: str, listen_url: str | None = None, schema: str = DEFAULT) -> None:
        self._options = options_of(url)
        self._listening = self._options if listen_url is None else options_of(listen_url)
        self.schema = SCHEMA_NAME.checked("schema", schema)
        self.shown = self._options.shown
        self.place = self._options.url, self.schema
        """What a broker and a storage have in common if they can share a transaction."""
        self.durability = Durability()
        self.calls = Calls()
        self.pooled = False
        """Whether a connection pooler is between us and the server. Known after `start`."""
        self.left: set[Callable[[], None]] = set()
        """Callbacks that drop the other connections to a server that must not be used any more."""
        self._named: dict[str, str] = {}
        """The statements for the tables of another schema than the usual one."""
        self._idle: list[Connection] = []
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._open = False

    async def start(self, needs: Mapping[str, Collection[str]]) -> None:
        """Connect, create or update the tables, and read the server's durability.

        `needs` are the required rights on tables. Raises `Unavailable`, `ConfigurationError`,
        `MissingDriver`, `ServerTooOld`.
        """
        self._open = True
        try:
            self.durability, _ = await self.calls.run(self._prepare(needs))
        except BaseException:
            await self.stop()
            raise

    async def migrate(self) -> list[str]:
        """Create or update the tables on a separate connection. Return the changes.

        Raises the same errors as `start`.
        """
        _, changed = await self.calls.run(self._prepare({}, MIGRATION))
        return changed

    async def migration(self) -> str:
        """Return what `migrate` would do, as a script. Raises the same errors as `start`."""
        found, statements = await self.calls.run(self._missing())
        if not statements:
            return ""
        return "\n\n".join(
            (
                f"-- The schema {self.schema} from version {found} to {VERSION}.",
                f"BEGIN;\nSELECT pg_advisory_xact_lock({LOCK});",
                *statements,
                "COMMIT;\n",
            )
        )

    async def stop(self) -> None:
        """Close all connections. Idempotent."""
        self._open = False
        await self.calls.ended()
        idle, self._idle = self._idle, []
        async with asyncio.TaskGroup() as group:
            for connection in idle:
                group.create_task(close_gently(connection))

    async def fetch(
        self,
        sql: str,
        *arguments: Any,
        transaction: object | None = None,
        size: int = 0,
    ) -> list[Any]:
        """Run a statement and return its rows. If `transaction` is given, run in that transaction.

        `size` is the number of bytes it sends, if they are many. Raises `Unavailable`.
        """
        sql = self.named(sql)
        if transaction is not None:
            with self.translated():
                connection = await callers_connection(transaction)
                return await connection.fetch(sql, *arguments)
        return await self.calls.run(self._fetch(sql, arguments, TIMEOUT + size / SLOWEST))

    def named(self, sql: str) -> str:
        """Return a statement for the tables of this schema."""
        if self.schema == DEFAULT:
            return sql
        if sql not in self._named:
            self._named[sql] = named(sql, self.schema)
        return self._named[sql]

    def channel_of(self, namespace: str, name: str) -> str:
        """Return the channel of a queue, or of something else with a name that no queue has."""
        return channel_of(
            namespace if self.schema == DEFAULT else f"{self.schema}\0{namespace}", name
        )

    async def refresh(self) -> None:
        """Read the server's durability again. Raises `Unavailable`."""
        (row,) = await self.fetch(DURABILITY)
        self.durability = durability_of(row)

    async def clock(self) -> float:
        """Return the server's Unix time, in seconds."""
        (row,) = await self.fetch("SELECT extract(epoch FROM clock_timestamp())::float8")
        return float(row[0])

    async def connect(self) -> Connection:
        """Open a connection that listens. The caller owns it. Raises `Unavailable`."""
        with self.translated():
            async with asyncio.timeout(TIMEOUT):
                return await self._connect(self._listening)

    @property
    def told_directly(self) -> bool:
        """Whether notifications come from the same server that runs the statements."""
        return not self.pooled and self._listening is self._options

    def translated(self) -> AbstractContextManager[None]:
        """Translate the driver's errors into those of the contracts. Others pass unchanged."""
        return translated(self.shown, TIMEOUT)

    def leave(self) -> None:
        """Drop all connections: the server is the wrong one now, or it serves no more."""
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.terminate()
        for leaving in tuple(self.left):
            leaving()

    async def _fetch(self, sql: str, arguments: Sequence[Any], within: float) -> list[Any]:
        """Run a statement on a connection. Drop the connection if the statement is interrupted."""
        from asyncpg import PostgresError

        if not self._open:
            raise Closed("not started, or stopped")
        with translated(self.shown, within):
            try:
                async with asyncio.timeout(within), self._slots:
                    connection = await self._take()
                    try:
                        rows = await self._run(connection, sql, arguments)
                    except PostgresError as error:
                        if leads_elsewhere(error):
                            connection.terminate()
                            self.leave()
                        else:
                            self._give_back(connection)
                        raise
                    except BaseException:
                        connection.terminate()
                        raise
                    self._give_back(connection)
                    return rows
            except (OSError, TimeoutError):
                idle, self._idle = self._idle, []
                for connection in idle:
                    connection.terminate()
                raise

    async def _run(self, connection: Connection, sql: str, arguments: Sequence[Any]) -> list[Any]:
        if not self.pooled:
            return await connection.fetch(sql, *arguments)
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(SET_LOCALLY)
            return await connection.fetch(sql, *arguments)

    async def _prepare(
        self, needs: Mapping[str, Collection[str]], within: float = TIMEOUT
    ) -> tuple[Durability, list[str]]:
        """Do all work of a start in one transaction, on a connection that is then closed.

        Returns the server's durability, and the changes to the schema.

        A pooler is recognised by the process ids that it gives its clients. They are not the
        server's.
        """
        with importing_driver("postgresql://", ".[postgres]"):
            import asyncpg  # noqa: F401
        with translated(self.shown, within):
            async with asyncio.timeout(within):
                async with asyncio.timeout(TIMEOUT):  # only connecting; a migration may last longer
                    connection = await self._open_connection(self._options, cache=False)
                try:
                    async with connection.transaction(isolation="read_committed"):
                        (row,) = await connection.fetch(SET_UP, True)
                        self._check_place(row)
                        self.pooled = row["pid"] != connection.get_server_pid()
                        version = connection.get_server_version()
                        if version.major < OLDEST:
                            raise ServerTooOld(
                                f"{self.shown} is PostgreSQL {version.major}; qtasks needs {OLDEST}"
                                " or newer"
                            )
                        changed = await ensure_schema(connection, self.schema)
                        await self._check_rights(connection, needs)
                        durability = durability_of(await connection.fetchrow(DURABILITY))
                except BaseException:
                    connection.terminate()
                    raise
                await close_gently(connection)
                return durability, changed

    async def _missing(self) -> tuple[int, list[str]]:
        """Return the version of the schema, and the statements that it lacks."""
        with importing_driver("postgresql://", ".[postgres]"):
            import asyncpg  # noqa: F401
        with self.translated():
            async with asyncio.timeout(TIMEOUT):
                connection = await self._open_connection(self._options, cache=False)
                try:
                    found = await version_of(connection, self.schema)
                except BaseException:
                    connection.terminate()
                    raise
                await close_gently(connection)
        return found, steps_from(found, self.schema)

    def _check_place(self, row: Any) -> None:
        if row["elsewhere"]:
            raise Unavailable(f"{self.shown}: {READ_ONLY}")

    async def _check_rights(
        self, connection: Connection, needs: Mapping[str, Collection[str]]
    ) -> None:
        tables = [table for table, rights in needs.items() for _ in rights]
        rights = [right for table in needs for right in needs[table]]
        rows = await connection.fetch(
            "SELECT name, right_ FROM unnest($1::text[], $2::text[]) AS needed (name, right_)"
            " WHERE NOT has_table_privilege(format('%I.%I', $3::text, name), right_)",
            tables, rights, self.schema,
        )  # fmt: skip
        if rows:
            missing = ", ".join(f"{row['right_']} on {self.schema}.{row['name']}" for row in rows)
            raise ConfigurationError(f"{self.shown}: the user lacks {missing}: GRANT it")

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return await self._connect(self._options)

    def _give_back(self, connection: Connection) -> None:
        if self._open and not connection.is_closed():
            self._idle.append(connection)
        else:
            connection.terminate()

    async def _connect(self, options: Options) -> Connection:
        """Open a connection and set it up. Raises `Unavailable` if the server is read-only."""
        pooled = self.pooled and options is self._options
        connection = await self._open_connection(options, cache=not pooled)
        try:
            if pooled:
                async with connection.transaction():
                    self._check_place(await connection.fetchrow(SET_UP, True))
            else:
                self._check_place(await connection.fetchrow(SET_UP, False))
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def _open_connection(self, options: Options, *, cache: bool) -> Connection:
        import asyncpg

        more: dict[str, Any] = {} if cache else {"statement_cache_size": 0}
        if options.several_hosts:
            more["target_session_attrs"] = "read-write"
        connect = partial(
            asyncpg.connect,
            options.url,
            timeout=options.connect_timeout or 60,
            server_settings={"application_name": options.application_name},
            **more,
        )
        with translated_at_start(options.shown, TIMEOUT):
            try:
                return await connect()
            except ConnectionError as error:
                if NO_TLS not in str(error):
                    raise
            # A server that dies just then sends its last words behind its answer, and the driver
            # takes both together for a refusal of TLS. The second answer counts.
            return await connect()


class Listener:
    """One connection that listens to channels for all callers, and tells them when it broke.

    A callback gets the payload. It gets None if notifications may have been missed; then its owner
    must read the tables. Read after `ensure` has returned: from then on, every change brings a
    notification.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._callbacks: dict[str, set[Callable[[str | None], None]]] = {}
        self._connection: Connection | None = None
        self._listening: set[str] = set()
        self._busy = asyncio.Lock()
        self._open = False

    async def start(self) -> None:
        """Allow connecting. The first `listen` makes the connection.

        Raises `ConfigurationError` if notifications do not come through a connection pooler.
        """
        self._open = True
        self._database.left.add(self._leave)
        if not self._database.told_directly:
            try:
                await self._prove()
            except BaseException:
                await self.stop()
                raise

    async def listen(self, channels: Iterable[str], callback: Callable[[str | None], None]) -> None:
        """Call `callback` with each new notification on `channels`. Raises `Unavailable`."""
        channels = list(channels)
        for channel in channels:
            self._callbacks.setdefault(channel, set()).add(callback)
        try:
            await self.ensure()
        except BaseException:
            self._remove(channels, callback)
            raise

    async def forget(self, channels: Iterable[str], callback: Callable[[str | None], None]) -> None:
        """Stop calling `callback`."""
        if self._remove(channels, callback):
            # A broken connection listens to nothing any more.
            with suppress(Unavailable):
                await self._database.calls.run(self._unlisten())

    async def ensure(self) -> None:
        """Connect if not connected, and listen to every requested channel.

        Raises `Unavailable`, and `Closed` after `stop`.
        """
        if not self._open:
            raise Closed("stopped")
        if self._connected() is None or self._unheard():
            await self._database.calls.run(self._listen())

    async def ping(self) -> None:
        """Check that the server still answers. Raises `Unavailable`."""
        await self._database.calls.run(self._ping())

    async def stop(self) -> None:
        """Close the connection. Idempotent."""
        self._open = False
        self._database.left.discard(self._leave)
        self._callbacks.clear()
        await self._database.calls.ended()
        connection, self._connection = self._connection, None
        if connection is not None:
            await close_gently(connection)

    async def _prove(self) -> None:
        """Send one notification from the pool, and check that it arrives here."""
        channel, heard = f"qtasks:proof:{uuid4().hex}", asyncio.Event()

        def hear(payload: str | None) -> None:
            if payload is not None:
                heard.set()

        await self.listen([channel], hear)
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._database.fetch("SELECT pg_notify($1, '')", channel)
                await heard.wait()
        except TimeoutError:
            raise ConfigurationError(
                f"{self._database.shown}: no notification comes through: a connection pooler in"
                " transaction mode has none (set listen_url= to the same database of the server"
                " itself, or pool_mode = session)"
            ) from None
        await self.forget([channel], hear)

    async def _listen(self) -> None:
        async with self._using() as connection:
            if connection is None:
                connection = await self._database.connect()
                connection.add_termination_listener(self._lost)
                self._connection = connection
                self._listening.clear()
            for channel in self._unheard():
                await connection.add_listener(channel, self._heard)
                self._listening.add(channel)

    async def _unlisten(self) -> None:
        async with self._using() as connection:
            for channel in tuple(self._listening):
                # A channel may be requested again while the server answers for another one. And
                # who requests this one while the server answers for it must listen to it again.
                if channel not in self._callbacks:
                    self._listening.discard(channel)
                    if connection is not None:
                        await connection.remove_listener(channel, self._heard)

    async def _ping(self) -> None:
        async with self._using() as connection:
            if connection is not None and await connection.fetchval(ELSEWHERE):
                self._database.leave()
                raise Unavailable(f"{self._database.shown}: {READ_ONLY}")

    @asynccontextmanager
    async def _using(self) -> AsyncIterator[Connection | None]:
        """Lend the connection to one caller at a time. Drop it if the caller fails."""
        with self._database.translated():
            async with asyncio.timeout(TIMEOUT), self._busy:
                try:
                    yield self._connected()
                except BaseException:
                    self._drop()
                    raise

    def _connected(self) -> Connection | None:
        if self._connection is not None and self._connection.is_closed():
            self._connection = None
        return self._connection

    def _leave(self) -> None:
        """Drop the connection, and tell all callbacks that they may have missed something."""
        if self._connection is not None:
            self._drop()
            self._tell_all()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _remove(self, channels: Iterable[str], callback: Callable[[str | None], None]) -> bool:
        """Remove `callback` from `channels`. Return whether a channel has no callback any more."""
        emptied = False
        for channel in channels:
            callbacks = self._callbacks.get(channel, set())
            callbacks.discard(callback)
            if not callbacks:
                emptied |= self._callbacks.pop(channel, None) is not None
        return emptied

    def _unheard(self) -> list[str]:
        return [channel for channel in self._callbacks if channel not in self._listening]

    def _heard(self, connection: object, pid: int, channel: str, payload: object) -> None:
        for callback in tuple(self._callbacks.get(channel, ())):
            callback(str(payload))

    def _lost(self, connection: object) -> None:
        if self._connection is connection:
            self._connection = None
        self._tell_all()

    def _tell_all(self) -> None:
        for callbacks in tuple(self._callbacks.values()):
            for callback in tuple(callbacks):
                callback(None)


def channel_of(namespace: str, queue: str) -> str:
    """Return the channel of a queue's doorbell: a digest, because names are cut at 63 bytes."""
    return "qtasks:" + sha256(f"{namespace}\0{queue}".encode()).hexdigest()[:40]


def storable(text: str) -> str:
    """Return `text` with U+FFFD for NUL, the one character that Postgres cannot store."""
    return text.replace("\0", "\ufffd")


BEST_SETTINGS = "fsync=on, synchronous_commit=on, full_page_writes=on"
"""With these, a commit survives a crash of the machine. They are the server's defaults."""


DURABILITY = """
    SELECT current_setting('fsync') AS fsync,
           current_setting('synchronous_commit') AS synchronous_commit,
           current_setting('full_page_writes') AS full_page_writes,
           current_setting('server_version_num')::int AS version
"""


def durability_of(row: Any) -> Durability:
    """Return what a commit survives, and the settings that decide it."""
    settings = {name: row[name] for name in ("fsync", "synchronous_commit", "full_page_writes")}
    survives: Literal["client crash", "server crash", "machine crash"] = "machine crash"
    if settings["fsync"] != "on" or settings["full_page_writes"] != "on":
        survives = "server crash"
    if settings["synchronous_commit"] == "off":
        survives = "client crash"
    major, minor = divmod(row["version"], 10_000)
    return Durability(
        survives,
        ", ".join(f"{name}={value}" for name, value in settings.items()),
        f"PostgreSQL {major}.{minor}",
    )


async def close_gently(connection: Connection) -> None:
    """Close a connection, even if its server is frozen or gone. Waits for at most a second."""
    from asyncpg import InterfaceError, InternalClientError, PostgresError

    try:
        await connection.close(timeout=1.0)
    except (OSError, TimeoutError, PostgresError, InterfaceError, InternalClientError):
        connection.terminate()

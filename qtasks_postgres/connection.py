"""What Postgres parts connect by: a small pool for statements, and one connection that listens."""

from __future__ import annotations

import asyncio
import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
    Iterable,
    Iterator,
    Set,
)
from contextlib import asynccontextmanager, contextmanager, suppress
from hashlib import sha256
from ssl import SSLCertVerificationError
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from qtasks_core.errors import (
    Closed,
    ConfigurationError,
    MissingDriver,
    ServerTooOld,
    Unavailable,
)
from qtasks_core.urls import redact, split
from qtasks_postgres.schema import ensure_schema

if TYPE_CHECKING:
    from asyncpg import Connection

T = TypeVar("T")

TIMEOUT = 5.0
"""Seconds after which a server that does not answer counts as unreachable."""

OLDEST = 12
"""The oldest major version of the server. Older ones have had no fixes for years."""

CONNECTIONS = 4
"""The most connections of one pool. Calls come in batches, so a few serve many tasks."""

# Statements find their rows by indexes, and none is worth compiling.
SETTINGS = {
    "application_name": "qtasks",
    "default_transaction_isolation": "read committed",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
}


class Durability(NamedTuple):
    """What the server's settings say of a commit."""

    survives: Literal["client crash", "server crash", "machine crash"] = "client crash"
    settings: str = "known once started"
    server: str = "PostgreSQL"


class Calls:
    """Runs calls to their end, also when whoever waits for one is cancelled.

    A statement that is broken off costs its connection, and whether it took effect is open either
    way; so it is left to run, for no longer than its timeout.
    """

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], Set[Hashable]] = {}

    async def run(self, call: Coroutine[Any, Any, T], keys: Set[Hashable] = frozenset()) -> T:
        """Return what `call` returns; `keys` are for `others`."""
        running = asyncio.create_task(call)
        self._running[running] = keys
        running.add_done_callback(self._end)
        return await asyncio.shield(running)

    def _end(self, running: asyncio.Task[Any]) -> None:
        del self._running[running]
        if not running.cancelled():
            running.exception()  # asked for here, since whoever waited may have left

    async def others(self, keys: Set[Hashable]) -> None:
        """Wait until no call is running that has one of these keys."""
        while others := [call for call, its in self._running.items() if not keys.isdisjoint(its)]:
            await asyncio.wait(others)

    async def ended(self) -> None:
        """Wait until no call is running."""
        if self._running:
            await asyncio.wait(tuple(self._running))


class Database:
    """Runs single statements, each as its own transaction, on a few pooled connections.

    The driver's own pool waits for a connection whose statement timed out; here such a connection
    is dropped, and all idle ones with it, so that a dead server costs one timeout and not one a
    connection.
    """

    def __init__(self, url: str) -> None:
        split(url)
        self.url = url
        self.shown = redact(url)
        self.durability = Durability()
        self.calls = Calls()
        self._idle: list[Connection] = []
        self._slots = asyncio.Semaphore(CONNECTIONS)
        self._open = False

    async def start(self) -> None:
        """Connect, create what is missing and read the server's durability.

        Raises `Unavailable`, `ConfigurationError`, `MissingDriver`, `ServerTooOld`.
        """
        load_driver()
        self._open = True
        try:
            self.durability = await self.calls.run(self._with_connection(self._prepare))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Close all connections. Idempotent."""
        self._open = False
        await self.calls.ended()
        idle, self._idle = self._idle, []
        async with asyncio.TaskGroup() as group:
            for connection in idle:
                group.create_task(close_gently(connection))

    async def fetch(
        self, sql: str, *arguments: Any, transaction: object | None = None
    ) -> list[Any]:
        """Run a statement and return its rows; in the caller's transaction where there is one.

        Raises `Unavailable`.
        """
        if transaction is not None:
            connection = callers_connection(transaction)
            with self.translated():
                return await connection.fetch(sql, *arguments)
        return await self.calls.run(
            self._with_connection(lambda connection: connection.fetch(sql, *arguments))
        )

    async def connect(self) -> Connection:
        """Open a connection outside the pool, for the caller to keep. Raises `Unavailable`."""
        with self.translated():
            async with asyncio.timeout(TIMEOUT):
                return await self._connect()

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the driver's errors into those of the contracts; let the others pass."""
        from asyncpg import exceptions as pg

        try:
            yield
        except Unavailable:
            raise
        except (
            SSLCertVerificationError,
            pg.ClientConfigurationError,
            pg.InvalidAuthorizationSpecificationError,
            pg.InvalidCatalogNameError,
            pg.InsufficientPrivilegeError,
            pg.UndefinedTableError,
            pg.InvalidSchemaNameError,
        ) as error:
            raise ConfigurationError(f"{self.shown}: {error}{advice(error)}") from error
        except (
            OSError,
            TimeoutError,
            pg.PostgresConnectionError,
            pg.OperatorInterventionError,
            pg.InsufficientResourcesError,
            pg.TransactionRollbackError,
            pg.ReadOnlySQLTransactionError,
            # No host of the URL will do, or a farewell of the server's came before the statement.
            pg.InternalClientError,
        ) as error:
            what = str(error) or f"no answer within {TIMEOUT:g} s"
            raise Unavailable(f"{self.shown}: {what}") from error

    async def _with_connection(self, work: Callable[[Connection], Awaitable[T]]) -> T:
        """Do `work` on a connection. One left in the middle of a statement is dropped."""
        from asyncpg import PostgresError

        if not self._open:
            raise Closed("not started, or stopped")
        with self.translated():
            try:
                async with asyncio.timeout(TIMEOUT), self._slots:
                    connection = await self._take()
                    try:
                        result = await work(connection)
                    except PostgresError:
                        self._give_back(connection)
                        raise
                    except BaseException:
                        connection.terminate()
                        raise
                    self._give_back(connection)
                    return result
            except (OSError, TimeoutError):
                idle, self._idle = self._idle, []
                for connection in idle:
                    connection.terminate()
                raise

    async def _prepare(self, connection: Connection) -> Durability:
        version = connection.get_server_version()
        if version.major < OLDEST:
            raise ServerTooOld(
                f"{self.shown} is PostgreSQL {version.major}; qtasks needs {OLDEST} or newer"
            )
        await ensure_schema(connection)
        return await read_durability(connection)

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return await self._connect()

    def _give_back(self, connection: Connection) -> None:
        if self._open and not connection.is_closed():
            self._idle.append(connection)
        else:
            connection.terminate()

    async def _connect(self) -> Connection:
        import asyncpg
        from asyncpg import exceptions as pg

        try:
            return await asyncpg.connect(self.url, server_settings=SETTINGS)
        except (
            ValueError,
            # What the URL says beside the options of the driver is taken for a server's setting.
            pg.UndefinedObjectError,
            pg.InvalidParameterValueError,
            pg.CantChangeRuntimeParamError,
        ) as error:
            raise ConfigurationError(f"{self.shown}: {error}") from None


class Listener:
    """One connection that listens to channels for all who ask, and says when it was broken.

    A callback gets the payload, or None when notifications may have been missed: its owner must
    look for itself. What is read after `ensure` returned is not older than what is heard.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._callbacks: dict[str, set[Callable[[str | None], None]]] = {}
        self._connection: Connection | None = None
        self._listening: set[str] = set()
        self._busy = asyncio.Lock()
        self._open = False

    def start(self) -> None:
        """Allow connecting; the connection is made when somebody listens."""
        self._open = True

    async def listen(self, channels: Iterable[str], callback: Callable[[str | None], None]) -> None:
        """Call `callback` with what is sent to `channels` from now on. Raises `Unavailable`."""
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
            # A broken connection has forgotten its channels already.
            with suppress(Unavailable):
                await self._database.calls.run(self._unlisten())

    async def ensure(self) -> None:
        """Connect unless connected, and listen to every channel asked for.

        Raises `Unavailable`, and `Closed` once stopped.
        """
        if not self._open:
            raise Closed("stopped")
        if self._connected() is None or self._unheard():
            await self._database.calls.run(self._listen())

    async def ping(self) -> None:
        """Find out whether the server still answers. Raises `Unavailable`."""
        await self._database.calls.run(self._ping())

    async def stop(self) -> None:
        """Close the connection. Idempotent."""
        self._open = False
        self._callbacks.clear()
        await self._database.calls.ended()
        connection, self._connection = self._connection, None
        if connection is not None:
            await close_gently(connection)

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
            for channel in self._listening - self._callbacks.keys():
                if connection is not None:
                    await connection.remove_listener(channel, self._heard)
                self._listening.discard(channel)

    async def _ping(self) -> None:
        async with self._using() as connection:
            if connection is not None:
                await connection.execute("SELECT 1")

    @asynccontextmanager
    async def _using(self) -> AsyncIterator[Connection | None]:
        """Lend the connection to one caller at a time; one that fails is not used again."""
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

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.terminate()

    def _remove(self, channels: Iterable[str], callback: Callable[[str | None], None]) -> bool:
        """Take `callback` off `channels`; say whether one of them is left with none."""
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
        for callbacks in tuple(self._callbacks.values()):
            for callback in tuple(callbacks):
                callback(None)


def load_driver() -> None:
    """Import the driver. Raises `MissingDriver`."""
    try:
        import asyncpg  # noqa: F401
    except ImportError:
        raise MissingDriver("postgresql://", ".[postgres]") from None


def channel_of(namespace: str, queue: str) -> str:
    """Return the channel a queue's doorbell is rung on; names are cut at 63 bytes, so a digest."""
    return "qtasks:" + sha256(f"{namespace}\0{queue}".encode()).hexdigest()[:40]


def check_lease(lease: float) -> float:
    """Return `lease`. Raises `ConfigurationError` unless it is a positive number of seconds."""
    if not (lease > 0 and math.isfinite(lease)):
        raise ConfigurationError(f"a lease is a positive number of seconds, not {lease!r}")
    return lease


def storable(text: str) -> str:
    """Return `text` without the one character Postgres cannot keep."""
    return text.replace("\0", "\ufffd")


def callers_connection(transaction: object) -> Connection:
    """Return the caller's connection. Raises `ConfigurationError` when it is not asyncpg's."""
    from asyncpg import Connection
    from asyncpg.pool import PoolConnectionProxy

    if isinstance(transaction, Connection | PoolConnectionProxy):
        return transaction  # type: ignore[return-value]
    raise ConfigurationError(
        f"transaction= takes an asyncpg connection, not a {type(transaction).__name__}"
    )


def advice(error: BaseException) -> str:
    """Return what to do about an error that repeating does not cure."""
    from asyncpg import exceptions as pg

    if isinstance(error, pg.InvalidAuthorizationSpecificationError):
        return " (check the user and the password in the URL, and pg_hba.conf)"
    if isinstance(error, pg.InvalidCatalogNameError):
        return " (create the database, or name another in the URL)"
    if isinstance(error, pg.InsufficientPrivilegeError):
        return (
            " (the first start creates the schema qtasks: let a user start it who may CREATE in"
            " the database, and grant USAGE on the schema and rights on its tables to this one)"
        )
    if isinstance(error, pg.UndefinedTableError | pg.InvalidSchemaNameError):
        return " (the schema qtasks was removed; starting again creates it)"
    return ""


async def read_durability(connection: Connection) -> Durability:
    """Return what a commit survives, and the settings that decide it."""
    names = ("fsync", "synchronous_commit", "full_page_writes")
    rows = await connection.fetch(
        "SELECT name, setting FROM pg_settings WHERE name = ANY($1::text[])", list(names)
    )
    settings = {row["name"]: row["setting"] for row in rows}
    version = connection.get_server_version()
    survives: Literal["client crash", "server crash", "machine crash"] = "machine crash"
    if settings["fsync"] != "on" or settings["full_page_writes"] != "on":
        survives = "server crash"
    if settings["synchronous_commit"] == "off":
        survives = "client crash"
    return Durability(
        survives,
        ", ".join(f"{name}={settings[name]}" for name in names),
        f"PostgreSQL {version.major}.{version.micro}",
    )


async def close_gently(connection: Connection) -> None:
    """Say good-bye to the server, but do not wait for one that is gone."""
    from asyncpg import InterfaceError, InternalClientError, PostgresError

    try:
        await connection.close(timeout=1.0)
    except (OSError, TimeoutError, PostgresError, InterfaceError, InternalClientError):
        connection.terminate()

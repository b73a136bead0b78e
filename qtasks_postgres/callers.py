"""The caller's transaction: the driver's connection behind what the caller has."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

from qtasks_core.errors import ConfigurationError, Unavailable
from qtasks_postgres.errors import meaning_of

if TYPE_CHECKING:
    from psycopg import AsyncConnection

TAKES = (
    "transaction= takes a connection of asyncpg, an AsyncConnection of psycopg 3, or an "
    "AsyncSession or AsyncConnection of SQLAlchemy on one of them"
)


class CallersConnection(Protocol):
    """A connection of the caller, in a transaction."""

    async def fetch(self, sql: str, /, *arguments: Any) -> list[Any]:
        """Run a statement and return its rows. Each has its columns by name."""


async def callers_connection(transaction: object) -> CallersConnection:
    """Return the caller's connection. What was returned before is returned again.

    Raises `ConfigurationError` if it has no transaction: a statement outside of one would be
    committed at once, whatever the caller does then. Raises `Unavailable` if it is closed.
    """
    from asyncpg import Connection
    from asyncpg.pool import PoolConnectionProxy

    if isinstance(transaction, PsycopgConnection):
        return transaction
    connection: Any = transaction
    if type(transaction).__module__.startswith("sqlalchemy."):
        connection = await _behind_sqlalchemy(transaction)
    if "psycopg" in sys.modules:
        from psycopg import AsyncConnection

        if isinstance(connection, AsyncConnection):
            return _of_psycopg(connection)
    if not isinstance(connection, Connection | PoolConnectionProxy):
        raise ConfigurationError(f"{TAKES}, not a {_name_of(transaction)}")
    if connection.is_closed():
        raise Unavailable("transaction= has a connection that is closed")
    if not connection.is_in_transaction():
        raise ConfigurationError(
            "transaction= has no open transaction: call it inside `async with "
            "connection.transaction():`, and not in the isolation level AUTOCOMMIT"
        )
    return connection


async def _behind_sqlalchemy(transaction: Any) -> object:
    """Return the driver's connection of an async session or connection."""
    if not hasattr(transaction, "get_raw_connection"):
        if not hasattr(transaction, "run_sync"):  # a session or connection for blocking code
            return transaction
        transaction = await transaction.connection()
    # SQLAlchemy begins the transaction at the server only with the first statement.
    await transaction.exec_driver_sql("SELECT 1")
    return (await transaction.get_raw_connection()).driver_connection


def _of_psycopg(connection: AsyncConnection[Any]) -> PsycopgConnection:
    from psycopg.pq import TransactionStatus

    if connection.closed:
        raise Unavailable("transaction= has a connection that is closed")
    if connection.autocommit and connection.info.transaction_status == TransactionStatus.IDLE:
        raise ConfigurationError(
            "transaction= has no open transaction: call it inside `async with "
            "connection.transaction():`, or without autocommit"
        )
    return PsycopgConnection(connection)


class PsycopgConnection:
    """Runs statements with the parameters `$1`, `$2`, … on a connection of psycopg 3.2 or newer."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def fetch(self, sql: str, /, *arguments: Any) -> list[Any]:
        """Run a statement and return its rows. Raises `Unavailable`, `ConfigurationError`."""
        from psycopg import AsyncRawCursor, Error
        from psycopg.rows import dict_row

        try:
            async with AsyncRawCursor(self._connection, row_factory=dict_row) as cursor:
                await cursor.execute(sql, arguments)
                return await cursor.fetchall()
        except Error as error:
            raise meaning_of(error, "transaction=") from error


def _name_of(transaction: object) -> str:
    kind = type(transaction)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"

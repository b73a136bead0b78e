"""The caller's transaction: the driver's connection behind what the caller has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qtasks_core.errors import ConfigurationError, Unavailable

if TYPE_CHECKING:
    from asyncpg import Connection

TAKES = (
    "transaction= takes an asyncpg connection, or an AsyncSession or AsyncConnection of SQLAlchemy "
    "on asyncpg"
)


async def callers_connection(transaction: object) -> Connection:
    """Return the caller's connection.

    Raises `ConfigurationError` if it has no transaction: a statement outside of one would be
    committed at once, whatever the caller does then. Raises `Unavailable` if it is closed.
    """
    from asyncpg import Connection
    from asyncpg.pool import PoolConnectionProxy

    connection: Any = transaction
    if type(transaction).__module__.startswith("sqlalchemy."):
        connection = await _behind_sqlalchemy(transaction)
    if not isinstance(connection, Connection | PoolConnectionProxy):
        raise ConfigurationError(f"{TAKES}, not a {_name_of(transaction)}")
    if connection.is_closed():
        raise Unavailable("transaction= has a connection that is closed")
    if not connection.is_in_transaction():
        raise ConfigurationError(
            "transaction= has no open transaction: call it inside `async with "
            "connection.transaction():`, and not in the isolation level AUTOCOMMIT"
        )
    return connection  # type: ignore[return-value]


async def _behind_sqlalchemy(transaction: Any) -> object:
    """Return the driver's connection of an async session or connection."""
    if not hasattr(transaction, "get_raw_connection"):
        if not hasattr(transaction, "run_sync"):  # a session or connection for blocking code
            return transaction
        transaction = await transaction.connection()
    # SQLAlchemy begins the transaction at the server only with the first statement.
    await transaction.exec_driver_sql("SELECT 1")
    return (await transaction.get_raw_connection()).driver_connection


def _name_of(transaction: object) -> str:
    kind = type(transaction)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"

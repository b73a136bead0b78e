"""The backend for Postgres: messages and records in tables, leases, LISTEN and NOTIFY."""

from qtasks_core import Backend
from qtasks_core.options import ANY, LEASE_TIME, RETENTION_TIME
from qtasks_core.urls import take_options
from qtasks_postgres.broker import PostgresBroker
from qtasks_postgres.connection import SCHEMA_NAME
from qtasks_postgres.outbox import OutboxBroker
from qtasks_postgres.storage import PostgresStorage

_OPTIONS = {
    "lease": LEASE_TIME, "retention": RETENTION_TIME, "listen_url": ANY, "schema": SCHEMA_NAME,
}  # fmt: skip


class PostgresBackend(Backend):
    """Makes the broker and the storage of `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`.

    Its options: `lease=SECONDS`; `retention=SECONDS` (`none` for ever); `schema=NAME`;
    `listen_url=URL`, the database's URL without the connection pooler. Write the special characters
    of that URL as `%3A` ….
    """

    contract = 1

    def broker(self, url: str) -> PostgresBroker:
        """Return the broker of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("retention", None)
        return PostgresBroker(rest, **options)

    def storage(self, url: str) -> PostgresStorage:
        """Return the storage of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("lease", None)
        return PostgresStorage(rest, **options)


__all__ = ["OutboxBroker", "PostgresBackend", "PostgresBroker", "PostgresStorage"]

"""The backend for Postgres: messages and records in tables, leases, LISTEN and NOTIFY."""

from qtasks_core import Backend
from qtasks_core.options import ANY, LEASE_TIME
from qtasks_core.urls import take_options
from qtasks_postgres.broker import PostgresBroker
from qtasks_postgres.storage import PostgresStorage

_OPTIONS = {"lease": LEASE_TIME, "listen_url": ANY}


class PostgresBackend(Backend):
    """Makes the broker and the storage of `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`.

    Its options are `lease=SECONDS` and `listen_url=URL`. The latter is the database's URL without
    the connection pooler. Write its special characters as `%3A` ….
    """

    contract = 1

    def broker(self, url: str) -> PostgresBroker:
        """Return the broker of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        return PostgresBroker(rest, **options)

    def storage(self, url: str) -> PostgresStorage:
        """Return the storage of `url`. Raises `ConfigurationError` if the URL is wrong."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("lease", None)
        return PostgresStorage(rest, **options)


__all__ = ["PostgresBackend", "PostgresBroker", "PostgresStorage"]

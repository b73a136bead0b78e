"""Postgres as broker and storage: two tables, leases, LISTEN and NOTIFY."""

from qtasks_core import Backend
from qtasks_core.options import ANY, LEASE_TIME
from qtasks_core.urls import take_options
from qtasks_postgres.broker import PostgresBroker
from qtasks_postgres.storage import PostgresStorage

_OPTIONS = {"lease": LEASE_TIME, "listen_url": ANY}


class PostgresBackend(Backend):
    """Answers for `postgresql://USER:PASSWORD@HOST:PORT/DATABASE?lease=SECONDS`.

    `listen_url=URL` leads around a connection pooler; its special characters are written `%3A` ….
    """

    contract = 1

    def broker(self, url: str) -> PostgresBroker:
        """Return the broker of `url`."""
        rest, options = take_options(url, _OPTIONS)
        return PostgresBroker(rest, **options)

    def storage(self, url: str) -> PostgresStorage:
        """Return the storage of `url`."""
        rest, options = take_options(url, _OPTIONS)
        options.pop("lease", None)
        return PostgresStorage(rest, **options)


__all__ = ["PostgresBackend", "PostgresBroker", "PostgresStorage"]

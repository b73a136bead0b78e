"""Postgres as broker and storage: two tables, leases, LISTEN and NOTIFY."""

from qtasks_core import Backend
from qtasks_core.urls import take_options
from qtasks_postgres.broker import PostgresBroker
from qtasks_postgres.storage import PostgresStorage


class PostgresBackend(Backend):
    """Answers for `postgresql://USER:PASSWORD@HOST:PORT/DATABASE?lease=SECONDS`."""

    contract = 1

    def broker(self, url: str) -> PostgresBroker:
        """Return the broker of `url`."""
        rest, options = take_options(url, {"lease": float})
        return PostgresBroker(rest, **options)

    def storage(self, url: str) -> PostgresStorage:
        """Return the storage of `url`."""
        rest, _ = take_options(url, {"lease": float})
        return PostgresStorage(rest)


__all__ = ["PostgresBackend", "PostgresBroker", "PostgresStorage"]

"""The embedded default backend: durable in one file, shared by the processes of one machine."""

from qtasks_core import Backend
from qtasks_core.urls import take_options
from qtasks_sqlite.broker import SqliteBroker
from qtasks_sqlite.options import OPTIONS
from qtasks_sqlite.storage import SqliteStorage


class SqliteBackend(Backend):
    """The backend of `sqlite:///relative` and `sqlite:////absolute`.

    Options: `lease` in seconds; `synchronous` (`normal`, or `full` to survive a crash of the
    machine); `retention` in seconds (`none` for ever).
    """

    contract = 1

    def broker(self, url: str) -> SqliteBroker:
        """Return the broker of `url`."""
        rest, options = take_options(url, OPTIONS)
        options.pop("retention", None)
        return SqliteBroker(rest, **options)

    def storage(self, url: str) -> SqliteStorage:
        """Return the storage of `url`."""
        rest, options = take_options(url, OPTIONS)
        options.pop("lease", None)
        return SqliteStorage(rest, **options)


__all__ = ["SqliteBackend", "SqliteBroker", "SqliteStorage"]

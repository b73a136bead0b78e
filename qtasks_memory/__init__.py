"""A backend in memory: everything lives in this process and is lost with it."""

from qtasks_core import Backend
from qtasks_core.options import LEASE_TIME, RETENTION_TIME
from qtasks_core.urls import refuse_options, take_options
from qtasks_memory.broker import MemoryBroker
from qtasks_memory.storage import MemoryStorage

OPTIONS = {"lease": LEASE_TIME, "retention": RETENTION_TIME}


class MemoryBackend(Backend):
    """The backend of `memory://NAME?lease=SECONDS&retention=SECONDS`.

    Equal names share one memory.
    """

    contract = 1

    def broker(self, url: str) -> MemoryBroker:
        """Return the broker of `url`."""
        rest, options = take_options(url, OPTIONS)
        refuse_options(rest, OPTIONS)
        options.pop("retention", None)
        return MemoryBroker(rest.partition("://")[2], **options)

    def storage(self, url: str) -> MemoryStorage:
        """Return the storage of `url`."""
        rest, options = take_options(url, OPTIONS)
        refuse_options(rest, OPTIONS)
        options.pop("lease", None)
        return MemoryStorage(rest.partition("://")[2], **options)


__all__ = ["MemoryBackend", "MemoryBroker", "MemoryStorage"]

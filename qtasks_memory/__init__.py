"""The shortest honest backend: everything in this process's memory, gone with it."""

from qtasks_core import Backend
from qtasks_core.urls import take_options
from qtasks_memory.broker import MemoryBroker
from qtasks_memory.storage import MemoryStorage


class MemoryBackend(Backend):
    """Answers for `memory://NAME?lease=SECONDS`; equal names share one memory."""

    contract = 1

    def broker(self, url: str) -> MemoryBroker:
        """Return the broker of `url`."""
        rest, options = take_options(url, {"lease": float})
        return MemoryBroker(rest.partition("://")[2], **options)

    def storage(self, url: str) -> MemoryStorage:
        """Return the storage of `url`."""
        rest, _ = take_options(url, {"lease": float})
        return MemoryStorage(rest.partition("://")[2])


__all__ = ["MemoryBackend", "MemoryBroker", "MemoryStorage"]

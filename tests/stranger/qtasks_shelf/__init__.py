"""A backend for QTasks: messages and records on a shelf."""

from qtasks_core import Backend
from qtasks_core.options import LEASE_TIME, RETENTION_TIME
from qtasks_core.urls import refuse_options, take_options
from qtasks_shelf.broker import ShelfBroker
from qtasks_shelf.storage import ShelfStorage

OPTIONS = {"lease": LEASE_TIME, "retention": RETENTION_TIME}


class ShelfBackend(Backend):
    """The backend for `shelf://NAME?lease=SECONDS&retention=SECONDS`."""

    contract = 1

    def broker(self, url: str) -> ShelfBroker:
        rest, options = take_options(url, OPTIONS)
        refuse_options(rest, OPTIONS)
        options.pop("retention", None)
        return ShelfBroker(rest.partition("://")[2], **options)

    def storage(self, url: str) -> ShelfStorage:
        rest, options = take_options(url, OPTIONS)
        refuse_options(rest, OPTIONS)
        options.pop("lease", None)
        return ShelfStorage(rest.partition("://")[2], **options)


__all__ = ["ShelfBackend", "ShelfBroker", "ShelfStorage"]

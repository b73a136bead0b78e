"""A backend for QTasks: messages and records on a shelf."""

from qtasks_core import Backend
from qtasks_core.options import LEASE_TIME
from qtasks_core.urls import refuse_options, take_options
from qtasks_shelf.broker import ShelfBroker
from qtasks_shelf.storage import ShelfStorage

OPTIONS = {"lease": LEASE_TIME}


class ShelfBackend(Backend):
    """The backend for `shelf://NAME?lease=SECONDS`."""

    contract = 1

    def broker(self, url: str) -> ShelfBroker:
        rest, options = take_options(url, OPTIONS)
        refuse_options(rest, OPTIONS)
        return ShelfBroker(rest.partition("://")[2], **options)

    def storage(self, url: str) -> ShelfStorage:
        rest, _ = take_options(url, OPTIONS)
        refuse_options(rest, OPTIONS)
        return ShelfStorage(rest.partition("://")[2])


__all__ = ["ShelfBackend", "ShelfBroker", "ShelfStorage"]

"""A Storage on any append-only log."""

from qtasks_log.log import Entry, Living, Log, Replaced, Rewritable
from qtasks_log.storage import LogStorage
from qtasks_log.store import MEMORY

__all__ = ["MEMORY", "Entry", "Living", "Log", "LogStorage", "Replaced", "Rewritable"]

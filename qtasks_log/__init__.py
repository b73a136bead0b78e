"""A Storage on any append-only log."""

from qtasks_log.log import Entry, Log, Replaced
from qtasks_log.storage import LogStorage
from qtasks_log.store import MEMORY

__all__ = ["MEMORY", "Entry", "Log", "LogStorage", "Replaced"]

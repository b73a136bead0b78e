"""A Storage on any append-only log."""

from qtasks_log.log import Entry, Log
from qtasks_log.storage import LogStorage

__all__ = ["Entry", "Log", "LogStorage"]

"""A Storage on any append-only log."""

from qtasks_log.log import Entry, Log

__all__ = ["Entry", "Log"]

"""`EntryQueue` lives in `qtasks.bridge.reply`."""

from qtasks.bridge.reply import EntryQueue

__all__ = ["EntryQueue"]

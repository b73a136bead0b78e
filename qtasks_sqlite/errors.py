"""SQLite's errors as those of QTasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtasks_core.errors import ConfigurationError, QTasksError, Unavailable

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

PATIENCE = 5.0
"""Seconds to wait for a lock that another process holds."""


def translate(error: sqlite3.Error, path: Path) -> QTasksError | None:
    """Return the QTasks error for an error of the file. None for an error of the statement."""
    name = getattr(error, "sqlite_errorname", None) or ""
    for prefix, kind, advice in (
        ("SQLITE_BUSY", Unavailable, f"another process has held its lock for {PATIENCE:g} s"),
        ("SQLITE_LOCKED", Unavailable, "it is locked within this process"),
        ("SQLITE_FULL", Unavailable, "the disk is full: free some space"),
        ("SQLITE_IOERR", Unavailable, f"the disk failed ({name})"),
        ("SQLITE_PROTOCOL", Unavailable, "its lock could not be had"),
        ("SQLITE_READONLY", ConfigurationError, "it cannot be written: check its permissions"),
        ("SQLITE_PERM", ConfigurationError, "access is denied: check its permissions"),
        ("SQLITE_CANTOPEN", ConfigurationError, "it cannot be opened: check path and permissions"),
        ("SQLITE_NOTADB", ConfigurationError, "it is no SQLite database: name another file"),
        ("SQLITE_CORRUPT", ConfigurationError, "it is corrupt: restore it or name another file"),
        ("SQLITE_SCHEMA", Unavailable, "its schema changed meanwhile"),
    ):
        if name.startswith(prefix):
            return kind(f"{path}: {advice}")
    return None

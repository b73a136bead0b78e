"""The tables of a database file, and how to migrate a file of an older release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qtasks_core.errors import ConfigurationError

if TYPE_CHECKING:
    import sqlite3

# `wake_at` is NULL while a message is ready. Else it is the time when it is due or its lease is
# lost.
_FIRST = """
CREATE TABLE qtasks_schema (version INTEGER NOT NULL);
INSERT INTO qtasks_schema VALUES (1);
CREATE TABLE qtasks_namespaces (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE qtasks_queues (
    id INTEGER PRIMARY KEY, namespace INTEGER NOT NULL, name TEXT NOT NULL, UNIQUE (namespace, name)
);
CREATE TABLE qtasks_messages (
    id INTEGER PRIMARY KEY,
    queue INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    wake_at REAL,
    holder INTEGER NOT NULL,
    count INTEGER NOT NULL,
    data BLOB NOT NULL
);
CREATE INDEX qtasks_ready ON qtasks_messages (queue, priority DESC, id) WHERE wake_at IS NULL;
CREATE INDEX qtasks_waiting ON qtasks_messages (queue, wake_at) WHERE wake_at IS NOT NULL;
CREATE TABLE qtasks_records (
    namespace INTEGER NOT NULL,
    uuid TEXT NOT NULL,
    ord INTEGER NOT NULL,
    execution TEXT NOT NULL,
    task_name TEXT NOT NULL,
    queue TEXT NOT NULL,
    created_at REAL NOT NULL,
    dead INTEGER NOT NULL,
    expires_at REAL,
    data BLOB NOT NULL,
    PRIMARY KEY (namespace, uuid)
) WITHOUT ROWID;
CREATE TABLE qtasks_watchers (
    namespace INTEGER NOT NULL, uuid TEXT NOT NULL, address TEXT NOT NULL,
    PRIMARY KEY (namespace, uuid, address)
) WITHOUT ROWID;
"""
# Lists start with the newest record. Few records are neither waiting nor successful: an index leads
# straight to them. Other columns have no index, because it would cost each save.
_SECOND = """
CREATE INDEX qtasks_newest ON qtasks_records (namespace, created_at);
CREATE INDEX qtasks_remarkable ON qtasks_records (namespace, created_at)
    WHERE ord % 8 NOT IN (0, 4);
CREATE INDEX qtasks_expiring ON qtasks_records (namespace, expires_at)
    WHERE expires_at IS NOT NULL;
CREATE TABLE qtasks_values (
    namespace INTEGER NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (namespace, key)
) WITHOUT ROWID;
CREATE TABLE qtasks_claims (
    namespace INTEGER NOT NULL, key TEXT NOT NULL, owner TEXT NOT NULL, expires_at REAL NOT NULL,
    PRIMARY KEY (namespace, key)
) WITHOUT ROWID;
CREATE TABLE qtasks_streams (
    namespace INTEGER NOT NULL, uuid TEXT NOT NULL, position INTEGER NOT NULL,
    appended_at REAL NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (namespace, uuid, position)
) WITHOUT ROWID;
CREATE TABLE qtasks_commands (
    id INTEGER PRIMARY KEY AUTOINCREMENT, namespace INTEGER NOT NULL, sent_at REAL NOT NULL,
    data BLOB NOT NULL
);
"""
# When a message became ready, or will. NULL: an older release has published it.
_THIRD = "ALTER TABLE qtasks_messages ADD COLUMN ready_at REAL"
_STEPS = (_FIRST, _SECOND, _THIRD)
"""The steps from each version to the next. Files of all versions exist, so never change a step."""
REMARKABLE = "ord % 8 NOT IN (0, 4)"
"""The condition that a query must have, word for word, to use the index of that name."""


def migrate(connection: sqlite3.Connection, path: Path) -> str | None:
    """Bring a file to this release's version, under the lock. Return the change, if any.

    Raises `ConfigurationError`.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection)
        if version > len(_STEPS):
            raise ConfigurationError(
                f"{path} has schema {version}, this release knows {len(_STEPS)}: upgrade qtasks"
            )
        for step in _STEPS[version:]:
            for statement in step.split(";"):
                connection.execute(statement)
        # If nothing is new it writes nothing. But it detects a read-only file at the start.
        connection.execute(
            "UPDATE qtasks_schema SET version = ? WHERE version != ?", (len(_STEPS), len(_STEPS))
        )
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    if version == len(_STEPS):
        return None
    before = f"updated from schema {version}" if version else "created"
    return f"{path} {before}, now has schema {len(_STEPS)}"


def _version(connection: sqlite3.Connection) -> int:
    known = connection.execute(
        "SELECT count(*) FROM sqlite_master WHERE name = 'qtasks_schema'"
    ).fetchone()
    if known == (0,):
        return 0
    (version,) = connection.execute("SELECT version FROM qtasks_schema").fetchone()
    return int(version)

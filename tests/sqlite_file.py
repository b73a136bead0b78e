"""Another program's way into a database: it knows the tables, not the wire format."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path


def injector(path: Path) -> Callable[[str, str, bytes], Awaitable[None]]:
    """Return what puts bytes into a queue that is there; it rings no bell."""

    async def inject(namespace: str, queue: str, data: bytes) -> None:
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(
                "INSERT INTO qtasks_messages (queue, priority, holder, count, data) "
                "SELECT q.id, 5, 0, 0, ? FROM qtasks_queues AS q "
                "JOIN qtasks_namespaces AS n ON n.id = q.namespace "
                "WHERE n.name = ? AND q.name = ?",
                (data, namespace, queue),
            )
        connection.close()

    return inject


def spoiler(path: Path) -> Callable[[str, str, bytes], Awaitable[None]]:
    """Return what puts bytes in the place of a record's own."""

    async def spoil(namespace: str, uuid: str, data: bytes) -> None:
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(
                "UPDATE qtasks_records SET data = ? WHERE uuid = ? AND namespace IN "
                "(SELECT id FROM qtasks_namespaces WHERE name = ?)",
                (data, uuid, namespace),
            )
        connection.close()

    return spoil

"""The table of a log storage: what does not fit into memory, and where its log goes on.

It is a SQLite file that one thread reads and writes. Without a directory it is a temporary file,
which SQLite writes only if its cache is full, and deletes with the connection.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from qtasks_core import TaskQuery
from qtasks_core.errors import Closed, ConfigurationError, QTasksError, Unavailable
from qtasks_core.queries import Place
from qtasks_core.records import RANK
from qtasks_core.threads import JobThread

logger = logging.getLogger("qtasks.log")

FORMAT = 1
"""A file of another format is thrown away. The log has all that it had."""
_SCHEMA = """
CREATE TABLE head (data BLOB NOT NULL);
CREATE TABLE subjects (
    kind INTEGER NOT NULL,
    subject TEXT NOT NULL,
    created REAL,
    class INTEGER,
    name TEXT,
    queue TEXT,
    due REAL,
    data BLOB NOT NULL,
    PRIMARY KEY (kind, subject)
);
CREATE INDEX newest ON subjects (created, subject) WHERE created IS NOT NULL;
CREATE INDEX of_class ON subjects (class, created, subject) WHERE created IS NOT NULL;
CREATE INDEX of_name ON subjects (name, class, created, subject) WHERE created IS NOT NULL;
CREATE INDEX of_queue ON subjects (queue, class, created, subject) WHERE created IS NOT NULL;
CREATE INDEX that_are_due ON subjects (kind, due, subject) WHERE due IS NOT NULL;
"""
_COLUMNS = 8
_SIZES = (128, 16, 1)
"""Rows of one statement. The driver releases the interpreter lock for each statement, and may then
wait for it, so many rows share one. Only a few sizes, so that all statements stay prepared."""

T = TypeVar("T")


class Head(Struct, frozen=True, array_like=True):
    """What a file says about itself."""

    format: int
    identity: str
    """Of which storage it is. It has no other use in a storage with another identity."""
    session: int
    """How many processes have opened the file to write it."""
    places: int
    """The next place that a reader gives to an entry."""
    position: bytes
    """Up to where the log has been read."""


class Row(NamedTuple):
    """A subject. The columns apart from `due` are those of its current record, if it has one."""

    kind: int
    subject: str
    created: float | None
    group: int | None
    """Which status it has, and whether it is dead, as `class_of` numbers them."""
    name: str | None
    queue: str | None
    due: float | None
    """The Unix time from which `expire` has to look at it."""
    data: bytes


def class_of(status: str, dead: bool) -> int:
    """Return the number for a status, and for being dead or not."""
    return RANK[status] * 2 + dead  # type: ignore[index]


class Table:
    """One SQLite connection, and the thread that uses it.

    Calls take effect in their order. A cancelled `write` is written all the same. `directory` None:
    a temporary file. Raises `Unavailable` if the file cannot be read or written; then it must be
    closed with `damaged`, and made anew.
    """

    def __init__(self, directory: Path | None, name: str, identity: str) -> None:
        self._file = None if directory is None else directory / f"{name}.sqlite"
        self.identity = identity
        self._closed: QTasksError | None = None
        self._thread = JobThread("qtasks-log")
        self._connection: sqlite3.Connection | None = None
        self._lock: IO[bytes] | None = None

    @property
    def kept(self) -> bool:
        """Whether this table is there for the next start."""
        return self._lock is not None

    async def open(self) -> Head | None:
        """Open the file. Return what it says if it is of use. Raises `ConfigurationError`."""
        return await self._run(self._open)

    def write(self, rows: Sequence[Row], gone: Sequence[tuple[int, str]], head: Head) -> (
        asyncio.Future[None]
    ):  # fmt: skip
        """Write and delete subjects, and what the file says, in one transaction."""
        return self._submit(lambda: self._write(rows, gone, head))

    async def load(self, subjects: Iterable[str]) -> list[tuple[int, str, bytes]]:
        """Return kind, subject and data of these subjects, of every kind."""
        return await self._run(lambda: self._select(
            "kind, subject, data",
            "kind IN (0, 1, 2) AND subject IN (SELECT value FROM json_each(?))",
            msgspec.json.encode(list(subjects)).decode(),
        ))  # fmt: skip

    async def beginning(self, kind: int, prefix: str) -> list[tuple[str, bytes]]:
        """Return subject and data of the subjects of a kind that begin with a prefix."""
        return await self._run(lambda: self._select(
            "subject, data", "kind = ? AND subject >= ? AND substr(subject, 1, ?) = ?",
            kind, prefix, len(prefix), prefix,
        ))  # fmt: skip

    async def due(self, kind: int, after: Place, before: float, limit: int) -> list[Place]:
        """Return when which subjects are due before a time. `after` is the last one of before."""
        return await self._run(lambda: self._select(
            "due, subject",
            "kind = ? AND (due, subject) > (?, ?) AND due < ? ORDER BY due, subject LIMIT ?",
            kind, *after, before, limit,
        ))  # fmt: skip

    async def page(self, query: TaskQuery, end: Place | None, limit: int) -> list[bytes]:
        """Return the data of the newest subjects that a query selects and that are before `end`."""
        select, parameters = _selecting(query, end, limit)
        return await self._run(lambda: [data for data, *_ in self._all(select, parameters)])

    async def close(self, *, damaged: bool = False) -> None:
        """Close the file. Idempotent. If it is `damaged`, delete it."""
        if self._closed is None:
            closing = self._submit(lambda: self._close(damaged))
            self._closed = Closed("LogStorage was stopped")
            if damaged:
                self._closed = Unavailable("the log is being read anew")
            await asyncio.wait({closing})
            self._thread.close()
            if not closing.cancelled() and (error := closing.exception()) is not None:
                logger.warning("%s", error)

    async def _run(self, job: Callable[[], T]) -> T:
        return await self._submit(job)

    def _submit(self, job: Callable[[], T]) -> asyncio.Future[T]:
        def translated() -> T:
            try:
                return job()
            except (sqlite3.Error, OSError) as error:
                file = "its temporary file" if self._file is None else self._file
                raise Unavailable(f"the log storage cannot use {file}: {error}") from error

        if self._closed is not None:
            raise self._closed
        return self._thread.submit(translated)

    # -- in the thread

    def _open(self) -> Head | None:
        if self._file is None:
            self._connection = _made("")
            return None
        self._lock = _locked(self._file)
        if self._lock is None:
            self._connection, head = _copied(self._file, self.identity)
            return head
        try:
            self._connection = _connected(self._file)
            head = _head(self._connection, self.identity)
            if head is not None:
                return head
        except sqlite3.DatabaseError as error:
            logger.warning("%s is damaged, the log is read anew: %s", self._file, error)
        self._remove(self._file)
        self._connection = _made(self._file)
        return None

    def _remove(self, file: Path) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        for suffix in ("", "-wal", "-shm"):
            Path(f"{file}{suffix}").unlink(missing_ok=True)

    def _close(self, damaged: bool) -> None:
        try:
            if damaged and self._file is not None and self._lock is not None:
                self._remove(self._file)
        finally:
            connection, self._connection = self._connection, None
            lock, self._lock = self._lock, None
            if connection is not None:
                connection.close()
            if lock is not None:
                lock.close()

    def _write(self, rows: Sequence[Row], gone: Sequence[tuple[int, str]], head: Head) -> None:
        connection = self._connection
        assert connection is not None
        connection.execute("BEGIN IMMEDIATE")
        done = 0
        for size in _SIZES:
            marks = ",".join(["(" + ",".join("?" * _COLUMNS) + ")"] * size)
            while len(rows) - done >= size:
                values = list(chain.from_iterable(rows[done : done + size]))
                connection.execute(f"INSERT OR REPLACE INTO subjects VALUES {marks}", values)
                done += size
        if gone:
            connection.execute(
                "DELETE FROM subjects WHERE (kind, subject) IN "
                "(SELECT value ->> 0, value ->> 1 FROM json_each(?))",
                (msgspec.json.encode(gone).decode(),),
            )
        connection.execute("UPDATE head SET data = ?", (msgspec.msgpack.encode(head),))
        connection.execute("COMMIT")

    def _select(self, columns: str, where: str, *parameters: object) -> list[Any]:
        return self._all(f"SELECT {columns} FROM subjects WHERE {where}", parameters)

    def _all(self, statement: str, parameters: Sequence[object]) -> list[Any]:
        assert self._connection is not None
        return self._connection.execute(statement, parameters).fetchall()


def _selecting(query: TaskQuery, end: Place | None, limit: int) -> tuple[str, list[object]]:
    """Return the statement for a page. Each of its parts reads one index, as far as it must."""
    conditions = ["kind = 0", "created IS NOT NULL", "(due IS NULL OR due > ?)"]
    parameters: list[object] = [time.time()]
    for condition, value in (
        ("name = ?", query.task_name),
        ("queue = ?", query.queue),
        ("created >= ?", query.created_after),
        ("created < ?", query.created_before),
    ):
        if value is not None:
            conditions.append(condition)
            parameters.append(value)
    if end is not None:
        conditions.append("(created, subject) < (?, ?)")
        parameters += end
    index = "of_class"
    if query.task_name is not None:
        index = "of_name"
    elif query.queue is not None:
        index = "of_queue"
    groups: list[int | None] = [
        class_of(status, dead)
        for status in (RANK if query.status is None else query.status)
        for dead in ((False, True) if query.dead is None else (query.dead,))
    ]
    if index == "of_class" and query.status is None and query.dead is None:
        index, groups = "newest", [None]
    order = "ORDER BY created DESC, subject DESC LIMIT ?"
    parts: list[str] = []
    values: list[object] = []
    for group in groups:
        mine = conditions if group is None else [*conditions, f"class = {group}"]
        parts.append(
            f"SELECT * FROM (SELECT data, created, subject FROM subjects INDEXED BY {index} "
            f"WHERE {' AND '.join(mine)} {order})"
        )
        values += [*parameters, limit]
    return f"{' UNION ALL '.join(parts)} {order}", [*values, limit]


def _connected(file: str | Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    # A file that is kept stays consistent whatever is killed; a temporary one ends with the
    # process.
    connection.execute(f"PRAGMA journal_mode={'WAL' if file else 'OFF'}")
    connection.execute(f"PRAGMA synchronous={'NORMAL' if file else 'OFF'}")
    connection.execute("PRAGMA cache_size=-8192")
    return connection


def _made(file: str | Path) -> sqlite3.Connection:
    connection = _connected(file)
    connection.executescript(_SCHEMA)
    connection.execute("INSERT INTO head VALUES (X'')")
    return connection


def _head(connection: sqlite3.Connection, identity: str) -> Head | None:
    """Return what a file says, if it is of this format and of this storage."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'head'").fetchone():
        return None
    (data,) = connection.execute("SELECT data FROM head").fetchone() or (b"",)
    try:
        head = msgspec.msgpack.decode(data, type=Head)
    except msgspec.MsgspecError:
        return None
    return head if (head.format, head.identity) == (FORMAT, identity) else None


def _copied(file: Path, identity: str) -> tuple[sqlite3.Connection, Head | None]:
    """Return a temporary file of one's own, with all that the writer of this file has written."""
    copy = _connected("")
    try:
        source = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
        try:
            source.backup(copy)
        finally:
            source.close()
        head = _head(copy, identity)
        if head is not None:
            return copy, head
    except sqlite3.Error as error:
        logger.info("%s cannot be copied, the log is read anew: %s", file, error)
    copy.close()
    return _made(""), None


def _locked(file: Path) -> IO[bytes] | None:
    """Return the lock of a file, or None while another process has it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = open(f"{file}.lock", "ab")  # noqa: SIM115
    except OSError as error:
        raise ConfigurationError(
            f"directory={str(file.parent)!r} cannot be used: {error}"
        ) from None
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock

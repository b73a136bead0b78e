"""The connection to one database file. A thread owns it, and does the work in turns.

Jobs that arrive during a turn share the next turn, as one transaction.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import msgspec
from msgspec.structs import replace

from qtasks_core.errors import Closed, ConfigurationError, ServerTooOld, Unavailable
from qtasks_sqlite.doorbell import Doorbell
from qtasks_sqlite.errors import PATIENCE, translate
from qtasks_sqlite.filesystem import warn_of_network
from qtasks_sqlite.options import Synchronous
from qtasks_sqlite.schema import migrate

if TYPE_CHECKING:
    from sqlite3 import Connection, Cursor

    from qtasks_core import Guarantees

T = TypeVar("T")

_Work: TypeAlias = tuple[Callable[[], Any], "asyncio.Future[Any]"]

_TRUSTED = 0.05
"""Seconds until the next check of the file. Each check releases the interpreter lock."""
_OLDEST = (3, 38)
# Only a few sizes, so that all their statements stay prepared.
_SIZES = (256, 64, 16, 4, 1)
INLINE = 4096
"""Blobs of up to this many bytes are aggregated. For larger ones, one step each is cheaper."""


def array(values: Iterable[Any]) -> str:
    """Return values as a JSON array, for `IN (SELECT value FROM json_each(?))`."""
    return msgspec.json.encode(list(values)).decode()


class Transaction:
    """One turn in the database's thread, as its jobs see it.

    Its methods read and write many rows in few steps. The driver releases the interpreter lock for
    each step. In a busy process it then waits for the lock up to the switch interval. So 500 rows
    one by one take half a second, but some milliseconds in few steps. Therefore multi-row VALUES
    insert rows, and queries aggregate their rows into one.
    """

    def __init__(self, connection: Connection, ids: dict[tuple[int, str], int]) -> None:
        self.execute: Callable[..., Cursor] = connection.execute
        self.rung_queues: set[int] = set()
        """Queues in which a message became receivable, or will be earlier than before."""
        self.letters: dict[str, list[str]] = {}
        """For each inbox, the uuids whose records have become final."""
        self.settled: set[Hashable] = set()
        """Settlements of this turn. They count for other calls once the turn is durable."""
        self._ids = ids
        self._found: dict[tuple[int, str], int] = {}
        self._after: list[Callable[[], None]] = []

    def namespace(self, name: str) -> int:
        """Return the number of a namespace. Create it if it is missing."""
        return self._id(0, name, "qtasks_namespaces (name)", (name,))

    def add_namespace(self, name: str) -> bool:
        """Add a namespace, and say whether it is new."""
        known = self.execute("SELECT 1 FROM qtasks_namespaces WHERE name = ?", (name,)).fetchone()
        self.namespace(name)
        return known is None

    def queue(self, namespace: int, name: str) -> int:
        """Return the number of a queue. Create it if it is missing."""
        return self._id(namespace, name, "qtasks_queues (namespace, name)", (namespace, name))

    def known_queue(self, namespace: int, name: str) -> int | None:
        """Return the number of a queue, None if it does not exist. Writes nothing."""
        found = self._ids.get((namespace, name)) or self._found.get((namespace, name))
        if found is None:
            row = self.execute(
                "SELECT id FROM qtasks_queues WHERE namespace = ? AND name = ?", (namespace, name)
            ).fetchone()
            return row and int(row[0])
        return found

    def _id(self, namespace: int, name: str, into: str, row: tuple[object, ...]) -> int:
        key = namespace, name
        found = self._ids.get(key) or self._found.get(key)
        if found is None:
            # The update changes nothing, but makes SQLite return an existing row too.
            rows = self.execute(
                f"INSERT INTO {into} VALUES ({','.join('?' * len(row))}) "
                "ON CONFLICT DO UPDATE SET name = name RETURNING id",
                row,
            ).fetchall()
            found = self._found[key] = int(rows[0][0])
        return found

    def insert(
        self, into: str, rows: Sequence[tuple[Any, ...]], then: str = "", *parameters: Any
    ) -> int:
        """Run `INSERT into VALUES rows then` for all rows, in few steps.

        `parameters` are those of `then`. Returns how many rows were inserted or updated.
        """
        done = count = 0
        for size in _SIZES:
            while len(rows) - done >= size:
                marks = "(" + ",".join("?" * len(rows[0])) + ")"
                statement = f"INSERT {into} VALUES {','.join([marks] * size)} {then}"
                values = [*chain.from_iterable(rows[done : done + size]), *parameters]
                count += self.execute(statement, values).rowcount
                done += size
        return count

    def select(self, columns: str, rest: str, parameters: Sequence[Any]) -> list[list[Any]]:
        """Return the rows of `SELECT columns rest`, which must not contain blobs, in one step."""
        (rows,) = self.execute(
            f"SELECT json_group_array(json_array({columns})) {rest}", parameters
        ).fetchone()
        return msgspec.json.decode(rows, type=list[list[Any]])

    def select_blobs(
        self, table: str, key: str, columns: str, where: str, parameters: Sequence[Any]
    ) -> Iterator[tuple[list[Any], bytes]]:
        """Yield `[key, *columns]` and `data` of the rows of a table, all small blobs in one step.

        `key` must be unique among the rows that `where` selects.
        """
        rows, blobs = self.execute(
            f"SELECT json_group_array(json_array({key}, {columns})), "
            f"group_concat(CASE WHEN length(data) <= {INLINE} THEN hex(data) ELSE '' END) "
            f"FROM {table} WHERE {where}",
            parameters,
        ).fetchone()
        if blobs is None:
            return
        decoded = msgspec.json.decode(rows, type=list[list[Any]])
        for row, blob in zip(decoded, blobs.split(","), strict=True):
            if blob:
                yield row, bytes.fromhex(blob)
            else:
                one = f"SELECT data FROM {table} WHERE ({where}) AND {key} = ?"
                yield row, self.execute(one, [*parameters, row[0]]).fetchone()[0]

    def after_commit(self, action: Callable[[], None]) -> None:
        """Run an action in this thread once this transaction is durable."""
        self._after.append(action)

    def committed(self) -> None:
        """Run the actions for after the commit."""
        self._ids.update(self._found)
        for action in self._after:
            action()


class _Job(Generic[T]):
    """Work for the thread, and the future of its result."""

    __slots__ = ("asked", "future", "work", "writes")

    def __init__(
        self, work: Callable[[Transaction], T], writes: bool, future: asyncio.Future[T]
    ) -> None:
        self.asked = time.monotonic()
        self.work = work
        self.writes = writes
        self.future = future

    def finish(self, result: T | Exception) -> None:
        if self.future.done():  # its caller was cancelled
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Database:
    """One file, on one event loop. Broker and storage share its thread and transactions."""

    def __init__(self, path: Path, synchronous: Synchronous) -> None:
        self.path = path
        self.doorbell = Doorbell(path)
        self.users = 0
        self.changed: str | None = None
        """The change that opening made to the file, until `migrated` has reported it."""
        self._synchronous = synchronous
        # Hold the loop, so that no other loop gets its id: the id is part of this object's key.
        self._loop = asyncio.get_running_loop()
        self._pid = os.getpid()
        # Not an executor: it accepts no more work once the main thread has finished.
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        Thread(target=self._serve, name=f"qtasks {path.name}", daemon=True).start()
        self.in_turn = Lock()
        """The thread holds it while it works: see `_close_before_fork`."""
        self._connection: Connection | None = None
        self._inodes: list[tuple[int, int] | None] | None = None
        """Those of the file and of the directory of bells, as they were first opened."""
        self._looked = 0.0
        self._ids: dict[tuple[int, str], int] = {}
        self._waiting: list[_Job[Any]] = []
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    async def write(self, work: Callable[[Transaction], T]) -> T:
        """Do `work` in a transaction, and return its result once that is durable.

        `work` runs in the database's thread. It may run again if the transaction failed. If the
        caller is cancelled before the work begins, the work is not done; later, its result is
        dropped. Raises `Unavailable`, `ConfigurationError`.
        """
        return await self._submit(work, True)

    async def read(self, work: Callable[[Transaction], T]) -> T:
        """Do `work`, which only reads, without waiting for the lock."""
        return await self._submit(work, False)

    def _submit(self, work: Callable[[Transaction], T], writes: bool) -> asyncio.Future[T]:
        if os.getpid() != self._pid:
            raise Closed(f"{self.path.name} was opened before a fork: start a new part here")
        if self._closed:
            raise Closed(f"{self.path.name} is closed")
        job = _Job(work, writes, self._loop.create_future())
        self._waiting.append(job)
        if self._running is None:
            self._running = self._loop.create_task(self._run())
        return job.future

    async def _run(self) -> None:
        """Do turns until no job waits. This runs on the loop, the turns run in the thread."""
        jobs: list[_Job[Any]] = []
        try:
            while self._waiting:
                jobs = [job for job in self._waiting if not job.future.done()]
                self._waiting.clear()
                if jobs:
                    results = await self._in_thread(partial(self._turn, jobs))
                    for job, result in zip(jobs, results, strict=True):
                        job.finish(result)
        finally:
            self._running = None
            for job in (*jobs, *self._waiting):  # only if the loop itself is closing
                job.future.cancel()
            self._waiting.clear()

    async def close(self) -> None:
        """Finish the waiting jobs and close the file."""
        self._closed = True
        if self._running is not None:
            await asyncio.wait({self._running})
        await self._in_thread(self.disconnect)
        self._work.put(None)
        self.doorbell.close()

    def _in_thread(self, work: Callable[[], T]) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._loop.create_future()
        self._work.put((work, future))
        return future

    # The methods below run in the thread.

    def _serve(self) -> None:
        while (item := self._work.get()) is not None:
            work, future = item
            with self.in_turn:
                try:
                    answer = partial(_set_result, future, work())
                except Exception as error:  # noqa: BLE001  # the caller raises it
                    answer = partial(_set_exception, future, error)
            try:
                self._loop.call_soon_threadsafe(answer)
            except RuntimeError:
                return  # the loop was closed meanwhile

    def _turn(self, jobs: Sequence[_Job[Any]]) -> list[Any]:
        """Return a result or an error for each job. Jobs that only read go first, without lock."""
        results: dict[_Job[Any], Any] = {}
        for writes in (False, True):
            half = [job for job in jobs if job.writes is writes]
            if half:
                results.update(zip(half, self._outcomes(half, writes), strict=True))
        return [results[job] for job in jobs]

    def _outcomes(self, jobs: Sequence[_Job[Any]], writes: bool) -> list[Any]:
        try:
            return self._together(jobs, writes)
        except (Unavailable, ConfigurationError) as error:  # an error of the file, so of all jobs
            return [error] * len(jobs)
        except Exception as error:  # noqa: BLE001 (the job's caller gets it)
            if len(jobs) == 1:
                return [error]
            return [result for job in jobs for result in self._outcomes([job], writes)]

    def _together(self, jobs: Sequence[_Job[Any]], writes: bool) -> list[Any]:
        sqlite3 = _driver()
        deadline = min(job.asked for job in jobs) + PATIENCE
        pause = 0.0001
        while True:
            try:
                return self._attempt(jobs, writes)
            except sqlite3.Error as error:
                translated = translate(error, self.path)
                if translated is None:
                    raise
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                    self.disconnect()
                    raise translated from error
                if time.monotonic() > deadline:
                    raise translated from error
            # SQLite's own handler sleeps at least a millisecond, longer than most transactions
            # take.
            time.sleep(pause)
            pause = min(pause * 1.5, 0.002)

    def _attempt(self, jobs: Sequence[_Job[Any]], writes: bool) -> list[Any]:
        self._refuse_another()
        connection = self._connection
        if connection is None:
            connection = self._connection = self._connect()
        turn = Transaction(connection, self._ids)
        connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
        try:
            results = [job.work(turn) for job in jobs]
            # Under the lock, before the commit: see `doorbell`.
            self._ring(turn)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        turn.committed()
        return results

    def _refuse_another(self) -> None:
        """Raise `ConfigurationError` if the file, or the bells, were removed or replaced.

        SQLite would continue in a file that no other process can find. Cached data, such as the
        numbers of namespaces, may be wrong for another file.
        """
        now = time.monotonic()
        if self._inodes is None or (self._connection and now - self._looked < _TRUSTED):
            return
        if self._inodes != self._inodes_now():
            # Nobody would ring the sleeping listeners. Wake them: they check the file and raise
            # too.
            self._loop.call_soon_threadsafe(self.doorbell.wake_all)
            raise ConfigurationError(
                f"{self.path}: the file, or {self.doorbell.directory.name} beside it, was removed "
                "or replaced while it was in use: put it back, or restart what uses it"
            )
        self._looked = now

    def _inodes_now(self) -> list[tuple[int, int] | None]:
        return [_inode(self.path), _inode(self.doorbell.directory)]

    def _ring(self, turn: Transaction) -> None:
        try:
            if turn.rung_queues:
                self.doorbell.ring_queues(turn.rung_queues)
            for address, uuids in turn.letters.items():
                self.doorbell.ring_address(address, uuids)
        except OSError as error:
            raise Unavailable(f"cannot ring the bells of {self.path}: {error.strerror}") from error

    def _connect(self) -> Connection:
        sqlite3 = _driver()
        if sqlite3.sqlite_version_info < _OLDEST:
            raise ServerTooOld(f"SQLite {sqlite3.sqlite_version} is too old, 3.38 is needed")
        # If this check is not permitted, SQLite reports it when it opens the file.
        with suppress(PermissionError):
            if not self.path.parent.is_dir():
                raise ConfigurationError(f"{self.path.parent} is not a directory: create it first")
        warn_of_network(self.path)
        connection: Connection = sqlite3.connect(
            self.path,
            timeout=0,
            isolation_level=None,
            cached_statements=512,
            check_same_thread=False,  # for `_close_before_fork`
        )
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise ConfigurationError(
                    f"{self.path} cannot have a write-ahead log ({mode} instead): it must be a "
                    "file on a local disk"
                )
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            connection.execute("PRAGMA cache_size = -16000")
            connection.execute("PRAGMA wal_autocheckpoint = 4000")
            connection.execute("PRAGMA journal_size_limit = 67108864")
            self.changed = migrate(connection, self.path) or self.changed
            self._ids.clear()
            self.doorbell.open()
        except BaseException:
            connection.close()
            raise
        self._inodes = self._inodes or self._inodes_now()
        return connection

    def disconnect(self) -> None:
        """Close the file. The next turn opens it again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


_databases: dict[tuple[int, int, Path, Synchronous], Database] = {}


_closed_for_fork: list[Database] = []


def _close_before_fork() -> None:
    # SQLite tracks the locks of a process. In a child that record would be wrong: two processes
    # would believe that they hold the same lock. So no file is open during a fork.
    for database in set(_databases.values()):
        database.in_turn.acquire()
        _closed_for_fork.append(database)
        database.disconnect()


def _go_on_after_fork() -> None:
    while _closed_for_fork:
        _closed_for_fork.pop().in_turn.release()


def _forget_in_child() -> None:
    # The threads do not exist in the child, and their locks stay as they are.
    _closed_for_fork.clear()
    _databases.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_close_before_fork,
        after_in_parent=_go_on_after_fork,
        after_in_child=_forget_in_child,
    )


async def connect(path: Path, synchronous: Synchronous) -> Database:
    """Return the open database of this file on this loop. `disconnect` releases it."""
    # The pid is part of the key: a child must not use, or even close, an inherited database.
    key = os.getpid(), id(asyncio.get_running_loop()), path, synchronous
    database = _databases.get(key)
    if database is None:
        database = _databases[key] = Database(path, synchronous)
    database.users += 1
    try:
        await database.read(lambda turn: None)
    except BaseException:
        await disconnect(database)
        raise
    return database


async def migrated(path: Path, synchronous: Synchronous, namespace: str) -> list[str]:
    """Migrate a file to this release and add a namespace. Return the changes."""
    database = await connect(path, synchronous)
    try:
        is_new = await database.write(lambda turn: turn.add_namespace(namespace))
        changed, database.changed = database.changed, None
    finally:
        await disconnect(database)
    added = f"app {namespace!r} added" if is_new else None
    return [line for line in (changed, added) if line is not None]


async def disconnect(database: Database) -> None:
    """Release a database from `connect`. The last user closes it."""
    database.users -= 1
    if database.users == 0:
        for key in [key for key, known in _databases.items() if known is database]:
            del _databases[key]
        await database.close()


def with_server(guarantees: Guarantees) -> Guarantees:
    """Return guarantees with the version of SQLite added."""
    return replace(guarantees, server=f"SQLite {_driver().sqlite_version}")


def _driver() -> Any:
    """Import sqlite3, which some builds of Python leave out."""
    try:
        import sqlite3
    except ImportError as error:
        raise ConfigurationError("sqlite:// needs a Python built with SQLite") from error
    return sqlite3

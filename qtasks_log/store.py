"""What a reader knows of a log: recent subjects in memory, the others in a table.

A table may outlive the process. It then says up to where it has read the log, and the next start
goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable
from itertools import count
from math import inf
from typing import Any, TypeAlias, TypeVar
from zlib import crc32

import msgspec
from msgspec import Struct

from qtasks_core import Task, TaskPage, TaskQuery
from qtasks_core.errors import Unavailable, WireError
from qtasks_core.queries import Place, cursor_at, place_of
from qtasks_log.entries import Claiming, Content, Deletion, Items, Setting, decode, encode
from qtasks_log.shared import over_since
from qtasks_log.table import FORMAT, Head, Row, Table, class_of
from qtasks_log.view import Proposal, Subject, View, accepted

logger = logging.getLogger("qtasks.log")

MEMORY = 32 * 1024 * 1024
"""Bytes of loaded subjects above which those that were not used for longest leave the memory."""
CHANGED = 1000
"""Changed subjects that are written to the table at once."""
KEPT_EVERY = 10.0
"""Seconds after which the next read writes to a kept table, however little has changed."""
_OBJECTS = 1000
"""Bytes that the objects of a loaded subject have, apart from its entries. Measured."""
_DUE_AT_ONCE = 1000

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)

Records: TypeAlias = View[Task | Deletion]
Values: TypeAlias = View[Setting]
Claims: TypeAlias = View[Claiming]


class _Stored(Struct, frozen=True, array_like=True):
    """A subject in the table: for each entry its key, its place and the value in the log."""

    session: int
    standing: list[tuple[str, int, bytes, float | None]]
    stream: list[tuple[str, int, bytes]]


class Store:
    """The three views, and the table behind them.

    Only the reader changes views, a whole batch of entries at a time, and then calls `took`.
    Everybody loads subjects before looking at them, and looks before the next `await`. `memory` is
    in bytes.
    """

    def __init__(
        self,
        table: Table,
        *,
        retention: float,
        memory: int = MEMORY,
        failed: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        self._table = table
        self._retention = retention
        self._memory = memory
        self._tell = failed
        """Called when the table cannot be used any more. The log must then be read anew."""
        self._places = count()
        self.records: Records = View(self._places)
        self.values: Values = View(self._places)
        self.claims: Claims = View(self._places)
        self._views: tuple[View[Any], ...] = (self.records, self.values, self.claims)
        self._session = 1
        self._opened = time.monotonic()
        self._elsewhere = False
        """Whether the table has subjects that are not loaded."""
        self._loading: Counter[str] = Counter()
        """Subjects that are being loaded. Unloading one meanwhile could bring back an old state."""
        self._writes: dict[asyncio.Future[None], list[dict[str, Subject[Any]]]] = {}
        """What the thread is writing, by view. It must stay loaded until then."""
        self._failed: BaseException | None = None
        self._position = b""
        self._kept = b""
        """The position that the table has."""
        self._wrote_at = time.monotonic()

    async def open(self) -> bytes | None:
        """Open the table. Return the position at which the log goes on, None: at its beginning."""
        head = await self._table.open()
        self._opened = self._wrote_at = time.monotonic()
        if head is None:
            return None
        self._session = head.session + 1
        self._position = head.position
        self._places = count(head.places)
        for view in self._views:
            view.places = self._places
        self._elsewhere = True
        return head.position

    async def close(self, *, damaged: bool = False) -> None:
        """Write what has changed, if the table is kept, and close it. Idempotent."""
        if not damaged and self._table.kept and self._position:
            try:
                self._write()
                await self._written_out()
            except Unavailable as error:
                logger.warning("the next start reads the log anew: %s", error)
                damaged = True
        if damaged and self._failed is None:
            # Calls that still use this store must not have the log read anew once more.
            self._failed = Unavailable("the log is being read anew")
        await self._table.close(damaged=damaged)

    # -- what the reader calls

    def missing(self, entries: Iterable[tuple[str, str, Content | None]]) -> list[str]:
        """Return the subjects of entries (subject, key, content) that have to be loaded first."""
        if not self._elsewhere:
            return []
        found: dict[str, None] = {}
        for subject, key, content in entries:
            if content is None:
                if not any(
                    (state := view.loaded.get(subject)) is not None and state.has(key)
                    for view in self._views
                ):
                    found[subject] = None
            elif subject not in self.view_of(content).loaded:
                found[subject] = None
        return list(found)

    def view_of(self, content: Content) -> View[Any]:
        """Return the view to which an entry belongs."""
        if isinstance(content, Setting):
            return self.values
        return self.claims if isinstance(content, Claiming) else self.records

    def discard(self, subject: str, key: str) -> None:
        """Apply a tombstone, whatever its entry was."""
        any(view.discard(subject, key) for view in self._views)

    def reached(self, position: bytes) -> None:
        """Note a position up to which all entries are in the views."""
        self._position = position

    async def took(self, position: bytes) -> None:
        """Note that all entries before a position are in the views. Make room in memory."""
        self._position = position
        changed = sum(len(view.changed) for view in self._views)
        late = self._table.kept and time.monotonic() - self._wrote_at >= KEPT_EVERY
        if changed >= CHANGED or late:
            await self._written_out()
            self._write()
        self._unload()
        if changed and self._used > self._memory:
            # All that is left has changed, and is large.
            self._write()
            await self._written_out()
            self._unload()

    @property
    def _used(self) -> int:
        return sum(view.size + _OBJECTS * len(view.loaded) for view in self._views)

    # -- what everybody calls

    async def load(self, subjects: Iterable[str], view: View[Any] | None = None) -> None:
        """Bring subjects into memory; with a `view`, if it does not have them."""
        wanted = dict.fromkeys(subjects)
        if view is not None:
            wanted = {subject: None for subject in wanted if not view.touch(subject)}
        if not wanted or not self._elsewhere:
            return
        self._loading.update(list(wanted))
        try:
            rows = await self._asked(self._table.load(wanted))
        finally:
            self._loading -= Counter(list(wanted))
        self._unload(sparing=wanted)
        for kind, subject, data in rows:
            into = self._views[kind]
            # A loaded one is as new as the table's, or newer.
            if subject not in into.loaded:
                into.load(subject, self._decoded(kind, data))

    async def page(self, query: TaskQuery) -> TaskPage:
        """Return a page of records. Raises `Refused` if the cursor is invalid."""
        end = None if query.cursor is None else place_of(query.cursor)
        if query.status == ():
            return TaskPage([])
        self._write()
        # One more than the page has says that there is another page.
        found = await self._asked(self._table.page(query, end, query.limit + 1))
        states = [self._decoded(0, data) for data in found[: query.limit]]
        shown = [state.current.content for state in states if state.current is not None]
        more = len(found) > query.limit
        last = shown[-1] if shown else None
        return TaskPage(shown, cursor_at((last.created_at, last.uuid)) if more and last else None)

    async def values_beginning(self, prefix: str) -> dict[str, bytes]:
        """Return the values whose key begins with a prefix, by key."""
        self._write()
        found: dict[str, bytes] = {}
        for key, data in await self._asked(self._table.beginning(1, prefix)):
            current = self._decoded(1, data).current
            if current is not None and current.content.value is not None:
                found[key] = current.content.value
        return found

    async def due(self, view: View[Any], before: float) -> AsyncIterator[list[str]]:
        """Yield subjects of a view that `expire` has to look at, loaded, some at a time."""
        kind = self._views.index(view)
        after: Place = (float("-inf"), "")
        while True:
            self._write()
            places = await self._asked(self._table.due(kind, after, before, _DUE_AT_ONCE))
            if not places:
                return
            after = places[-1]
            subjects = [subject for _, subject in places]
            await self.load(subjects, view)
            yield subjects

    # -- the table

    def _write(self) -> None:
        """Hand all that has changed to the thread, without waiting for it."""
        moved = self._table.kept and self._position != self._kept
        if not moved and not any(view.changed for view in self._views):
            return
        self._kept = self._position
        rows: list[Row] = []
        gone: list[tuple[int, str]] = []
        written: list[dict[str, Subject[Any]]] = []
        for kind, view in enumerate(self._views):
            for subject, state in view.changed.items():
                if state.empty:
                    gone.append((kind, subject))
                else:
                    rows.append(self._row(kind, subject, state))
            written.append(view.changed)
            view.changed = {}
        self._wrote_at = time.monotonic()
        places = next(self._places)
        head = Head(FORMAT, self._table.identity, self._session, places, self._position)
        writing = self._table.write(rows, gone, head)
        self._writes[writing] = written
        writing.add_done_callback(self._wrote)

    def _wrote(self, writing: asyncio.Future[None]) -> None:
        written = self._writes.pop(writing)
        if (error := writing.exception()) is not None:
            self._damage(error)
            return
        for kind, view in enumerate(self._views):
            for subject, state in written[kind].items():
                if state.empty and not self._held(kind, subject) and subject in view.loaded:
                    view.unload(subject)

    async def _written_out(self) -> None:
        """Wait for all writes. Raises `Unavailable` if one has failed."""
        if self._writes:
            await asyncio.wait(self._writes)
        if self._failed is not None:
            raise self._failed

    def _held(self, kind: int, subject: str) -> bool:
        """Say whether a subject has to stay loaded: the table does not have its state yet."""
        if subject in self._views[kind].changed or subject in self._loading:
            return True
        if not self._writes:
            return False
        return any(subject in written[kind] for written in self._writes.values())

    def _unload(self, sparing: Container[str] = ()) -> None:
        """Drop the subjects that were not used for longest, as far as the table has them."""
        if self._used <= self._memory:
            return
        for kind, view in enumerate(self._views):
            for subject in list(view.loaded):
                if subject in sparing or self._held(kind, subject):
                    continue
                view.unload(subject)
                self._elsewhere = True
                # Some more, so that the next batches do not have to look again.
                if self._used <= 0.9 * self._memory:
                    return

    def _row(self, kind: int, subject: str, state: Subject[Any]) -> Row:
        stored = _Stored(
            self._session,
            [(p.key, p.place, encode(p.content), p.over_at) for p in state.standing],
            [(key, place, encode(items)) for key, (place, items) in state.stream.items()],
        )
        data = msgspec.msgpack.encode(stored)
        data = crc32(data).to_bytes(4, "big") + data
        current = state.current
        content = None if current is None else current.content
        if isinstance(content, Task):
            group = class_of(content.status, content.dead is not None)
            due = current and current.over_at
            place = content.created_at, group, content.task_name, content.queue
            return Row(kind, subject, *place, due, data)
        return Row(kind, subject, None, None, None, None, self._due_at(kind, state), data)

    def _due_at(self, kind: int, state: Subject[Any]) -> float | None:
        """Return the Unix time from which `expire` has to look at what is no record."""
        current = state.current
        if kind != 0:
            over_at = current and current.over_at
            return None if over_at is None else time.time() + over_at - time.monotonic()
        if items := state.items():
            due = items[-1].appended_at + self._retention
            return None if due == inf else due
        return time.time()

    def _decoded(self, kind: int, data: bytes) -> Subject[Any]:
        """Return a subject of the table. Raises `Unavailable` if it is damaged."""
        try:
            if crc32(memoryview(data)[4:]) != int.from_bytes(data[:4], "big"):
                raise WireError("wrong checksum")
            stored = _decoder.decode(memoryview(data)[4:])
            state: Subject[Any] = Subject()
            state.size = len(data)
            for key, place, value, over_at in stored.standing:
                content = decode(value)
                if kind != 0 and stored.session != self._session:
                    # The clock of its times ended with another process. See `over_since`.
                    over_at = over_since(content, self._opened)
                state.standing.append(Proposal(key, content, over_at, place))
            for key, place, value in stored.stream:
                items = decode(value)
                assert isinstance(items, Items)
                state.stream[key] = place, items
        except (msgspec.MsgspecError, WireError, AssertionError) as error:
            raise self._damage(
                Unavailable(f"the log storage's file is damaged: {error}")
            ) from error
        state.current = accepted(state.standing)[-1] if state.standing else None
        return state

    async def _asked(self, answer: Awaitable[T]) -> T:
        try:
            return await answer
        except Unavailable as error:
            raise self._damage(error) from error

    def _damage(self, error: E) -> E:
        if self._failed is None:
            self._failed = error
            self._tell(error)
        return error


_decoder = msgspec.msgpack.Decoder(_Stored)

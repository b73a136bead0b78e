"""A storage on an append-only log: a save is a proposal, and reading it back decides who won."""

from __future__ import annotations

import asyncio
import logging
from asyncio import Future
from collections.abc import Iterable, Sequence
from itertools import count, islice

from msgspec.structs import replace
from uuid_utils import uuid7

from qtasks_core import DONE, Guarantees, Inbox, Outcome, Storage, Task
from qtasks_core.errors import Closed, Unavailable, WireError
from qtasks_core.records import FINAL, refused_by
from qtasks_core.transactions import refuse_transaction
from qtasks_core.wire import decode_task, encode_task
from qtasks_log.inbox import Inboxes, LogInbox
from qtasks_log.log import Entry, Log
from qtasks_log.reader import Reader
from qtasks_log.view import Judgement, Proposal, View

logger = logging.getLogger("qtasks.log")

LINGER = 0.05
"""Seconds to collect tombstones, so that they share an append and saves go first."""
LAST_SWEEP = 2.0
"""Seconds that `stop` allows for writing the remaining tombstones."""


class LogStorage(Storage):
    """Keeps records in a log. Every process reads it from its beginning into its own view."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._open = False
        self._reset()

    def _reset(self) -> None:
        self._view = View()
        self._reader = Reader(self._log, self._take)
        self._inboxes = Inboxes(self._reader, self._view)
        # Each save has a unique key. With one key for all repeats of a save, compaction would keep
        # the last repeat. A loser before that one would then win.
        self._writer = f"{uuid7().hex}."
        self._sequence = count()
        self._saves: dict[str, tuple[Save, int, Task]] = {}
        self._needless: dict[str, Entry] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self.undecodable = 0
        """How many entries of the log were skipped because they are not records."""

    @property
    def guarantees(self) -> Guarantees:
        return replace(
            self._log.guarantees,
            unsupported=(
                "query", "claim", "release", "set", "get_value", "values", "watch_value",
                "append", "read", "delete", "expire", "migrate",
            ),
        )  # fmt: skip

    async def start(self, namespace: str) -> None:
        """Connect and read the log to its end. From here on, this view judges as all others do."""
        self._reset()
        self._open = True
        try:
            await self._log.start(namespace)
            await self._reader.catch_up()
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        if self._open:
            self._open = False
            await self._inboxes.close()
            await self._reader.stop()
            await self._sweep_last()
        await self._log.stop()

    async def save(self, tasks: Sequence[Task], transaction: object | None = None) -> list[Outcome]:
        """Append a proposal for each task, and wait until all are read back and judged."""
        self._started()
        if transaction is not None:
            refuse_transaction(self)
        if not tasks:
            return []
        save = Save(len(tasks))
        entries: list[Entry] = []
        for at, task in enumerate(tasks):
            key = f"{self._writer}{next(self._sequence)}"
            entries.append(Entry(task.uuid, key, encode_task(task)))
            self._saves[key] = save, at, task
        try:
            for at, refused in enumerate(await self._log.append(entries)):
                if refused is not None:
                    save.set(at, Outcome("refused", refused))
            return await self._reader.wait(save.judged)
        finally:
            for entry in entries:
                self._saves.pop(entry.key, None)

    async def get(self, uuids: Sequence[str]) -> list[Task | None]:
        self._started()
        if uuids:
            await self._reader.catch_up()
        return [self._view.get(uuid) for uuid in uuids]

    async def inbox(self) -> Inbox:
        self._started()
        return LogInbox(self._inboxes)

    def _started(self) -> None:
        if not self._open:
            raise Closed("LogStorage is not started")

    def _take(self, entry: Entry) -> None:
        """Put the next entry of the log into the view, and notify inboxes and the saving call."""
        if entry.value is None:
            self._view.discard(entry.partition_key, entry.key)
            return
        own = self._saves.get(entry.key)
        try:
            task = own[2] if own is not None else decode_task(entry.value)
        except WireError as error:
            self._skip(entry, error)
            return
        judgement = self._view.propose(Proposal(entry.key, task))
        if judgement == "accept" and task.status in FINAL:
            self._inboxes.push(task)
        if own is not None:
            save, at, _ = own
            if judgement == "refuse":
                save.set(at, refused_by(self._view.get(task.uuid)))
            else:
                save.set(at, DONE)
        if not self._log.compacts:
            self._view.keep_record_only(task.uuid)
        elif entry.key.startswith(self._writer):
            self._discard_needless(entry, judgement)

    def _skip(self, entry: Entry, error: WireError) -> None:
        if not self.undecodable:
            logger.warning("skipping what is no record in the log, under %s: %s", entry.key, error)
        self.undecodable += 1

    def _discard_needless(self, entry: Entry, judgement: Judgement) -> None:
        """Send tombstones for the entries that a proposal of this process made needless."""
        uuid = entry.partition_key
        self._discard(uuid, self._view.needless(uuid) if judgement == "accept" else [entry.key])

    def _discard(self, uuid: str, keys: Iterable[str]) -> None:
        for key in keys:
            self._needless.setdefault(key, Entry(uuid, key, None))
        if self._needless and (self._sweeper is None or self._sweeper.done()):
            self._sweeper = asyncio.create_task(self._sweep())
            self._sweeper.add_done_callback(_log_failure)

    async def _sweep(self) -> None:
        """Write the tombstones. Those that fail are tried again with the next ones."""
        while self._needless:
            await asyncio.sleep(LINGER)
            batch = list(islice(self._needless.values(), 1000))
            try:
                await self._log.append(batch)
            except Unavailable as error:
                logger.info("%d tombstones have to wait: %s", len(self._needless), error)
                return
            for entry in batch:
                del self._needless[entry.key]

    async def _sweep_last(self) -> None:
        """Write the remaining tombstones. A failure loses nothing: tombstones only save space."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait({self._sweeper})
        if self._needless:
            try:
                async with asyncio.timeout(LAST_SWEEP):
                    await self._log.append(list(self._needless.values()))
            except (Unavailable, TimeoutError) as error:
                logger.info("%d tombstones were not written: %s", len(self._needless), error)


def _log_failure(sweeper: asyncio.Task[None]) -> None:
    if not sweeper.cancelled() and (error := sweeper.exception()) is not None:
        logger.error("writing tombstones failed", exc_info=error)


class Save:
    """A batch whose proposals are on their way through the log."""

    def __init__(self, size: int) -> None:
        self._outcomes: list[Outcome] = [DONE] * size
        self._missing = set(range(size))
        self.judged: Future[list[Outcome]] = asyncio.get_running_loop().create_future()

    def set(self, at: int, outcome: Outcome) -> None:
        """Note the outcome of one item. The last one finishes the wait."""
        if at in self._missing:
            self._outcomes[at] = outcome
            self._missing.discard(at)
            if not self._missing and not self.judged.done():
                self.judged.set_result(self._outcomes)

"""Rewrites a log that does not compact, so that it does not grow for ever."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from qtasks_core import Storage
from qtasks_core.errors import ConfigurationError
from qtasks_log.log import Entry, Rewritable
from qtasks_log.store import Store

logger = logging.getLogger("qtasks.log")

KEY = "qtasks-log-copies"
"""The shared value with the names of all copies that may exist. Each is named before it is made."""
SMALL = 8 * 1024 * 1024
"""Bytes below which a log is not rewritten, however little of it counts."""
RATIO = 2
"""A larger log is rewritten when it has so many times the bytes of what counts, and `SMALL`."""


class Rewriter:
    """Does one step of rewriting a log at a time. One process at a time should call it.

    If several do, or one dies at any step, nothing is lost.
    """

    def __init__(
        self, log: Rewritable, storage: Storage, catch_up: Callable[[], Awaitable[None]]
    ) -> None:
        self._log = log
        self._storage = storage
        self._catch_up = catch_up
        self._copy: str | None = None
        """What this process has copied last. If it was frozen, others may have forgotten the name
        before the copy was made."""

    async def step(self, store: Store) -> None:
        """Delete old copies, then switch to the copy that is prepared, or prepare one."""
        log = self._log
        known = await self._storage.get_value(KEY)
        names = [] if known is None else msgspec.json.decode(known, type=list[str])
        own = [] if self._copy is None or self._copy in names else [self._copy]
        if names or own:
            left = await log.forget([*names, *own])
            if self._copy not in left:
                self._copy = None
            if left != names:
                names, before = left, known
                known = msgspec.json.encode(names)
                if not await self._storage.set(KEY, known, expect=before):
                    return
        if log.prepared:
            await log.switch()
            await self._catch_up()
            await log.forget(names)
        elif log.size > SMALL and log.size > SMALL + RATIO * await store.living():
            await self._prepare(store, known, names)

    async def _prepare(self, store: Store, known: bytes | None, names: list[str]) -> None:
        name = self._log.successor()
        named = list(dict.fromkeys([*names, self._log.name, name]))
        if not await self._storage.set(KEY, msgspec.json.encode(named), expect=known):
            return
        self._copy = name
        logger.info("copying what still counts of a log of %d bytes", self._log.size)
        try:
            position = await store.freeze()

            async def living(entries: Sequence[Entry]) -> list[Entry]:
                return await store.living_of(entries)

            await self._log.prepare(name, position, living)
        except ConfigurationError as error:
            logger.warning("the log grows for ever: %s", error)
        finally:
            await store.thaw()

"""Deletes finished records from the start of a queue's topic, so that they are never read again.

If a group has no member for offsets.retention.minutes (7 days by default), the server forgets its
offsets. The next member then starts at the beginning of the topic. So finished records are deleted,
up to the group's committed offset. Only the owner of a partition deletes them.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import Task
from collections.abc import Mapping

from aiokafka.admin import RecordsToDelete
from aiokafka.structs import TopicPartition

from qtasks_core.errors import Closed, QTasksError, Unavailable
from qtasks_kafka.connection import Connection
from qtasks_kafka.settings import REQUEST

logger = logging.getLogger("qtasks.kafka")

RUNS_AGAIN = "it all runs again once no worker has run for the server's offsets.retention.minutes"
PERIOD = 10.0
"""Seconds between two deletions. Each takes one request per topic."""


class Floor:
    """Deletes finished records in one member's partitions, a little later, until `close`."""

    def __init__(self, connection: Connection, without: str = RUNS_AGAIN) -> None:
        """`without` tells an operator what follows if the user may not delete."""
        self._connection = connection
        self._without = without
        self._done: dict[TopicPartition, int] = {}
        self._deleted: dict[TopicPartition, int] = {}
        self._refused: set[str] = set()
        self._later: Task[None] | None = None
        self._closed = False

    def note(self, done: Mapping[TopicPartition, int]) -> None:
        """Note offsets that the group has committed. All records below them are finished."""
        self._done.update(done)
        if self._later is None and not self._closed and self._pending():
            self._later = asyncio.create_task(self._delete_later())

    def forget(self) -> None:
        """Forget all offsets: after an assignment, each owner notes them again at its takeover."""
        self._done.clear()
        self._deleted.clear()

    async def close(self, *, delete: bool) -> None:
        """Stop. With `delete`, first delete finished records if the server answers. Idempotent."""
        self._closed = True
        later, self._later = self._later, None
        if later is not None:
            later.cancel()
            await asyncio.wait({later})
        if delete:
            await self._delete()

    def _pending(self) -> dict[str, dict[TopicPartition, int]]:
        pending: dict[str, dict[TopicPartition, int]] = {}
        for tp, offset in self._done.items():
            if offset > self._deleted.get(tp, 0) and tp.topic not in self._refused:
                pending.setdefault(tp.topic, {})[tp] = offset
        return pending

    async def _delete_later(self) -> None:
        while self._pending():
            await asyncio.sleep(PERIOD)
            await self._delete()
        self._later = None

    async def _delete(self) -> None:
        for topic, places in self._pending().items():
            wanted = {tp: RecordsToDelete(offset) for tp, offset in places.items()}
            try:
                with self._connection.reaching():
                    async with asyncio.timeout(REQUEST):
                        await self._connection.started().delete_records(
                            wanted, timeout_ms=int(REQUEST * 1000)
                        )
            except (Unavailable, Closed) as error:
                logger.debug("what is done in %s is deleted later: %s", topic, error)
                return
            except QTasksError as error:
                self._refused.add(topic)
                logger.warning(
                    "what is done in %s cannot be deleted: %s. It needs the right to DELETE the "
                    "topic, which must not be compacted. Without that %s",
                    topic, error, self._without,
                )  # fmt: skip
            else:
                self._deleted.update(places)

"""A worker's entry in the registry of workers: a shared value that it renews while it lives."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import msgspec
from msgspec.structs import replace

from qtasks.client.registry import PERIOD, PREFIX, SEEN
from qtasks.client.retrying import Outage
from qtasks.worker.job import Jobs
from qtasks_core import Running, Storage, WorkerInfo
from qtasks_core.distribution import our_distribution
from qtasks_core.errors import NotSupported, Unavailable

logger = logging.getLogger("qtasks")

_NAMED = 20
"""How many running tasks an entry names."""
_PARTING = 2.0
"""Seconds for removing the entry at the end. If that fails, the entry soon counts as stale."""

_encoder = msgspec.msgpack.Encoder()


class Registration:
    """One worker's entry in the registry."""

    def __init__(
        self, id: str, queues: Sequence[str], concurrency: int, jobs: Jobs, storage: Storage
    ) -> None:
        self._jobs = jobs
        self._storage = storage
        self._asked = asyncio.Event()
        self._outage = Outage("the registry of workers")
        self._info = WorkerInfo(
            id=id,
            host=socket.gethostname(),
            pid=os.getpid(),
            queues=tuple(queues),
            concurrency=concurrency,
            started_at=time.time(),
            version=_version(),
        )

    def announce(self) -> None:
        """Have the entry renewed now."""
        self._asked.set()

    async def renew(self) -> None:
        """Renew the entry until cancelled, and then remove it.

        Returns at once if the storage has no shared values.
        """
        try:
            with suppress(Unavailable):  # the next worker tries it again
                await self._storage.set(SEEN, b"", expect=None)
            while True:
                await self._write()
                self._asked.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(PERIOD):
                        await self._asked.wait()
        except NotSupported:
            logger.info(
                "no registry of workers: %s keeps no shared values", type(self._storage).__name__
            )
        finally:
            await self._remove()

    async def _write(self) -> None:
        running = sorted(self._jobs.with_the_runner(), key=lambda job: job.started)[:_NAMED]
        info = replace(
            self._info,
            seen_at=time.time(),
            running=tuple(
                Running(job.message.uuid, job.message.task_name, job.started) for job in running
            ),
        )
        try:
            await self._storage.set(PREFIX + self._info.id, _encoder.encode(info))
        except Unavailable as error:
            self._outage.failed(error)
        else:
            self._outage.over()

    async def _remove(self) -> None:
        with suppress(NotSupported, Unavailable, TimeoutError):
            async with asyncio.timeout(_PARTING):
                await self._storage.set(PREFIX + self._info.id, None)


@cache
def _version() -> str:
    found = our_distribution()
    return "unknown" if found is None else found.version

"""The registry of workers: each keeps a shared value `worker/ID` fresh while it lives."""

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

from qtasks.engine.jobs import Jobs
from qtasks.engine.outage import Outage
from qtasks_core import Running, Storage, WorkerInfo
from qtasks_core.distribution import our_distribution
from qtasks_core.errors import NotSupported, Unavailable

logger = logging.getLogger("qtasks")

PREFIX = "worker/"
PERIOD = 10.0
"""Seconds between signs of life: few enough for an idle worker to cost next to nothing."""
SEEN = "worker-seen"
"""The shared value that is set once a worker has been there, and stays."""
STALE = 3 * PERIOD
"""Seconds of silence after which a worker is taken for dead."""
_GONE = 3600.0
"""Seconds of silence after which a worker that was killed is taken off the list."""
_NAMED = 20
"""How many running tasks a worker names."""
_PARTING = 2.0
"""Seconds for taking itself off the list; without that it is stale soon."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(WorkerInfo)


class Registration:
    """One worker's place in the registry."""

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

    def ask(self) -> None:
        """Have it give a sign of life now."""
        self._asked.set()

    async def keep(self) -> None:
        """Give signs of life until cancelled, and then take itself off the list.

        Returns at once where a storage has no values.
        """
        try:
            with suppress(Unavailable):  # the next worker tries again
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
            await self._leave()

    async def _write(self) -> None:
        begun = [job for job in self._jobs if job.begun]
        running = sorted(begun, key=lambda job: job.started)[:_NAMED]
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

    async def _leave(self) -> None:
        with suppress(NotSupported, Unavailable, TimeoutError):
            async with asyncio.timeout(_PARTING):
                await self._storage.set(PREFIX + self._info.id, None)


async def workers_alive(storage: Storage) -> list[WorkerInfo]:
    """Return the workers that gave a sign of life lately. Raises `NotSupported`, `Unavailable`."""
    since = time.time() - STALE
    found = await storage.values(PREFIX)
    infos = [_decoder.decode(found[key]) for key in sorted(found)]
    return [info for info in infos if info.seen_at >= since]


async def ever_seen(storage: Storage) -> bool:
    """Say whether there ever was a worker. Raises `NotSupported`, `Unavailable`."""
    return await storage.get_value(SEEN) is not None


async def forget_silent(storage: Storage) -> None:
    """Take workers off the list that could not do it themselves. Raises `Unavailable`."""
    since = time.time() - _GONE
    with suppress(NotSupported):
        for key, value in (await storage.values(PREFIX)).items():
            if _decoder.decode(value).seen_at < since:
                await storage.set(key, None, expect=value)


@cache
def _version() -> str:
    found = our_distribution()
    return "unknown" if found is None else found.version
